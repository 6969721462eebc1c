"""Runs every scenario and prints one JSON object: its name → None, or what went wrong."""

import importlib
import json
import traceback

import fastvit
from fastvit._torchvision import ensure_importable
from tests.launch_scenarios.harness import SCENARIOS

# In this order: training's first calls have to be the first of their signatures.
for room in ("training", "inference", "memory", "surroundings"):
    importlib.import_module(f"tests.launch_scenarios.{room}")

ensure_importable()
results = {}
with fastvit.use_backend("auto"):
    for name, run in SCENARIOS.items():
        try:
            run()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc(limit=-3)
print(json.dumps(results))
