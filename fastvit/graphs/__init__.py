"""CUDA graphs of an accelerated model: a call like one that was recorded replays its launches, all of them at once.

What is recorded is the forward of the model, and of every module around its served blocks that is called by itself (``module``,
``store``, ``recording``, ``recorder``). A graph repeats launches on fixed addresses. So all else that decides what a call does
is its signature (``signature``), what may not be recorded is found by looking on in an ordinary run (``inspection``), and
weights, hooks and children are looked at before every replay (``watch``). A call that is not replayed runs as it would without
graphs, and the report says why.
"""

from .module import ATTRIBUTE, GraphedModule, attach, describe, is_graphed, paused, release

__all__ = ["ATTRIBUTE", "GraphedModule", "attach", "describe", "is_graphed", "paused", "release"]
