"""A pre-norm block with its linears in 8 bits: rounded in the norm before qkv, in the norm before fc1 and in fc1's epilogue.

On tokens, or on SAM's images (B, H, W, C), whose linears run on the image as it lies; padded tokens of windows get the bias of
qkv, which is what rounding makes of zeros. Two parts of a block are served, "qkv" (the projections of queries, keys and values)
and "mlp" (fc1 and fc2, and the gate of a gated MLP, which is rounded in the GLU). The attention's output projection keeps the
model's dtype: no pass before it could round its input on the way (docs/fp8.md). Inference only. The 8-bit weights lie beside the
module's own, which stay as they are.
"""

import ctypes
import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import functional
from ..ops import quantized
from ..reference_quantized import dequantize, hidden_scale, quantize_fitted
from . import branches, handoff, layouts
from .call import Call
from .operators import choose_backend, held_to
from .parts import Known, Layout, Parts, child, part
from .reading import layer_scale_of
from .sums import add

PARTS = ("qkv", "mlp")
ALIGNMENT = 16  # bytes of the loads, so elements of a row


def linears(layout: Layout, part_name: str) -> tuple[str, ...]:
    """Paths of the linears that make up a part; of an MLP, the one after the activation is the last."""
    if part_name == "qkv":
        return layout.attention.qkv
    mlp = layout.mlp
    return () if mlp is None else (mlp.fc1, *((mlp.gate,) if layout.gating == "beside" and mlp.gate else ()), mlp.fc2)


def why_not(block: nn.Module, layout: Any) -> str | None:
    """Why a served block keeps its own dtype, or None."""
    if not isinstance(layout, Layout):
        return "8-bit linears serve encoder blocks"
    if layout.post_norm:
        return "8-bit linears serve pre-norm blocks: after a sum, the norm's result is the residual too"
    if not layout.attention.qkv:
        return "8-bit linears need linears to take the weights of, which a torch.nn.MultiheadAttention has not"
    if layout.mlp is None or part(block, layout.mlp.hidden_norm) is not None:
        return "8-bit linears serve an MLP with nothing but an activation or a gate between its linears"
    owner = child(block, layout.attention.owner)
    if child(block, layout.attention.gate) is not None:
        return "8-bit linears serve no gated attention"
    if any(getattr(owner, name, None) is not None for name in layouts.SEPARATE_BIASES):
        return "8-bit linears serve no biases that are kept apart from their linear"
    paths = [path for name in PARTS for path in linears(layout, name)]
    called = [path for path in paths if path in layout.called]
    if called:
        return f"{called[0]} is no plain linear"
    odd = [path for path in paths if child(block, path).in_features % ALIGNMENT]
    return f"the inputs of {odd[0]} are not a multiple of {ALIGNMENT}" if odd else None


class Source:
    """A tensor that 8-bit weights were made of, by weak references: an address, or an ``id``, may come back with another."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.storage = weakref.ref(tensor), StorageWeakRef(tensor.untyped_storage())
        self.place = _place(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        same = self.tensor() is tensor and self.storage.cdata == tensor.untyped_storage()._cdata
        return same and self.place == _place(tensor)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False)
class CalibratedWeight:
    """What a linear's weight (N, K) was rounded to for inputs of a calibration.

    ``bits`` (N, K): the values as bytes, since e4m3 has no pickles. ``scale`` (N, 1). ``shift`` (N,): is added to the bias, so
    that outputs err by nothing in the mean. ``weights``, ``biases``: fingerprints by which those of the linear are known again,
    as they were and as half precisions round them.
    """

    dtype: torch.dtype
    bits: Tensor
    scale: Tensor
    shift: Tensor
    weights: frozenset[str]
    biases: frozenset[str]

    @classmethod
    def of(
        cls,
        weight: Tensor,
        dtype: torch.dtype,
        covariance: Tensor,
        mean: Tensor,
        rounded_mean: Tensor,
        bias: Tensor | None = None,
    ) -> "CalibratedWeight":
        """For inputs (..., K) of that mean (K,), and as rounded of that mean (K,) and covariance (K, K)."""
        values, scale = quantize_fitted(weight, dtype, covariance)
        shift = weight.float() @ mean - dequantize(values, scale) @ rounded_mean
        return cls(dtype, values.view(torch.uint8), scale, shift, _fingerprints(weight), _fingerprints(bias))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values (N, K) and scales (N, 1)."""
        return self.bits.to(device).view(self.dtype), self.scale.to(device)

    def bias(self, bias: Tensor | None, device: torch.device) -> Tensor:
        shift = self.shift.to(device)
        return shift if bias is None else bias.float() + shift

    def check(self, name: str, weight: Any, bias: Any = None) -> None:
        """Raises ``ValueError`` for another weight or bias, in any bit, than was calibrated or a cast to half precision makes."""
        same = isinstance(weight, Tensor) and self.bits.shape == weight.shape and _fingerprint(weight) in self.weights
        if not same or _fingerprint(bias) not in self.biases:
            raise ValueError(
                f"8 bits were calibrated for another weight or bias than {name} has now: call fastvit.quantization.accuracy"
                " again, and accelerate with what it returns"
            )


def _fingerprint(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    held = tensor.detach().to("cpu", torch.float32).contiguous()
    content = (ctypes.c_char * held.nbytes).from_address(held.data_ptr()) if held.nbytes else b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _fingerprints(tensor: Tensor | None) -> frozenset[str]:
    halves = [] if tensor is None else [tensor.to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    return frozenset(map(_fingerprint, [tensor, *halves]))


def bound_of_hidden(
    known: CalibratedWeight | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> Tensor | None:
    """``hidden_scale`` of a linear as it was rounded: a calibration moves weights by more than a rounding."""
    if known is not None:
        weight, bias = dequantize(*known.on(weight.device)), known.bias(bias, weight.device)
    return hidden_scale(weight, bias, norm_weight, norm_bias)


@dataclass
class Weights:
    """The 8-bit weights of one block, made when first called for and again when what they are made of has changed.

    ``calibrated``: linear → what its weight is rounded to, if not to the nearest; such a weight may not change. Copies and
    pickles of the block carry everything but what was ``made``. A compiled graph keeps the weights that it was traced with.
    """

    precision: str
    parts: frozenset[str]
    calibrated: dict[str, CalibratedWeight] = field(default_factory=dict)
    made: dict[str, tuple[list[Source], Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}}

    @property
    def dtype(self) -> torch.dtype:
        return quantized.FORMATS[self.precision]

    def of(self, path: str, linear: Any, layer_scale: Tensor | None = None) -> quantized.QuantizedWeight:
        def make(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> quantized.QuantizedWeight:
            known = self.calibrated.get(path)
            if known is None:
                return quantized.quantize_weight(weight, self.dtype, bias, scale)
            if not torch.compiler.is_compiling():
                known.check(path, weight, bias)
            bias, rounded = known.bias(bias, weight.device), known.on(weight.device)
            return quantized.quantize_weight(weight, self.dtype, bias, scale, rounded)

        return self._made(path, make, linear.weight, linear.bias, layer_scale)

    def hidden_scale(self, path: str, linear: Any, norm: Any) -> Tensor | None:
        """What a hidden layer made by ``linear`` of ``norm``'s result is scaled by, as far as that is known beforehand; in a
        graph what an earlier call found."""
        name = f"{path}: hidden"
        if self.dtype != quantized.E4M3 or (torch.compiler.is_compiling() and name not in self.made):
            return None
        return self._made(
            name, partial(bound_of_hidden, self.calibrated.get(path)), linear.weight, linear.bias, norm.weight, norm.bias
        )

    def _made(self, name: str, make: Callable[..., Any], *tensors: Tensor | None) -> Any:
        found = self.made.get(name)
        if torch.compiler.is_compiling():
            return make(*tensors) if found is None else found[1]
        sources = [t for t in tensors if t is not None]
        if found is None or len(found[0]) != len(sources) or not all(map(Source.is_still, found[0], sources)):
            with torch.inference_mode(False), torch.no_grad():
                made = make(*tensors)
            found = self.made[name] = [Source(tensor) for tensor in sources], made
        return found[1]


def why_not_now(
    block: nn.Module, layout: Layout, weights: Weights, call: Call, pinned: str = "auto", known: Known | None = None
) -> str | None:
    """Why a block served in 8 bits must run its own forward this time, or None."""
    x, name = call.hidden, weights.precision.upper()
    if block.training:
        return f"{name} is for inference: call model.eval()"
    drop = _dropping(Parts(block, None if known is None else known.children), layout)
    if drop is not None:
        return f"{name} is for inference, and {drop} is in training mode: call model.eval()"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return f"{name} has no gradients: call the model under torch.no_grad() or torch.inference_mode()"
    if torch.is_autocast_enabled(x.device.type):
        return f"{name} does not run under autocast: give the model a half-precision dtype"
    reason = quantized.why_not(weights.precision, x.device)
    if reason is None and choose_backend(pinned, x) != "triton":
        reason = "its backend is PyTorch's operators"
    return None if reason is None else f"{name} cannot serve it on {x.device}: {reason}"


def _dropping(parts: Parts, layout: Layout) -> str | None:
    """The path of a dropout or of a stochastic depth that is in training mode, which it can be by itself; or None."""
    mlp, residuals = layout.mlp, layout.residuals
    paths = [*layout.attention.drop, *(path for residual in residuals for path in (residual.drop, residual.drop_path))]
    paths += [] if mlp is None else [mlp.hidden_drop, *mlp.drop]
    for path in paths:
        drop = parts.part(path) if path else None
        if drop is not None and drop.training:
            return path
    return None


def compute(
    block: nn.Module, layout: Layout, weights: Weights, call: Call, pinned: str = "auto", known: Known | None = None
) -> Tensor:
    """The block's output for a call that ``why_not_now`` admits; ``known``: descendants looked up before."""
    with held_to(pinned):
        return _pre_norm(Parts(block, None if known is None else known.children), layout, weights, call)


def _pre_norm(parts: Parts, layout: Layout, weights: Weights, call: Call) -> Tensor:
    x = call.hidden
    before, after = parts.child(layout.norms.before), parts.child(layout.norms.after)
    scale, mlp_scale = (layer_scale_of(parts, residual.scale) for residual in layout.residuals)
    offered = handoff.collect(x, before)
    if "qkv" in weights.parts:
        normed: Any = quantized.layer_norm(x, before.weight, before.bias, before.eps, weights.dtype)
    else:
        normed = functional.layer_norm(x, before.weight, before.bias, before.eps) if offered is None else offered
    branch = branches.attention(parts, layout, _Operators(parts, layout, weights), normed, call)
    if "mlp" not in weights.parts:
        normed, x = functional.add_layer_norm(x, branch, after.weight, after.bias, after.eps, layer_scale=scale)
        return add(x, branches.mlp(parts, layout, functional, normed), mlp_scale, owned=False)
    normed, x = quantized.add_layer_norm(x, branch, after.weight, after.bias, after.eps, weights.dtype, scale)
    fc2 = linears(layout, "mlp")[-1]
    return quantized.linear(
        _hidden(parts, layout, weights, normed, x.dtype), weights.of(fc2, parts.child(fc2), mlp_scale), x.dtype, residual=x
    )


def _hidden(parts: Parts, layout: Layout, weights: Weights, x: quantized.Quantized, dtype: torch.dtype) -> quantized.Quantized:
    """What fc2 is given."""
    fc1, *gates, _ = linears(layout, "mlp")
    weight = weights.of(fc1, parts.child(fc1))
    if layout.gating is None:
        given = weights.hidden_scale(fc1, parts.child(fc1), parts.child(layout.norms.after))
        return quantized.linear_quantized(x, weight, layout.activation, given)
    value = quantized.linear(x, weight, dtype)
    if gates:
        gate = quantized.linear(x, weights.of(gates[0], parts.child(gates[0])), dtype)
    else:
        first, last = value.chunk(2, dim=-1)
        gate, value = (first, last) if layout.gating == "first" else (last, first)
    return quantized.glu(gate, value, layout.activation or "silu", weights.dtype)


class _Operators:
    """``fastvit.functional``, whose linears take what was rounded to 8 bits as well."""

    def __init__(self, parts: Parts, layout: Layout, weights: Weights):
        self.parts, self.layout, self.weights = parts, layout, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def linear(self, x: Any, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
        if not isinstance(x, quantized.Quantized):
            return functional.linear(x, weight, bias, activation=activation)
        projections = [(path, self.parts.child(path)) for path in self.layout.attention.qkv]
        path, projection = next((p, m) for p, m in projections if m.weight is weight and m.bias is bias)  # weights may be tied
        return quantized.linear(x, self.weights.of(path, projection), weight.dtype, activation)
