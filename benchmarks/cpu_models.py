"""Whole models on the CPU: the accelerated model against the unchanged one, in time and in peak memory.

    python benchmarks/cpu_models.py                       # all cases, a table on the terminal
    python benchmarks/cpu_models.py --case dinov2-s-518 --rounds 15 --json cpu.json

Time: both run in one process on one model, in turns (original, accelerated, accelerated, original, ...), so that whatever
else the machine does hits both; reported is the median of the rounds' ratios, with their spread. Memory: each in a
process of its own, peak resident size above the model loaded, the highest of a few calls. Results are checked first.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastvit
from fastvit._torchvision import ensure_importable


def dinov2_small_518():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    return Dinov2Model(config), torch.randn(1, 3, 518, 518)


def vit_base_transformers():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig()), torch.randn(8, 3, 224, 224)


def vit_base_timm():
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=1000), torch.randn(8, 3, 224, 224)


def _disturb_positions(model):
    """Relative positions begin at zero, where some implementations could save themselves the work."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def sam_base_meta():
    from segment_anything import sam_model_registry

    return _disturb_positions(sam_model_registry["vit_b"]().image_encoder), torch.randn(1, 3, 1024, 1024)


def sam_base_transformers():
    from transformers import SamConfig, SamModel, SamVisionConfig

    config = SamConfig(vision_config=SamVisionConfig(initializer_range=0.02).to_dict())
    return _disturb_positions(SamModel(config).vision_encoder), torch.randn(1, 3, 1024, 1024)


CASES = {
    "dinov2-s-518": ("Hugging Face DINOv2-S, 518 px, batch 1", dinov2_small_518),
    "vit-b-224-hf": ("Hugging Face ViT-B/16, 224 px, batch 8", vit_base_transformers),
    "vit-b-224-timm": ("timm ViT-B/16, 224 px, batch 8", vit_base_timm),
    "sam-b-1024-meta": ("segment_anything SAM-B image encoder, 1024 px, batch 1", sam_base_meta),
    "sam-b-1024-hf": ("Hugging Face SAM-B image encoder, 1024 px, batch 1", sam_base_transformers),
}
MOST_ROUNDS = {"sam-b-1024-meta": 3, "sam-b-1024-hf": 3}  # each of half a minute and more


def build(case: str):
    ensure_importable()
    torch.manual_seed(0)
    model, x = CASES[case][1]()
    return model.eval(), x


def seconds(model, x) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


@torch.no_grad()
def measure_time(case: str, rounds: int) -> dict:
    """Times of both, and the ratio accelerated / original of each round."""
    model, x = build(case)
    check = fastvit.verify(fastvit.accelerate(model), x)
    if not check.passed:
        return {"verified": str(check)}
    times: dict[str, list[float]] = {"original": [], "accelerated": []}
    for kind in times:  # warm both
        (fastvit.accelerate if kind == "accelerated" else fastvit.restore)(model)
        seconds(model, x)
    for number in range(rounds):
        order = ("original", "accelerated") if number % 2 == 0 else ("accelerated", "original")
        for kind in order:
            (fastvit.accelerate if kind == "accelerated" else fastvit.restore)(model)
            times[kind].append(seconds(model, x))
    ratios = sorted(a / o for a, o in zip(times["accelerated"], times["original"], strict=True))
    quarter = len(ratios) // 4
    return {
        "verified": str(check),
        "original_seconds": statistics.median(times["original"]),
        "accelerated_seconds": statistics.median(times["accelerated"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "ratio_worst": ratios[-1],
        "rounds": rounds,
    }


@torch.no_grad()
def peak_memory(case: str, kind: str, calls: int = 3) -> int:
    """Bytes of peak resident size above the loaded model, in this process."""
    model, x = build(case)
    if kind == "accelerated":
        fastvit.accelerate(model)
    before = resident()
    for _ in range(calls):
        model(x)
    return peak_resident() - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Of this process's own memory: what getrusage says was its parent's once, up to the start of a program."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_memory(case: str) -> dict[str, int]:
    found = {}
    for kind in ("original", "accelerated"):
        command = [sys.executable, __file__, "--case", case, "--peak-memory-of", kind]
        found[f"{kind}_peak_bytes"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def machine() -> dict:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit,
        "cpu": cpu.partition(":")[2].strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, default=11, help="paired runs a case")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--peak-memory-of", choices=("original", "accelerated"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory_of:
        print(peak_memory(options.case[0], options.peak_memory_of))
        return
    results = {"machine": machine(), "dtype": "float32", "cases": {}}
    for case in options.case or CASES:
        rounds = min(options.rounds, MOST_ROUNDS.get(case, options.rounds))
        found = {"what": CASES[case][0], **measure_time(case, rounds), **measure_memory(case)}
        results["cases"][case] = found
        if "ratio" not in found:
            sys.exit(f"{case}: wrong result, not timed: {found['verified']}")
        low, high = found["ratio_quartiles"]
        print(
            f"{found['what']:<55} {found['original_seconds']:.3f} s -> {found['accelerated_seconds']:.3f} s,"
            f" ratio {found['ratio']:.3f} (quartiles {low:.3f}-{high:.3f}, worst {found['ratio_worst']:.3f});"
            f" peak {found['original_peak_bytes'] / 2**20:.0f} -> {found['accelerated_peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
