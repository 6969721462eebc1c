"""Which implementation serves an operator: ``triton`` (the kernels), ``torch`` (PyTorch's own operators) or ``auto``.

``auto`` gives Triton to a GPU that Triton serves (and call by call the vendor's operator, where a rule of the tuning table says
that it is faster) and PyTorch to everything else. The choice is process-wide; ``with use_backend("triton"):`` scopes it and
``FASTVIT_BACKEND`` sets where it starts.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "triton", "torch")
MIN_COMPUTE_CAPABILITY = (8, 0)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_current = _checked(os.environ.get("FASTVIT_BACKEND", "auto"), "FASTVIT_BACKEND")
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


class _Thread(threading.local):
    """A backend for the running thread alone, which goes before that of the process."""

    backend: str | None = None


_thread = _Thread()


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"torch"``."""
    # torch.compile does not trace thread-local state.
    return _current if torch.compiler.is_compiling() else _thread.backend or _current


def set_backend(name: str) -> None:
    """Sets the backend for the whole process. Raises ``ValueError`` for an unknown name."""
    global _current
    _current = _checked(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Scopes the backend: ``with fastvit.use_backend("torch"): ...``. Raises ``ValueError`` for an unknown name."""
    previous = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@contextmanager
def use_backend_in_thread(name: str) -> Iterator[None]:
    """``use_backend`` for the running thread alone, as a model pinned to a backend needs it; not traced by compilers."""
    previous = _thread.backend
    _thread.backend = _checked(name, "backend")
    try:
        yield
    finally:
        _thread.backend = previous


def why_not_triton(device: torch.device) -> str | None:
    """None when the Triton kernels can run on ``device``, otherwise the reason why they cannot."""
    if device.type == "cpu":
        return None if _interpreted else "a CPU runs Triton kernels only in the interpreter (set TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"no Triton kernels for device type {device.type!r}"
    return _why_not_gpu(0 if device.index is None else device.index)


def _why_not_gpu(index: int) -> str | None:
    if index not in _gpu_reasons:
        _gpu_reasons[index] = _probe_gpu(index)
    return _gpu_reasons[index]


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo (which imports Triton).
_why_not_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_reasons: dict[int, str | None] = {}


def _probe_gpu(index: int) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_COMPUTE_CAPABILITY:
        needs, has = (".".join(map(str, pair)) for pair in (MIN_COMPUTE_CAPABILITY, capability))
        return f"Triton needs compute capability {needs}, this GPU has {has}"
    return None


def resolve(tensor: torch.Tensor, *, setting: str | None = None) -> str:
    """``"triton"`` or ``"torch"`` for an operator on ``tensor``; ``setting``: a backend to go by instead of the one in force.

    Where ``auto`` gives ``"triton"``, rules may still hand single calls to the vendor's operators (``ops.dispatch``).

    Raises ``ValueError`` when ``triton`` was asked for by name and cannot serve the tensor's device or dtype.
    """
    setting = setting or get_backend()
    if setting == "torch" or (setting == "auto" and not tensor.is_cuda):
        return "torch"
    reason = _why_not_gpu(tensor.get_device()) if tensor.is_cuda else why_not_triton(tensor.device)
    if reason is None and tensor.dtype == torch.float64:
        reason = "the kernels compute in float32, which would lose a float64 input's precision"
    if reason is None:
        return "triton"
    if setting == "triton":
        raise ValueError(f"backend 'triton' cannot serve a {tensor.dtype} tensor on {tensor.device}: {reason}")
    return "torch"
