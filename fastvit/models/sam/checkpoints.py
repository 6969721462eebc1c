"""Weights of Segment Anything from files: Meta's ``.pth``, safetensors, and folders or ids of Hugging Face's ``SamModel``.

Sizes come from the shapes of the tensors, so a file needs no description; what no shape shows (heads of the decoder, eps)
comes from a folder's config, or is what Meta's models have. ``files`` reads them, and nothing that it reads may run code.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...nn import Linear
from .config import read_config, sizes_of, zeros_of
from .files import CheckpointError, fetch, few, locate, read_file, read_weights
from .sam import Sam, build_sam

PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, of torch.compile
TEXT = "prompt_encoder.text_embedding."

# Hugging Face's beginning of a name, the first that fits → Meta's.
_BEGINNINGS = (
    ("shared_image_embedding.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("vision_encoder.patch_embed.projection.", "image_encoder.patch_embed.proj."),
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.neck.conv1.", "image_encoder.neck.0."),
    ("vision_encoder.neck.layer_norm1.", "image_encoder.neck.1."),
    ("vision_encoder.neck.conv2.", "image_encoder.neck.2."),
    ("vision_encoder.neck.layer_norm2.", "image_encoder.neck.3."),
    ("vision_encoder.", "image_encoder."),
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    ("prompt_encoder.mask_embed.conv1.", "prompt_encoder.mask_downscaling.0."),
    ("prompt_encoder.mask_embed.layer_norm1.", "prompt_encoder.mask_downscaling.1."),
    ("prompt_encoder.mask_embed.conv2.", "prompt_encoder.mask_downscaling.3."),
    ("prompt_encoder.mask_embed.layer_norm2.", "prompt_encoder.mask_downscaling.4."),
    ("prompt_encoder.mask_embed.conv3.", "prompt_encoder.mask_downscaling.6."),
    ("mask_decoder.upscale_conv1.", "mask_decoder.output_upscaling.0."),
    ("mask_decoder.upscale_layer_norm.", "mask_decoder.output_upscaling.1."),
    ("mask_decoder.upscale_conv2.", "mask_decoder.output_upscaling.3."),
)
# What may stand further on.
_PIECES = ((".layer_norm_final_attn.", ".norm_final_attn."), *((f".layer_norm{n}.", f".norm{n}.") for n in range(1, 5)))
# The MLPs at the decoder's end: Meta numbers all of their linears, Hugging Face those between the first and the last.
_HEAD = re.compile(r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)(proj_in|layers\.(\d+)|proj_out)\.")
_TIED = "prompt_encoder.shared_embedding.positional_embedding"  # Hugging Face's second name for the matrix of positions


def load_sam(
    path_or_id: str | os.PathLike[str],
    *,
    text_dim: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Sam:
    """A ``Sam`` with trained weights, in evaluation mode; which one is read from the shapes of its tensors.

    Args:
        path_or_id: a file of Meta's (``sam_vit_b_01ec64.pth``) or of ours, by ``torch.save`` or as safetensors; a folder that
            Hugging Face's ``SamModel.save_pretrained`` has written, in one file or in shards; or a Hugging Face id
            (``facebook/sam-vit-base``), fetched once. Where a folder's config leaves out qkv_bias, use_abs_pos or use_rel_pos
            the model has zeros for them; another activation or attention_downsample_rate than Meta's is refused.
        text_dim: as in ``PromptEncoder``; the projection begins at random where the file has none.
        device, dtype: where the model goes; None leaves it on the CPU and in the dtype that the file has.

    Raises:
        CheckpointError (a ``ValueError``): no such file, or one that is damaged, unsafe, incomplete or no Segment Anything.
    """
    tensors, known = read_checkpoint(path_or_id)
    sizes = infer_sizes(tensors, path_or_id) | known
    if text_dim is not None:
        sizes["text_dim"] = text_dim
    return fill(sizes, tensors, path_or_id).to(device=device, dtype=dtype)


def sam_without_weights(path_or_id: str | os.PathLike[str]) -> Sam:
    """The model of ``load_sam`` on the ``meta`` device, from names and shapes alone. Raises as ``load_sam``."""
    tensors, known = read_checkpoint(path_or_id)
    return _empty(infer_sizes(tensors, path_or_id) | known, tensors, path_or_id)


def _empty(sizes: dict[str, Any], tensors: dict[str, Tensor], name: str | os.PathLike[str]) -> Sam:
    """``build_sam(**sizes)`` on the ``meta`` device, whose parameters have the names and shapes of these tensors."""
    try:
        sam = build_sam(**sizes, device="meta")
    except ValueError as error:
        raise CheckpointError(f"{name}: no Segment Anything has such sizes ({error})") from error
    expected = {key: tensor.shape for key, tensor in sam.state_dict().items()}
    if not any(key.startswith(TEXT) for key in tensors):
        expected = {key: shape for key, shape in expected.items() if not key.startswith(TEXT)}
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"{name}: lacks {len(missing)} tensors of the model: {few(missing)}")
    if unknown := tensors.keys() - expected.keys():
        raise CheckpointError(f"{name}: has {len(unknown)} tensors that the model has not: {few(unknown)}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(tensors[key].shape)}; expected {tuple(shape)}")
    return sam


def fill(sizes: dict[str, Any], tensors: dict[str, Tensor], name: str | os.PathLike[str]) -> Sam:
    """``build_sam(**sizes)`` with these tensors for parameters, in their dtype. Raises ``CheckpointError``."""
    sam = _empty(sizes, tensors, name)
    # Copies: tensors that were read by mapping the file would change, or crash the process, when the file does.
    owned = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    sam.load_state_dict(owned, strict=False, assign=True)
    projection: Any = sam.prompt_encoder.text_embedding
    if projection is not None and projection.weight.is_meta:
        dtype = sam.image_encoder.pos_embed.dtype
        sam.prompt_encoder.text_embedding = Linear(projection.in_features, projection.out_features, dtype=dtype)
    pixels = {key: sizes[key] for key in ("pixel_mean", "pixel_std") if key in sizes}
    sam = Sam(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder, **pixels)  # whose buffers lie on no ``meta`` device
    return sam.to(dtype=sam.image_encoder.pos_embed.dtype).eval()


def read_checkpoint(path_or_id: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by Meta's names, the arguments of ``build_sam`` that a config gives). Raises ``CheckpointError``."""
    path = locate(path_or_id)
    if path is not None and path.is_file():
        return _to_meta(read_file(path)), {}
    if path is None:
        path = fetch(os.fspath(path_or_id))
    config = read_config(path / "config.json")
    tensors = _to_meta(read_weights(path))
    return tensors | zeros_of(config, tensors), sizes_of(config)


def infer_sizes(tensors: Mapping[str, Tensor], name: str | os.PathLike[str] = "checkpoint") -> dict[str, Any]:
    """The arguments of ``build_sam`` that the shapes of a state dict imply. Raises ``CheckpointError`` for another model's."""

    def shape(key: str, rank: int) -> torch.Size:
        if key not in tensors:
            raise CheckpointError(f"{name}: is no checkpoint of Segment Anything's ViTs, for it has no {key}")
        if tensors[key].dim() != rank or 0 in tensors[key].shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(tensors[key].shape)}; expected {rank} dimensions")
        return tensors[key].shape

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].partition(".")[0] for key in tensors if key.startswith(prefix)})

    grid, dim = shape("image_encoder.pos_embed", 4)[2:]
    patch_size = shape("image_encoder.patch_embed.proj.weight", 4)[2]
    shape("image_encoder.blocks.0.attn.rel_pos_h", 2)
    tables = [shape(f"image_encoder.blocks.{index}.attn.rel_pos_h", 2) for index in range(count("image_encoder.blocks."))]
    sides = [(rows + 1) // 2 for rows, _ in tables]
    windows = sorted({side for side in sides if side != grid})
    if len(windows) > 1:
        raise CheckpointError(f"{name}: its windows have sides of {', '.join(map(str, windows))}; expected one size")
    prompt_dim = shape("image_encoder.neck.0.weight", 4)[0]
    layer = "mask_decoder.transformer.layers.0."
    sizes = {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": len(tables),
        "num_heads": max(1, dim // tables[0][1]),
        "global_attention": tuple(index for index, side in enumerate(sides) if side == grid),
        "mlp_ratio": shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0] / dim,
        "prompt_dim": prompt_dim,
        "mask_in_channels": shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        "decoder_depth": count("mask_decoder.transformer.layers."),
        "decoder_mlp_dim": shape(f"{layer}mlp.lin1.weight", 2)[0],
        "decoder_downsample_rate": max(1, prompt_dim // shape(f"{layer}cross_attn_token_to_image.q_proj.weight", 2)[0]),
        "num_multimask_outputs": count("mask_decoder.output_hypernetworks_mlps.") - 1,
        "iou_head_depth": count("mask_decoder.iou_prediction_head.layers."),
        "iou_head_hidden_dim": shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    }
    if windows:
        sizes["window_size"] = windows[0]
    if f"{TEXT}weight" in tensors:
        sizes["text_dim"] = shape(f"{TEXT}weight", 2)[1]
    return sizes


def to_huggingface_state_dict(sam: Sam) -> dict[str, Tensor]:
    """The state dict under the names of Hugging Face's ``SamModel``, which has no place for ``text_embedding``."""
    state = {key: tensor for key, tensor in sam.state_dict().items() if not key.startswith(TEXT)}
    last = _last_linears(state)
    renamed = {}
    for key, tensor in state.items():
        if head := _HEAD.match(key):
            index = int(head[3])
            place = "proj_in" if index == 0 else "proj_out" if index == last[head[1]] else f"layers.{index - 1}"
            key = f"{head[1]}{place}.{key[head.end() :]}"
        renamed[_rename(key, 1, 0)] = tensor
    return renamed | {_TIED: renamed["shared_image_embedding.positional_embedding"]}


def _to_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names turned to Meta's; Meta's stay. What wrappers put before all names is taken off."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("vision_encoder.") for key in tensors):
        return tensors
    tensors = {key: tensor for key, tensor in tensors.items() if key != _TIED}
    last = _last_linears(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        if head := _HEAD.match(key):
            inner = last.get(head[1], -1) + 1  # linears between the first and the last
            index = {"proj_in": 0, "proj_out": inner + 1}.get(head[2]) if head[3] is None else int(head[3]) + 1
            key = f"{head[1]}layers.{index}.{key[head.end() :]}"
        renamed[_rename(key, 0, 1)] = tensor
    return renamed


def _last_linears(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of every head of the decoder the greatest number of a linear, by the beginning of its name."""
    last: dict[str, int] = {}
    for head in filter(None, map(_HEAD.match, tensors)):
        if head[3] is not None:
            last[head[1]] = max(last.get(head[1], 0), int(head[3]))
    return last


def _rename(key: str, source: int, target: int) -> str:
    for pair in _BEGINNINGS:
        if key.startswith(pair[source]):
            key = pair[target] + key.removeprefix(pair[source])
            break
    for pair in _PIECES:
        key = key.replace(pair[source], pair[target])
    return key
