"""What records CUDA graphs: streams and pools with a log in the place of a GPU, and the graphs themselves where there is one."""

import contextlib
import gc
import itertools
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import fastvit
from fastvit.graphs import recorder
from tests.models_for_acceleration import hf_vit, image, tensor_of, timm_vit
from tests.tapes import Probe, call, graphed, outcome, recorded


class Cuda:
    """What ``CudaRecorder`` asks of ``torch.cuda``, with a log in the place of a GPU."""

    def __init__(self, fails_in_capture=False):
        self.log, self.streams, self.current, self.fails = [], itertools.cycle(range(1, 33)), None, fails_in_capture
        log, handles = self.log, itertools.count(1)
        self.CUDAGraph = type("CUDAGraph", (), {"replay": lambda graph: log.append("replay")})
        self.graph_pool_handle = lambda: (0, next(handles))
        self.synchronize = lambda device: self.log.append("synchronize")

    def Stream(self, device):
        stream = Stream(next(self.streams))
        stream.wait_stream = lambda other: self.log.append(f"{stream} waits for {other}")
        return stream

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        before, self.current = self.current, stream
        self.log.append(f"captures on {stream} in {pool}, {capture_error_mode}")
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")  # the stream stays current
        self.current = before


class Stream:
    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return self.number

    def __repr__(self):
        return f"stream {self.number}"


def test_the_recorder_orders_streams_and_survives_a_failed_capture(monkeypatch):
    monkeypatch.setattr(recorder.torch, "cuda", cuda := Cuda())
    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: ended.append("ended"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: ended.append("released"), raising=False)
    one, other = (recorder.CudaRecorder(torch.device("cuda", 0)) for _ in range(2))
    assert one.stream != other.stream
    for _ in range(40):  # streams of recorders that are gone are taken again
        recorder.CudaRecorder(torch.device("cuda", 0))
    caller, another = cuda.Stream(0), cuda.Stream(0)
    tensor = SimpleNamespace(record_stream=lambda stream: cuda.log.append(f"input on {stream}"))
    runs = []
    cuda.current = caller
    with one.turn([tensor]):
        replay, result = one.record(lambda: runs.append((cuda.current, gc.isenabled())) or "result")
    assert (runs, result) == ([(caller, True), (caller, True), (one.stream, False)], "result")
    assert gc.isenabled()
    assert cuda.log == [f"input on {caller}", f"captures on {one.stream} in {one.pool}, thread_local"]
    cuda.log.clear()
    for stream in (caller, another, another):
        cuda.current = stream
        with one.turn([tensor]):
            replay()
    turns = [[f"input on {stream}", "replay"] for stream in (caller, another, another)]
    assert cuda.log == [*turns[0], f"{another} waits for {caller}", *turns[1], *turns[2]]
    assert not ended

    pool = one.pool  # shared while a graph of it lives; after the last one PyTorch takes it for no other
    another_replay = one.record(lambda: None)
    assert one.pool == pool
    del replay, another_replay
    one.record(lambda: None)
    assert one.pool != pool

    cuda.fails, before = True, other.stream
    cuda.current = caller
    with pytest.raises(RuntimeError, match="previous error during capture"), other.turn([tensor]):
        other.record(lambda: None)
    assert cuda.current is caller
    assert ended == ["ended", "released"]
    assert other.stream not in (before, one.stream)
    assert not recorder._recording.locked()


# --- on a GPU -------------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs, which needs a GPU")


def half(model):
    return model.half().cuda()


def near(actual, expected):
    """Equal but for the rounding of another algorithm, which a library may pick for a captured call."""
    eps = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, atol=max(eps, 1e-5), rtol=max(eps, 1e-5))


@on_gpu
@pytest.mark.parametrize("options", [{}, {"backend": "triton"}, {"backend": "torch"}], ids=["auto", "triton", "torch"])
@pytest.mark.parametrize("build", [hf_vit, timm_vit])
def test_gpu_results_over_changing_batches(build, options):
    model = fastvit.accelerate(half(build()), **options)
    inputs = [image(batch, seed=seed).half().cuda() for seed in range(6) for batch in (1, 2, 5)]
    expected = [tensor_of(call(model, x)) for x in inputs]
    fastvit.accelerate(model, cuda_graphs=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = [tensor_of(call(model, x)) for x in inputs]
    assert outcome(model) == "3 recorded; its last call was replayed"
    for ours, theirs in zip(actual, expected, strict=True):
        near(ours, theirs)


@on_gpu
def test_gpu_autocast_and_weights_that_change():
    model, x = graphed(timm_vit().cuda()), image().cuda()
    plain = fastvit.accelerate(timm_vit().cuda())

    def same(**autocast):
        with torch.autocast("cuda", **autocast):
            near(call(model, x), call(plain, x))

    for change in (None, "in place", "assigned", "data"):
        state = {name: t * 1.1 if t.is_floating_point() else t for name, t in plain.state_dict().items()}
        for each in (model, plain) if change else ():
            if change == "data":
                for name, parameter in each.named_parameters():
                    parameter.data = state[name].clone()
            else:
                each.load_state_dict({name: t.clone() for name, t in state.items()}, assign=change == "assigned")
        for _ in range(4):
            same(enabled=False)
            same(dtype=torch.bfloat16)
            same(dtype=torch.float16)
        assert outcome(model) == "3 recorded; its last call was replayed"


@on_gpu
def test_gpu_threads_and_streams():
    model = graphed(half(timm_vit()))
    inputs = [image(1 + index % 2, seed=index).half().cuda() for index in range(6)]
    expected = [call(model, x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                out = call(model, inputs[index])
                if not torch.allclose(out, expected[index], atol=4e-3, rtol=4e-3):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert outcome(model) == "2 recorded; its last call was replayed"


@on_gpu
def test_gpu_a_recording_that_fails_leaves_the_device_as_it_was():
    def body(self, x):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return self.linear(x)

    model, x = graphed(Probe(body).cuda()), torch.randn(2, 4, device="cuda")
    call(model, x, times=3)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="it could not be recorded"):
        out = call(model, x)
    assert torch.cuda.current_stream() == stream
    near(out, model.linear(x))
    model.body = (lambda self, x: self.linear(x),)
    y = torch.randn(3, 4, device="cuda")
    near(call(model, y, times=4), model.linear(y))
    assert recorded(model) == 1


@on_gpu
def test_gpu_the_callers_own_capture_and_released_memory():
    model, x = graphed(half(timm_vit())), image().half().cuda()
    expected = call(model, x, times=4)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(x)
    graph.replay()
    near(captured, expected)
    del graph, captured
    before = torch.cuda.memory_reserved()
    fastvit.restore(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


@on_gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="FP8 needs compute capability 8.9"
)
def test_gpu_fp8_weights_are_made_anew():
    model, x = half(timm_vit()), image().half().cuda()
    fastvit.accelerate(model, precision="fp8", cuda_graphs=True)
    call(model, x, times=6)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(1.5)
    actual = [call(model, x) for _ in range(6)]
    assert recorded(model) == 1
    expected = call(fastvit.accelerate(model, precision="fp8"), x)
    for out in actual:
        near(out, expected)
