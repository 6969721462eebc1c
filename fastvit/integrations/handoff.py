"""The first norm of a block, computed in the kernel that ends the block before it.

Block i ends with a sum, block i+1 begins with that sum's LayerNorm: one ``add_layer_norm`` gives both. The normalized
tensor waits in a slot of the running thread, and block i+1 takes it only when it is given the very same tensor, unchanged
(its version counter stands still), and has the very same norm. Anything in between (a hook that returns another tensor, a
sum in place, a replaced norm, another thread) makes it compute the norm itself: right results, one kernel more.
Inference only; on the torch backend nothing would be gained.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .parts import parameter

BACKENDS = ("triton",)  # where it gains something; tests widen it
_slot = threading.local()


class _Offer:
    """``normalized`` = norm(total), let go as soon as ``total`` dies."""

    def __init__(self, total: Tensor, norm: nn.LayerNorm, normalized: Tensor):
        self.normalized: Tensor | None = normalized
        self.total = weakref.ref(total, self._forget)
        self.norm = weakref.ref(norm)
        self.state = _state(total, norm)

    def _forget(self, _: Any) -> None:
        self.normalized = None


def _state(total: Tensor, norm: nn.LayerNorm) -> tuple:
    """What must not have changed between the offer and its use."""
    affine = tuple((id(t), 0 if t.is_inference() else t._version) for t in (norm.weight, norm.bias) if t is not None)
    return total._version, norm.eps, affine


def possible(backend: str, residual: Tensor, branch: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether a block may end with the next block's norm."""
    if torch.compiler.is_compiling() or backend not in BACKENDS or torch.is_grad_enabled():
        return False
    device_type = "cuda" if residual.is_cuda else residual.device.type
    if torch.is_autocast_enabled(device_type) or branch.dtype != residual.dtype:
        return False
    if "forward" in norm.__dict__ or norm._forward_pre_hooks or norm._forward_hooks:
        return False
    for tensor in (parameter(norm, "weight"), parameter(norm, "bias")):
        if tensor is None:
            continue
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device == residual.device
        if not plain or tensor.untyped_storage().size() == 0:  # sharded away or offloaded until its block runs
            return False
    return True


def add_layer_norm(ops: Any, residual: Tensor, branch: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
    """residual + scale·branch, its norm being left for the block that comes next."""
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    with versioned():
        normalized, total = ops.add_layer_norm(residual, branch, weight, bias, norm.eps, layer_scale=scale)
    return leave(normalized, total, norm)


def versioned() -> AbstractContextManager:
    """Tensors made in inference mode have no version counter to tell a change by; made within this, they have."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


def leave(normalized: Tensor, total: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``total``, its norm being left for the block that comes next."""
    _slot.offer = _Offer(total, norm, normalized)
    return total


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def collect(x: Tensor, norm: Any) -> Tensor | None:
    """norm(x) where the block before left it for exactly this tensor and norm, otherwise None."""
    if torch.compiler.is_compiling():
        return None
    offer = _slot.__dict__.pop("offer", None)
    if offer is None or offer.total() is not x or offer.norm() is not norm or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type) or offer.state != _state(x, norm):
        return None
    return offer.normalized
