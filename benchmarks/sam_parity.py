"""Segment Anything at full size beside segment_anything 1.0: how far embeddings differ, and how much masks overlap.

    python -m benchmarks.sam_parity                 # SAM-B, L and H at 1024 px
    python -m benchmarks.sam_parity --size b

Weights are random, from one seed: PyTorch's own initialization, position tables and relative positions normal with deviations
0.2 and 0.1, the norms' scales 1 ± 0.1. Masks of such a model fill 14 to 94 % of the photograph, and their logits
are normal around the cutoff: every pixel near it may flip, so rounding shows more than in a trained model's masks.
"""

import argparse
import gc
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvit import SamPredictor
from fastvit._torchvision import ensure_importable
from fastvit.models import sam_vit_b, sam_vit_h, sam_vit_l
from fastvit.models.sam import Sam, to_huggingface_state_dict
from fastvit.pipelines.embeddings import scale

ensure_importable()

SIZES = {"b": sam_vit_b, "l": sam_vit_l, "h": sam_vit_h}
# In pixels of scikit-image's astronaut, 512×512: her face, her suit, and both with a point beside them.
PROMPTS: list[dict[str, Any]] = [
    {"point_coords": np.array([[220, 100]]), "point_labels": np.array([1])},
    {"box": np.array([120, 40, 330, 280])},
    {
        "point_coords": np.array([[220, 100], [400, 60]]),
        "point_labels": np.array([1, 0]),
        "box": np.array([60, 10, 400, 500]),
    },
]


def photograph() -> np.ndarray:
    """(512, 512, 3) uint8: NASA's portrait of Eileen Collins, public domain."""
    from skimage import data

    return data.astronaut()


@torch.no_grad()
def with_tables(model: nn.Module, seed: int = 0) -> nn.Module:
    """A freshly built model with its position tables and norms at random values instead of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("rel_pos_h", "rel_pos_w")):
            parameter.normal_(std=0.1, generator=generator)
        elif name.endswith("pos_embed"):
            parameter.normal_(std=0.2, generator=generator)
        elif parameter.dim() == 1 and name.endswith("weight"):
            parameter.normal_(mean=1.0, std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def pair(size: str) -> tuple[Any, Sam]:
    """(segment_anything's, ours), of one size and with the same parameters in memory once."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    theirs = with_tables(sam_model_registry[f"vit_{size}"]())
    ours = SIZES[size](device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours = Sam(ours.image_encoder, ours.prompt_encoder, ours.mask_decoder).eval().requires_grad_(False)
    return theirs, ours


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((actual.float() - expected).abs().max() / expected.abs().max()).item()


def masks(predictor: Any) -> np.ndarray:
    """(9, 512, 512) bool: three masks each prompt."""
    return np.concatenate([predictor.predict(**prompt)[0] for prompt in PROMPTS])


def ious(actual: np.ndarray, expected: np.ndarray) -> list[float]:
    return [float((a & b).sum() / max((a | b).sum(), 1)) for a, b in zip(actual, expected, strict=True)]


def huggingface_encoder(ours: Sam) -> Any:
    """transformers' SAM-B image encoder with the same parameters."""
    from transformers import SamConfig, SamModel

    model = SamModel(SamConfig())
    model.load_state_dict(to_huggingface_state_dict(ours))
    return model.vision_encoder.eval()


@torch.no_grad()
def compare(size: str) -> dict[str, Any]:
    """Each model encodes the photograph once; parameters are turned to bfloat16 when float32 is no longer needed."""
    from segment_anything import SamPredictor as Original

    theirs, ours = pair(size)
    original, predictor = Original(theirs), SamPredictor(ours)
    original.set_image(photograph())
    expected, embedding = masks(original), original.features
    predictor.set_image(photograph())
    found: dict[str, Any] = {"size": size, "share": [float(mask.mean()) for mask in expected]}
    found["error"] = relative(predictor.features, embedding)
    found["float32"] = ious(masks(predictor), expected)
    if size == "b":
        pixels = theirs.preprocess(scale(photograph(), "RGB", ours, predictor.transform)[0])
        found["huggingface"] = relative(predictor.features, huggingface_encoder(ours)(pixels).last_hidden_state)
    # segment_anything's prompt encoder takes float32 alone: its own bfloat16 is autocast, or its image encoder by itself.
    theirs.image_encoder.bfloat16()
    mixed = SamPredictor(theirs)
    mixed.set_image(photograph())
    found["theirs, encoder in bfloat16"] = ious(masks(mixed), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found["theirs, autocast"] = ious(masks(mixed), expected)
    ours.image_encoder.bfloat16()
    predictor.set_image(photograph())
    found["encoder in bfloat16"] = ious(masks(predictor), expected)
    ours.bfloat16()
    found["bfloat16"] = ious(masks(predictor), expected)
    return found


IOUS = ["float32", "bfloat16", "encoder in bfloat16", "theirs, autocast", "theirs, encoder in bfloat16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="may be given several times; all of them by default")
    rows = []
    for size in parser.parse_args().size or SIZES:
        rows.append(compare(size))
        gc.collect()
        print(rows[-1], flush=True)
    print("\n| | " + " | ".join(f"SAM-{row['size'].upper()}" for row in rows) + " |\n" + "|---" * (len(rows) + 1) + "|")
    print("| image encoder, largest error | " + " | ".join(f"{row['error']:.1e}" for row in rows) + " |")
    for name, worst in itertools.product(IOUS, (False, True)):
        cells = [f"{min(row[name]) if worst else sum(row[name]) / len(row[name]):.5f}" for row in rows]
        print(f"| {name}, {'worst' if worst else 'mean'} IoU of nine masks | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
