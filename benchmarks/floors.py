"""FLOPs of whole models, counted from their sizes: what a model cannot do without, padding and biases left out.

Sources: Dosovitskiy et al. 2021 (ViT), Kirillov et al. 2023, appendix A (SAM's encoder). Multiply-adds count two; norms,
activations and softmax are not counted. A training step is three times the forward pass.
"""


def vit_flops(
    image: int, patch: int, dim: int, depth: int, mlp_dim: int, classes: int = 0, extra: int = 1, gated: bool = False
) -> float:
    """Of one image: ``extra`` tokens (class, registers) beside the patches; ``gated``: an MLP of three matrices."""
    patches = (image // patch) ** 2
    tokens = patches + extra
    block = 8 * tokens * dim**2 + 4 * tokens**2 * dim + (6 if gated else 4) * tokens * dim * mlp_dim
    return depth * block + 2 * patches * 3 * patch**2 * dim + 2 * dim * classes


def sam_encoder_flops(
    dim: int, depth: int, globals_: int, side: int = 64, patch: int = 16, window: int = 14, out: int = 256
) -> float:
    """Of one image: all tokens are computed once, windows attend to window² keys, relative positions are products too."""
    tokens = side**2
    positions = {"window": 2 * tokens * 2 * window * dim, "global": 2 * tokens * 2 * side * dim}
    block = 24 * tokens * dim**2
    attention = (depth - globals_) * (4 * tokens * window**2 * dim + positions["window"])
    attention += globals_ * (4 * tokens**2 * dim + positions["global"])
    embedding = 2 * tokens * 3 * patch**2 * dim
    neck = 2 * tokens * dim * out + 2 * tokens * out**2 * 9
    return depth * block + attention + embedding + neck


VIT = {
    "ViT-B/16": {"patch": 16, "dim": 768, "depth": 12, "mlp_dim": 3072},
    "ViT-L/16": {"patch": 16, "dim": 1024, "depth": 24, "mlp_dim": 4096},
    "ViT-H/14": {"patch": 14, "dim": 1280, "depth": 32, "mlp_dim": 5120},
    "DINOv2-L/14": {"patch": 14, "dim": 1024, "depth": 24, "mlp_dim": 4096},
}
SAM = {
    "SAM-B": {"dim": 768, "depth": 12, "globals_": 4},
    "SAM-L": {"dim": 1024, "depth": 24, "globals_": 4},
    "SAM-H": {"dim": 1280, "depth": 32, "globals_": 4},
}
