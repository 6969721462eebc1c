"""What the config of Hugging Face's ``SamModel`` says that no shape of its tensors shows. It is untrusted: what gives other
masks than are computed here is refused in one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import CheckpointError, read_json

VISION, PROMPT, DECODER = "vision_config", "prompt_encoder_config", "mask_decoder_config"
BLOCKS = "image_encoder.blocks."
# What a config means where it is silent; of what a list stands beside, only its values are served.
SILENT: dict[str, dict[str, Any]] = {
    VISION: {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "num_attention_heads": 12,
        "image_size": 1024,
        "patch_size": 16,
        "window_size": 14,
        "global_attn_indexes": [2, 5, 8, 11],
    },
    PROMPT: {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 1024, "patch_size": 16},
    DECODER: {"hidden_act": "relu", "layer_norm_eps": 1e-6, "num_attention_heads": 8, "attention_downsample_rate": 2},
}
SERVED = {(part, "hidden_act"): SILENT[part]["hidden_act"] for part in SILENT} | {(DECODER, "attention_downsample_rate"): 2}
COUNTS = ("num_attention_heads", "image_size", "patch_size", "window_size")
LARGEST = 2**14  # of a count: what a config may ask to be laid out


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Vision, prompt encoder and mask decoder, each with the values of ``SILENT``. Raises ``CheckpointError``."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no config of a Segment Anything, for it is no object")
    if content.get("model_type") != "sam":
        raise CheckpointError(f"{path}: its model_type is {content.get('model_type')!r}; expected 'sam'")
    config = {}
    for part, silent in SILENT.items():
        given = content.get(part) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{path}: its {part} is {repr(given)[:100]}; expected an object")
        config[part] = {name: given.get(name, value) for name, value in silent.items()}
        for name, value in config[part].items():
            expected = _expected(name, value, silent[name], SERVED.get((part, name)))
            if expected is not None:
                raise CheckpointError(f"{path}: the {name} of its {part} is {repr(value)[:100]}; expected {expected}")
    for name in ("image_size", "patch_size"):
        if config[PROMPT][name] != config[VISION][name]:
            values = f"{config[PROMPT][name]} in its {PROMPT} and {config[VISION][name]} in its {VISION}"
            raise CheckpointError(f"{path}: {name} is {values}; expected one")
    return config


def _expected(name: str, value: Any, silent: Any, served: Any) -> str | None:
    """What a value should be, where it is something else."""
    if served is not None:
        return None if value == served else repr(served)
    if isinstance(silent, bool):
        return None if isinstance(value, bool) else "true or false"
    if name in COUNTS:
        return None if type(value) is int and 1 <= value <= LARGEST else f"a whole number from 1 to {LARGEST}"
    if isinstance(silent, list):
        return None if isinstance(value, list) and all(type(item) is int for item in value) else "a list of whole numbers"
    return None if type(value) in (int, float) and 0 <= value < 1 else "a number from 0 to 1"  # eps; NaN is none


def sizes_of(config: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of ``build_sam`` that no shape shows."""
    return {
        "norm_eps": float(config[VISION]["layer_norm_eps"]),
        "prompt_norm_eps": float(config[PROMPT]["layer_norm_eps"]),
        "decoder_norm_eps": float(config[DECODER]["layer_norm_eps"]),
        "decoder_heads": config[DECODER]["num_attention_heads"],
    }


def zeros_of(config: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros, not yet laid out in memory, for what a config leaves out (``qkv_bias``, ``use_abs_pos``, ``use_rel_pos``): adding
    them is the same as not having them. ``tensors`` are the others, by Meta's names."""
    vision = config[VISION]
    patches = tensors.get("image_encoder.patch_embed.proj.weight")
    if patches is None or patches.dim() != 4:
        return {}
    dim, grid = patches.shape[0], vision["image_size"] // vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    if not vision["use_abs_pos"]:
        shapes["image_encoder.pos_embed"] = (1, grid, grid, dim)
    for index in sorted({key[len(BLOCKS) :].partition(".")[0] for key in tensors if key.startswith(BLOCKS)}):
        attention = f"{BLOCKS}{index}.attn."
        if not vision["qkv_bias"]:
            shapes[f"{attention}qkv.bias"] = (3 * dim,)
        if not vision["use_rel_pos"]:
            side = grid if index in map(str, vision["global_attn_indexes"]) else vision["window_size"]
            for table in ("rel_pos_h", "rel_pos_w"):
                shapes[attention + table] = (max(0, 2 * side - 1), dim // vision["num_attention_heads"])
    return {key: patches.new_zeros(()).expand(shape) for key, shape in shapes.items() if key not in tensors}
