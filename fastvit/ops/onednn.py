"""oneDNN on x86 CPUs: whether it may and should serve a call, and its linear.

Bias and activation ride in its epilogue, and on AMD it outruns the MKL behind ``F.linear`` twofold. Its attention is
``onednn_attention``; ``onednn_operators`` makes operators of both, for compiled graphs; ``onednn_training`` has backward.

It may serve plain CPU tensors, float32 or (where the CPU multiplies it) bfloat16, run or compiled but not traced: its
operators have neither autograd nor batching rules, and an exported graph should not name them. Where a gradient is wanted,
it may serve linears in float32.
"""

import functools
import platform
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import onednn_attention
from ._inplace import activate
from ._state import compiled_autograd, dispatch_modes, exporting, forward_ad_active

# Multiplications below which oneDNN's 15 µs of setting up are not earned back (measured on AMD: even at 0.5–1 million).
MIN_PRODUCTS = 1_000_000

# The same in training, where an autograd Function of our own is to be earned back too; and rows of the input.
MIN_TRAINED_PRODUCTS, MIN_TRAINED_ROWS = 4_000_000, 16

# activation → the (attribute, algorithm) of mkldnn._linear_pointwise; not its relu, which makes zero of NaN
_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def serves_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether it may and should serve a linear on these tensors.

    Should: from MIN_PRODUCTS on, always on AMD and in bfloat16 (PyTorch's own goes there too, but without the epilogue); on
    Intel, where MKL is as fast, float32 only for the activation.
    """
    if _off() or not _plain((input, weight, bias)) or input.numel() * weight.shape[0] < MIN_PRODUCTS:
        return False
    vendor = cpu_vendor()
    mkl_as_fast = vendor == "intel" and weight.dtype == torch.float32
    if vendor == "other" or (mkl_as_fast and activation not in _ACTIVATIONS):
        return False
    return undisturbed()


def trains_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether it may and should serve, forward and backward, a linear on tensors of which a gradient is wanted."""
    if _off() or cpu_vendor() != "amd":
        return False
    products = input.numel() * weight.shape[0]
    if products < MIN_TRAINED_PRODUCTS or input.numel() < MIN_TRAINED_ROWS * input.shape[-1]:
        return False
    present = [t for t in (input, weight, bias) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in present):
        return False
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter) for t in present):
        return False
    return undisturbed() and (torch.compiler.is_compiling() or not (dispatch_modes() or compiled_autograd()))


def serves_attention(tokens: int, *tensors: Tensor | None) -> bool:
    """Whether ``onednn_attention`` may and should serve these: float32, on AMD, over so many queries and keys."""
    if _off() or tokens < onednn_attention.LEAST_TOKENS or any(t is not None and t.dtype != torch.float32 for t in tensors):
        return False
    return _plain(tensors) and cpu_vendor() == "amd" and undisturbed()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x·Wᵀ + b) for contiguous weights: any other layout falls to a oneDNN kernel a thousand times slower."""
    attribute, algorithm = _ACTIVATIONS.get(activation or "", ("none", ""))
    out = torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, attribute, [], algorithm)
    return out if activation in _ACTIVATIONS else activate(out, activation)


def _off() -> bool:
    return exporting() or not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu")


def _plain(tensors: Iterable[Tensor | None]) -> bool:
    """CPU tensors of a dtype that oneDNN multiplies, not empty, of which no gradient is wanted."""
    needs_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
        if tensor.dtype != torch.float32 and not (tensor.dtype == torch.bfloat16 and _multiplies_bfloat16()):
            return False
        if tensor.numel() == 0 or (needs_grad and tensor.requires_grad):
            return False
    return True


def _constant(function: Callable[[], Any]) -> Callable[[], Any]:
    """A function that a compiler asks once, while it traces, as ``torch.compiler.assume_constant_result`` has it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backend._why_not_gpu
    return function


@_constant
def cpu_vendor() -> str:
    """amd, intel or other; other also where the CPU lacks AVX2 or PyTorch lacks oneDNN."""
    return _read_cpu_vendor()


@functools.cache
def _read_cpu_vendor() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return "other"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "other"
    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            name += file.read(4096)
    except OSError:
        pass
    found = re.search("AuthenticAMD|GenuineIntel", name)
    return {"AuthenticAMD": "amd", "GenuineIntel": "intel"}[found.group()] if found else "other"


@_constant
def _multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@_constant
def undisturbed() -> bool:
    """Run or compiled, and not traced or transformed by anything."""
    return not (torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() or forward_ad_active())
