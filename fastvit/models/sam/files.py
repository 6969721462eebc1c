"""The files that hold Segment Anything's weights, all of them untrusted: pickles are read as tensors alone, an index of shards
leads to its own folder only, and what is damaged, unsafe or something else is refused in one line."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model", "state_dict")  # under which training scripts keep a state dict


class CheckpointError(ValueError):
    """Weights that cannot be read, or that are no Segment Anything; the message is one line with the file and the reason."""


def locate(name: str | os.PathLike[str]) -> Path | None:
    """The file or folder of that name, ``~`` being its user's; None where there is none. Raises ``CheckpointError``."""
    try:
        path = Path(name).expanduser()
        return path if path.is_file() or path.is_dir() else None
    except RuntimeError as error:  # the ~ of somebody who is not there
        raise CheckpointError(f"{shown(name)}: no such folder ({_one_line(error)})") from error
    except OSError as error:  # too long a name, a folder that may not be entered
        raise CheckpointError(f"{shown(name)}: cannot be looked for ({error.strerror or error})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict in a folder, from one file or from the shards that an index names. Raises ``CheckpointError``."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise CheckpointError(f"{folder}: holds none of {', '.join(WEIGHTS)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, each from its shard: a file that lies beside the index, and no other."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map, an object that says in which file each tensor lies")
    for place in places.values():
        # A Windows path knows both separators, and drives.
        if not isinstance(place, str) or place in ("", "..") or PureWindowsPath(place).name != place:
            raise CheckpointError(f"{index}: says that weights lie in {repr(place)[:100]}; expected the name of a file beside it")
        if not (index.parent / place).is_file():
            raise CheckpointError(f"{index}: says that weights lie in {place[:100]}, which is not there")
    found: dict[str, Tensor] = {}
    for place in sorted(set(places.values())):
        shard, named = read_file(index.parent / place), {name for name, other in places.items() if other == place}
        if odd := shard.keys() ^ named:
            raise CheckpointError(f"{index.parent / place}: does not hold what {index.name} says that it does: {few(odd)[:300]}")
        found |= shard
    return found


def read_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a file. Raises ``CheckpointError``."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path}: may not be read ({error.strerror or error})") from error
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: holds no state dict, for its {str(key)[:100]!r} is no floating-point tensor")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"laid out as {tensor.layout}"
            raise CheckpointError(f"{path}: its {key[:100]!r} is a tensor {kind}; expected a dense one")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: is damaged, for its {key!r} has more elements than it stores")
    return dict(content)


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = "is a damaged pickle, or one of more than tensors, which could run code: it is refused"
        raise CheckpointError(f"{path}: {reason}") from error
    except Exception as error:  # torch.load raises half a dozen kinds over damaged files
        raise CheckpointError(f"{path}: is damaged, or no file of torch.save ({_one_line(error)})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own, OSError, ValueError
        raise CheckpointError(f"{path}: is damaged, or no safetensors file ({_one_line(error)})") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}, so it is no folder of a saved model") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({_one_line(error)})") from error


def fetch(name: str) -> Path:
    """The folder in Hugging Face's cache with a repository's config and weights."""
    if not HUB_ID.fullmatch(name) or Path(name).suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise CheckpointError(f"{shown(name)!r}: no such file or folder")
    try:
        import huggingface_hub

        for weights in WEIGHTS:
            stem, suffix = os.path.splitext(weights)
            files = [weights, f"{weights}.index.json", f"{stem}-*-of-*{suffix}"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json", *files]))
            if any((folder / file).is_file() for file in files[:2]):
                break
    except ImportError as error:
        raise CheckpointError(f"{name}: fetching it needs huggingface_hub: pip install 'fastvit[models]'") from error
    except Exception as error:  # of the network, of the Hub, of the disk
        raise CheckpointError(
            f"{name}: no such file or folder, and not to be had from the Hugging Face Hub ({type(error).__name__})"
        ) from error
    return folder


def shown(name: str | os.PathLike[str]) -> str:
    """A name for a message."""
    text = os.fspath(name)
    return text if len(text) <= 200 else text[:200] + "…"


def few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200].rstrip() + " …"
