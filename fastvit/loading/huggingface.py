"""Models of Hugging Face transformers, from a folder; an id is fetched into a folder first."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn

from .errors import LoadError, explained, library

DESCRIPTIONS = ["config.json", "preprocessor_config.json"]
SAFE = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
FOREIGN = {"auto_map", "transformers_weights"}  # keys of a config that are never followed


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``LoadError`` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path.parent}: has no {path.name}, so it is no folder of a saved model") from None
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not a JSON file ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path}: holds a JSON {type(content).__name__}; expected an object")
    return content


def fetch(name: str, *choices: list[str]) -> Path:
    """The folder in Hugging Face's cache with a repository's descriptions and the first choice of files that it has.

    Without choices the descriptions alone. Raises ``LoadError`` where it cannot be had, or has none of the choices.
    """
    hub = library("huggingface_hub")
    try:
        for patterns in choices or ([],):
            folder = Path(hub.snapshot_download(name, allow_patterns=[*DESCRIPTIONS, *patterns]))
            if not choices or any(any(folder.glob(pattern)) for pattern in patterns):
                return folder
    except hub.errors.LocalEntryNotFoundError as error:
        raise LoadError(f"{name}: no such folder, not in Hugging Face's cache, and the Hub cannot be reached") from error
    except hub.errors.GatedRepoError as error:
        raise LoadError(f"{name}: its owner asks for an agreement; accept it on huggingface.co and log in first") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise LoadError(f"{name}: no such folder, and no such repository on the Hugging Face Hub") from error
    except Exception as error:
        raise LoadError(f"{name}: cannot be fetched from the Hugging Face Hub ({type(error).__name__})") from error
    wanted = ", ".join(pattern for patterns in choices for pattern in patterns[:1])
    raise LoadError(f"{name}: holds no weights of a known kind ({wanted}), or they are not cached and the Hub cannot be reached")


def from_folder(folder: Path, raw: dict[str, Any], weights: bool) -> nn.Module:
    """The model class that the config names, with all of its weights; without weights, on the ``meta`` device."""
    with explained(folder):
        config, cls = _config_and_class(folder, raw)
        if not weights:
            with torch.device("meta"):
                return cls(config)
        _check_shards(folder)
        model, info = cls.from_pretrained(
            str(folder),
            config=config,
            dtype="auto",
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported and refused below
        )
        unfit = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    if unfit:
        raise LoadError(f"{folder}: {len(unfit)} of its weights do not have the shapes of its config: {_few(unfit)}")
    _check_taken(folder, model, info["unexpected_keys"])
    _check_complete(folder, model, set(info["missing_keys"]))
    return model


def _config_and_class(folder: Path, raw: dict[str, Any]) -> tuple[Any, Any]:
    """The config object and the class of the model, both transformers' own."""
    transformers = library("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, own_code = raw.get("model_type"), " and comes with code of its own, which is never run" if "auto_map" in raw else ""
    if not isinstance(kind, str):
        raise LoadError(f"{folder / 'config.json'}: names neither a model_type (Hugging Face) nor an architecture (timm)")
    if kind not in CONFIG_MAPPING:
        raise LoadError(f"{folder}: its model_type {kind!r} is none of transformers {transformers.__version__}{own_code}")
    config = CONFIG_MAPPING[kind].from_dict(_inert(raw))
    config.name_or_path = str(folder)
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise LoadError(f"{folder / 'config.json'}: architectures is {names!r}; expected a list of class names")
    if not names:
        return config, transformers.AutoModel._model_mapping[type(config)]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(f"{folder}: its class {names[0]} is none of transformers {transformers.__version__}{own_code}")
    if getattr(cls, "config_class", None) is not type(config):
        raise LoadError(f"{folder}: its class {names[0]} does not take a config of model_type {kind!r}")
    return config, cls


def _inert(value: Any) -> Any:
    """A config without what would fetch something or run foreign code: kernels by a Hub id, a repository's own classes,
    a backbone with weights from elsewhere, files of weights under names that are not checked here."""
    if isinstance(value, list):
        return [_inert(item) for item in value]
    if not isinstance(value, dict):
        return value
    inert = {key: _inert(item) for key, item in value.items() if key not in FOREIGN and "_implementation" not in key}
    return inert | {"use_pretrained_backbone": False} if inert.get("use_pretrained_backbone") else inert


def _check_shards(folder: Path) -> None:
    """An index of weights names files that lie beside it, and no others: transformers would follow it anywhere."""
    for path in filter(Path.is_file, (folder / name for name in INDEXES)):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict):
            raise LoadError(f"{path}: its weight_map is {type(shards).__name__}; expected an object")
        for shard in shards.values():
            # A Windows path knows both separators, and drives.
            if not isinstance(shard, str) or shard in ("", "..") or PureWindowsPath(shard).name != shard:
                raise LoadError(f"{path}: says that weights lie in {repr(shard)[:200]}; expected the name of a file beside it")


def _check_taken(folder: Path, model: Any, unexpected: Iterable[str]) -> None:
    """Weights that the model has no place for mean that it is not the one that was trained: cut off, or without adapters.

    Left out without a word is what transformers lists as ignored, what only masked pretraining uses, a pooler in front of
    another head, and all that was trained beside the backbone: other heads, a decoder, the tower for the texts.
    """
    transformers, base = library("transformers"), model.base_model
    headless = base is model or type(model) is transformers.AutoModel._model_mapping.get(type(model.config), None)
    parts = {name for module in ((model, base) if headless else (base,)) for name, _ in module.named_children()}
    prefix = f"{model.base_model_prefix}."
    untaken = set()
    for name in unexpected:
        part = name.removeprefix(prefix).partition(".")[0]
        beside = part == "pooler" or (part not in parts and (headless or not name.startswith(prefix)))
        if not beside and not name.endswith(".mask_token"):
            untaken.add(name)
    if untaken:
        what = f"{len(untaken)} of its weights have no place in {type(model).__name__} as its config describes it"
        raise LoadError(f"{folder}: {what}: {_few(untaken)}")


def _check_complete(folder: Path, model: Any, missing: set[str]) -> None:
    """A pooler that was never trained is taken out; anything else that is missing would run at random values."""
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        untrained = {name for name in missing if name.startswith("pooler.")}
        if untrained and untrained == {f"pooler.{name}" for name, _ in model.pooler.named_parameters()}:
            model.pooler = None
            missing = missing - untrained
    if missing:
        raise LoadError(f"{folder}: {len(missing)} tensors of {type(model).__name__} are not among its weights: {_few(missing)}")


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
