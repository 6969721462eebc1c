"""What stands between a call and its kernels: modes, transforms, traces, compilers, and gradients that are wanted."""

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class _Kernels:
    """The modules of ``fastvit.kernels`` by name, imported when first used: they need Triton, this package does not."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(f"..kernels.{name}", __package__)
        setattr(self, name, module)
        return module


kernels = _Kernels()

dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
transforms, tracing, profiling = (
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
)


def exporting() -> bool:
    """Whether ``torch.export`` is at work: by the flag behind ``torch.compiler.is_exporting()``, which PyTorch 2.11 takes for
    true in whatever ``torch.compile`` traces."""
    return torch.compiler._is_exporting_flag


def untransformed() -> bool:
    """Whether no mode, transform or trace makes something else of what PyTorch's operators are given. A mode for
    its functions does not: kernels are none."""
    return not (dispatch_modes() or transforms() or tracing() is not None)


def nothing_between() -> bool:
    """Whether no mode, transform, trace or profile stands between an operator's call and its kernel."""
    return not (dispatch_modes() or function_modes() or transforms() or profiling() or tracing() is not None)


def direct(*args: Any) -> bool:
    """Whether PyTorch's dispatcher would do no more than call the kernel: nothing between them, and plain tensors."""
    return not torch.compiler.is_compiling() and nothing_between() and plain(*args)


def plain(*args: Any) -> bool:
    """Whether the tensors among the arguments are PyTorch's own, read as they lie in memory."""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is nn.Parameter:
            if arg.is_neg():  # negated when read, which kernels do not know
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


def compiled_autograd() -> bool:
    """Whether compiled autograd is on by now; whether it will be in backward cannot be known."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and getattr(module, "compiled_autograd_enabled", False)


def forward_ad_active() -> bool:
    return forward_ad._current_level >= 0


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether to go through the Function: a gradient is wanted, or a ``torch.func`` transform or forward-mode
    differentiation, which the Function refuses and the raw operators would ignore, hides whether one is. In inference mode
    none is, also where gradients are enabled within it: autograd records nothing there."""
    if not torch.compiler.is_compiling() and (transforms() or forward_ad._current_level >= 0):
        return True
    if torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()):
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
