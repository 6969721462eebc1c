"""Models of timm: by a name of its own, or from a folder that its ``save_for_hf`` has written."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import LoadError, explained, library
from .huggingface import fetch


def from_name(name: str, weights: bool) -> nn.Module:
    """``timm.create_model(name, pretrained=True)``; without weights, on the ``meta`` device."""
    timm = library("timm")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        similar = timm.list_models(f"*{architecture}*")[:3] if architecture.isidentifier() else []
        hint = f"; similar: {', '.join(f'timm/{other}' for other in similar)}" if similar else ""
        raise LoadError(f"timm/{name}: timm {timm.__version__} has no model of that name{hint}")
    if not timm.models.is_model_pretrained(name):
        raise LoadError(f"timm/{name}: timm {timm.__version__} knows no trained weights of that name")
    options = {}
    if weights and (file := _fetch(timm.get_pretrained_cfg(name))) is not None:
        options["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
    return _create(name, f"timm/{name}", weights, **options)


def _fetch(config: Any) -> Path | None:
    """The weights of timm's that lie on the Hugging Face Hub, safetensors if there are any; None: they lie elsewhere.

    timm would fetch them as well, but takes an unreachable Hub for a missing safetensors file and goes on to a pickle.
    """
    if not config.hf_hub_id or config.custom_load == "hf":  # the second: a format that only the model's class reads
        return None
    pickled = config.hf_hub_filename or "pytorch_model.bin"
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    names = [safe.get(pickled, str(Path(pickled).with_suffix(".safetensors"))), pickled]
    folder = fetch(config.hf_hub_id, *([name] for name in names))
    return next(folder / name for name in names if (folder / name).is_file())


def from_folder(folder: Path, config: dict[str, Any], weights: bool) -> nn.Module:
    """The architecture that ``config`` names, with the weights that lie beside it. No network is used."""
    timm = library("timm")
    if not timm.is_model(str(config["architecture"])):
        raise LoadError(f"{folder}: timm {timm.__version__} has no architecture {config['architecture']!r}")
    model: Any = _create(f"local-dir:{folder}", folder, weights)
    classes = model.pretrained_cfg.get("num_classes")
    if classes is not None and model.num_classes != classes:  # timm would leave the head at random values
        raise LoadError(f"{folder}: config.json says {classes} classes, and {model.num_classes} among its model_args")
    return model


def _create(name: str, shown: Any, weights: bool, **options: Any) -> nn.Module:
    timm = library("timm")
    with explained(shown), nullcontext() if weights else torch.device("meta"):
        return timm.create_model(name, pretrained=weights, **options)
