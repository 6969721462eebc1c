"""CPU time between calling an operator, or a block, and its kernels being enqueued, on a machine without a GPU.

    python benchmarks/overhead.py                    # a table of microseconds on the terminal
    python benchmarks/overhead.py --rounds 40 --json overhead.json

The Triton backend runs whole: checks, dispatch, autograd, launch configs, kernels compiled for sm_90, Triton's binder and its
compiled launcher. Replaced is the GPU below it: ``libcuda.so.1`` is a stub, built here with the C compiler that Triton
needs anyway, whose functions do nothing and succeed; tensors are small ones on the CPU that say they are on a GPU. What this
leaves out: the driver's own launch (some 2 µs each), and the difference between PyTorch's allocators. What it puts in:
PyTorch's own operators compute on those small tensors (float16, oneDNN off) where a GPU build would launch a kernel of
its own, so the time of an original block stands for its launches, not for its kernels.

A model of twelve blocks is timed whole as well, also under ``accelerate(cuda_graphs=True)`` with a stand-in for the graph whose
replay does nothing: what a replayed call costs beside the graph's own launch.

Everything compared takes turns within one process, and the first calls, which compile, are not counted.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Only what Triton's launcher calls, its prototypes reduced to what the stub touches.
STUB = r"""
#include <string.h>
typedef unsigned long long u64;
typedef struct { int id, pad; char value[64]; } attribute;
typedef struct { unsigned grid[3], block[3], shared; void *stream; attribute *attributes; unsigned count; } config;
static long launches = 0, dependent = 0;
long fastvit_launches(void) { return launches; }
long fastvit_dependent_launches(void) { return dependent; }
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stub"; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuStreamIsCapturing(void *s, int *v) { *v = 0; return 0; }
int cuCtxGetLimit(u64 *v, int l) { *v = 0; return 0; }
int cuCtxSetLimit(int l, u64 v) { return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void *f, int c) { return 0; }
int cuModuleLoadData(void **m, const void *i) { *m = (void *)1; return 0; }
int cuModuleUnload(void *m) { return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)1; return 0; }
int cuPointerGetAttribute(void *out, int a, u64 p) { memcpy(out, &p, 8); return 0; }
int cuPointerGetAttributes(unsigned n, int *a, void **out, u64 p) { memcpy(out[0], &p, 8); return 0; }
int cuLaunchKernelEx(const config *c, void *f, void **p, void **e) {
  launches++;
  for (unsigned i = 0; i < c->count; i++) dependent += c->attributes[i].id == 6; /* programmatic stream serialization */
  return 0;
}
int cuLaunchKernel() { launches++; return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, const void *c) { *n = 1; return 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
"""


def pretend_gpu(folder: str) -> Callable[[], tuple[int, int]]:
    """Puts a stub in the place of the CUDA driver, and lets CPU tensors pass for a GPU's; returns what counts launches: all
    so far, and those of them that the driver was asked to make dependent ones.

    To be called before Triton's driver is first used. For this process alone, which can compute nothing on Triton any more.
    """
    source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
    source.write_text(STUB)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    os.environ.pop("TRITON_INTERPRET", None)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for count in (stub.fastvit_launches, stub.fastvit_dependent_launches):
        count.restype = ctypes.c_long

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    pretend_tensors()
    return lambda: (stub.fastvit_launches(), stub.fastvit_dependent_launches())


def pretend_tensors() -> None:
    """Lets CPU tensors pass for tensors on GPU 0, an sm_90 that Triton serves."""
    import torch
    from fastvit.kernels import _launch

    import fastvit.backend

    fastvit.backend._gpu_reasons[0] = None
    torch.Tensor.is_cuda = True
    torch.Tensor.get_device = lambda self: 0
    torch.cuda.current_device = lambda: 0
    _launch._recorded_target = "sm_90"


def operators() -> dict[str, Callable[[], object]]:
    """One call of each operator, on small tensors of the same strides as in a model."""
    import torch

    from fastvit import functional as F

    def fresh(*shape: int):
        return torch.randn(*shape, dtype=torch.float16)

    x, branch = fresh(1, 4, 32), fresh(1, 4, 32)
    weight, bias, scale = fresh(32), fresh(32), fresh(32)
    w1, b1, w2 = fresh(128, 32), fresh(128), fresh(32, 128)
    q, k, v = fresh(1, 4, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    image, pad, hidden = fresh(1, 2, 2, 96), fresh(96), fresh(1, 4, 128)
    tables = dict(rel_pos_h=fresh(3, 16), rel_pos_w=fresh(3, 16))
    cos, sin, mask = torch.randn(4, 16), torch.randn(4, 16), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    training = trained()
    return {
        "layer_norm": lambda: F.layer_norm(x, weight, bias),
        "add_layer_norm": lambda: F.add_layer_norm(x, branch, weight, bias, layer_scale=scale),
        "linear + gelu": lambda: F.linear(x, w1, b1, activation="gelu"),
        "mlp": lambda: F.mlp(x, w1, b1, w2, bias),
        "attention": lambda: F.attention(q, k, v),
        "attention, mask": lambda: F.attention(q, k, v, mask),
        "image_attention, windows": lambda: F.image_attention(image, num_heads=2, window_size=2, pad_qkv=pad, **tables),
        "glu": lambda: F.glu(*hidden.chunk(2, dim=-1)),
        "qk_norm_rope": lambda: F.qk_norm_rope(q, k, cos, sin),
        "rotary_attention": lambda: F.rotary_attention(q, k, v, cos, sin),
        **{f"{name}, training": call for name, (call, _) in training.items()},
        **{f"{name}, backward": backward(*case) for name, case in training.items()},
    }


Trained = dict[str, tuple[Callable[[], Any], tuple]]


def trained() -> Trained:
    """One forward call of each operator that has a backward, and the leaves that want a gradient."""
    import torch

    from fastvit import functional as F

    def fresh(*shape: int):
        return torch.randn(*shape, dtype=torch.float16).requires_grad_()

    x, weight, bias, scale = fresh(1, 4, 32), fresh(32), fresh(32), fresh(32)
    w1, b1, w2, image, pad, hidden = fresh(128, 32), fresh(128), fresh(32, 128), fresh(1, 2, 2, 96), fresh(96), fresh(1, 4, 128)
    gate, value = (t.detach().requires_grad_() for t in hidden.chunk(2, dim=-1))
    q, k, v = (t.detach().requires_grad_() for t in fresh(1, 4, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0))
    branch, cos, sin = fresh(1, 4, 32).detach(), torch.randn(4, 16), torch.randn(4, 16)
    norm, up, down = (weight, bias), (w1, b1), (w2, bias)
    return {
        "layer_norm": (lambda: F.layer_norm(x, *norm), (x, *norm)),
        "add_layer_norm": (lambda: F.add_layer_norm(x, branch, *norm, layer_scale=scale)[0], (x, *norm, scale)),
        "linear + gelu": (lambda: F.linear(x, *up, activation="gelu"), (x, *up)),
        "mlp": (lambda: F.mlp(x, *up, *down), (x, *up, *down)),
        "attention": (lambda: F.attention(q, k, v), (q, k, v)),
        "image_attention, windows": (lambda: F.image_attention(image, num_heads=2, window_size=2, pad_qkv=pad), (image, pad)),
        "glu": (lambda: F.glu(gate, value), (gate, value)),
        "qk_norm_rope": (lambda: F.qk_norm_rope(q, k, cos, sin)[0], (q, k)),
    }


def backward(call: Callable[[], Any], leaves: Iterable[Any]) -> Callable[[], object]:
    """The backward pass of a call alone, that of PyTorch's autograd engine included."""
    import torch

    graph: list[Any] = []

    def run():
        if not graph:
            out = call()
            graph.extend((out, tuple(leaves), torch.ones_like(out)))
        return torch.autograd.grad(*graph, retain_graph=True)

    return run


def _vit(**sizes: int | float):
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=32, num_heads=2, **sizes).half().eval()


@contextlib.contextmanager
def autocast(dtype: Any) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)``, for tensors that only say they are on a GPU too."""
    import torch

    before = torch.get_autocast_dtype("cuda")
    with torch.autocast("cpu", dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)


def blocks() -> dict[str, Callable[[], object]]:
    """Two timm ViT blocks: as they were, and accelerated on either backend, each in inference, in training, in training under
    autocast with float32 weights, and in training with stochastic depth."""
    import torch

    import fastvit

    calls: dict[str, Callable[[], object]] = {}
    x = torch.randn(1, 4, 32, dtype=torch.float16)
    for name, backend in (("original", None), ("torch", "torch"), ("triton", "auto")):

        def made(backend=backend, **sizes):
            model = _vit(num_classes=0, **sizes)
            return model if backend is None else fastvit.accelerate(model, backend=backend)

        inner, mixed, deep = (
            made(depth=2).blocks,
            made(depth=2).float().blocks,
            made(depth=3, drop_path_rate=0.2).train().blocks[1:],
        )

        def infer(inner=inner):
            with torch.no_grad():
                return inner(x)

        def train(inner, x):
            return inner(x)

        def train_mixed(inner, x):
            with autocast(torch.float16):
                return inner(x)

        calls[f"block, {name}"] = infer
        ways = (
            ("", inner, x, train),
            (" under autocast", mixed, x.float(), train_mixed),
            (" with stochastic depth", deep, x, train),
        )
        for way, inner, given, run in ways:
            leaf = given.clone().requires_grad_()
            calls[f"block, {name}, training{way}"] = forward = functools.partial(run, inner, leaf)
            calls[f"block, {name}, backward{way}"] = backward(forward, (leaf, *inner.parameters()))
    return calls


class StandIn:
    """In the place of ``fastvit.graphs.recorder.CudaRecorder``: the result of a replay is that of the recording."""

    def __init__(self, device: object):
        self.running = contextlib.nullcontext()

    @staticmethod
    def busy() -> bool:
        return False

    def turn(self, tensors: object) -> contextlib.AbstractContextManager:
        return self.running

    def record(self, function: Callable[[], object]) -> tuple[Callable[[], None], object]:
        return (lambda: None), function()


def models() -> dict[str, Callable[[], object]]:
    """A ViT of twelve blocks, images to classes, in inference."""
    import torch

    import fastvit
    from fastvit.graphs.recorder import RECORDERS

    RECORDERS["cpu"] = StandIn
    calls: dict[str, Callable[[], object]] = {}
    image = torch.randn(1, 3, 8, 8, dtype=torch.float16)
    for name, options in (("original", None), ("triton", {}), ("triton, graphed", {"cuda_graphs": True})):
        made = _vit(depth=12, num_classes=4)
        if options is not None:
            fastvit.accelerate(made, **options)

        def infer(made=made):
            with torch.no_grad():
                return made(image)

        calls[f"model, {name}"] = infer
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a call, one number a round; the calls take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            samples[name].append((time.thread_time() - start) / repeats * 1e6)
    gc.enable()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of every call (default 20)")
    parser.add_argument("--repeats", type=int, default=200, help="calls a turn (default 200)")
    parser.add_argument("--json", help="also write every number to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launches = pretend_gpu(folder)
        import torch

        from fastvit import use_backend
        from fastvit._torchvision import ensure_importable

        ensure_importable()
        torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = False
        with use_backend("auto"):
            calls, per_call = {**operators(), **blocks(), **models()}, {}
            for name, call in calls.items():
                for _ in range(4):
                    call()
                before = launches()
                call()
                per_call[name] = [after - first for first, after in zip(before, launches(), strict=True)]
            samples = measure(calls, args.rounds, args.repeats)
    rows = {}
    for name, values in samples.items():
        share = 2 if name.startswith("block") else 1  # two blocks a call, for what one hands to the next
        rows[name] = {
            "min": min(values) / share,
            "median": statistics.median(values) / share,
            "launches": per_call[name][0] / share,
            "dependent": per_call[name][1] / share,
        }
    print(f"{'':48}{'min µs':>9}{'median µs':>11}{'Triton launches':>17}{'dependent':>11}")
    for name, row in rows.items():
        print(f"{name:48}{row['min']:9.1f}{row['median']:11.1f}{row['launches']:17.3g}{row['dependent']:11.3g}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
