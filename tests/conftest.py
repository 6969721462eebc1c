"""One harness for both worlds: on a machine with a GPU the tests run on it, everywhere else in Triton's interpreter.

``TRITON_INTERPRET`` is read when Triton is first imported, so it is set here, before any test module loads.
"""

import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if ON_GPU:
    torch.backends.cudnn.allow_tf32 = False  # a patch embedding rounded to 10 bits would hide what the tests compare
else:
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# Imported below the switch on purpose.
import fastvit  # noqa: E402

if not ON_GPU:
    from tests.interpreter import repair

    repair()

from fastvit._torchvision import ensure_importable  # noqa: E402

ensure_importable()


in_the_interpreter = pytest.mark.skipif(ON_GPU, reason="kernels are run on CPU tensors, which only the interpreter does")


@pytest.fixture
def device() -> str:
    """Where the kernels run: the GPU, or the CPU by way of the interpreter."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    """Runs the test once on each backend."""
    with fastvit.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_backend():
    """Runs the test on the kernels alone."""
    with fastvit.use_backend("triton"):
        yield


@pytest.fixture
def poisoned_memory():
    """Fresh tensors come filled with NaN (integers with their largest value), so an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tapes(monkeypatch):
    """Lets tapes stand in for CUDA graphs, on the CPU."""
    from fastvit.graphs import recorder
    from tests.tapes import TapeRecorder

    monkeypatch.setattr(TapeRecorder, "fails", None)
    monkeypatch.setitem(recorder.RECORDERS, "cpu", TapeRecorder)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_gpu_for_all():
    """A kernel that breaks the device fails its own test, not the worker's next ones; much memory is not kept from the others."""
    yield
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(error, file=sys.__stderr__, flush=True)
        os._exit(1)  # nothing more runs on the GPU in this process; another takes its place
    if torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()
