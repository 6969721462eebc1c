"""The benchmark instrument where there is no GPU: its arithmetic, its rows, and that a wrong kernel gets no time."""

import contextlib
import ctypes
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastvit
from benchmarks import (
    accuracy,
    cases,
    chains,
    contest,
    energy,
    exports,
    first_call,
    floors,
    goals,
    gpu,
    limits,
    linear_8bit,
    measure,
    models,
    operators,
    peers,
    problems,
    results,
    sam,
    show,
    suite,
    ways,
)
from benchmarks.settings import Settings
from fastvit import functional, reference
from fastvit.ops import quantized

ROOT = Path(__file__).parent.parent
CEILINGS = {"gemm_tflop_s": 790.0, "copy_gb_s": 4300.0}
DRY = Settings("cpu", CEILINGS, dry=True)
ALL = [case for group in cases.ALL.values() for case in group]

SCHEMA = {
    "case": str, "op": str, "pass": str, "dtype": str, "shape": list, "ours_ms": float, "ours_spread": float, "peers": dict,
    "floor_ms": float, "gflop": float, "mbyte": float, "peers_peak_mb": dict, "max_error": float, "unavailable": dict,
}  # fmt: skip


def _name(case):
    return f"{case.op} {case.name}"


def _row(case, direction="forward"):
    """A dry run of one case: the same code as on a GPU, on small shapes."""
    row = results.new_row(case.name, case.op, direction, "bf16", case.small().shape)
    operators.run_case(case.small(), row, DRY)
    return row


@pytest.mark.parametrize("part", cases.ALL)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_has_the_schema(part, direction):
    row = _row(cases.ALL[part][0], direction)
    assert "error" not in row
    for key, kind in SCHEMA.items():
        assert isinstance(row[key], kind), key
    assert row["peers"].keys() == row["peers_peak_mb"].keys()
    assert "eager" in row["peers"]
    assert {"compile", "compile_max_autotune"} <= row["unavailable"].keys()
    json.dumps(row)


@pytest.mark.parametrize("case", ALL, ids=_name)
def test_every_case_computes_what_its_reference_does(case):
    """Small, in float32: the contestants of a case that run here are the same function of the same inputs."""
    case = case.small()
    ours, exact, competing = peers.contestants(case)
    inputs = case.inputs(torch.float32, "cpu", requires_grad=False)
    expected = operators.outputs(exact(**operators.double(inputs)))
    accuracy.check("fastvit", operators.outputs(ours(**inputs)), expected, torch.float32)
    elsewhere = {"xformers", "flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"}
    for name in competing.keys() - elsewhere:  # what is compiled runs as it is written
        accuracy.check(name, operators.outputs(competing[name].build()(**inputs)), expected, torch.float32)


def test_a_wrong_kernel_gets_an_error_and_no_time(monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda *args, **named: reference.linear(*args, **named) * 1.1)
    row = _row(cases.LINEAR[0])
    assert row["ours_ms"] is None
    assert "WrongResult" in row["error"]
    assert results.ratio(row) is None


def test_a_wrong_gradient_gets_an_error_and_no_time(monkeypatch):
    """Right forward, wrong backward."""

    def detached(input, weight, bias, activation=None):
        out = reference.linear(input, weight, bias, activation=activation)
        return out + (out - out.detach())

    monkeypatch.setattr(functional, "linear", detached)
    assert "error" not in _row(cases.LINEAR[0])
    assert "WrongResult" in _row(cases.LINEAR[0], "backward")["error"]


def test_a_wrong_peer_is_unavailable_and_says_why(monkeypatch):
    monkeypatch.setitem(peers.EAGER, "linear", lambda **named: reference.linear(**named) + 1)
    row = _row(cases.LINEAR[0])
    assert "eager" not in row["peers"]
    assert "WrongResult" in row["unavailable"]["eager"]
    assert row["ours_ms"]


def _contest(ours):
    x = torch.randn(3, 5)
    row = results.new_row("toy", "model", "forward", "bf16", [3, 5]) | {"gflop": 1.0}
    contest.run(row, DRY, x, {"eager": lambda: lambda: x.bfloat16()}, {name: lambda c=call: c for name, call in ours(x).items()})
    return row


def test_a_wrong_model_gets_an_error_also_where_another_variant_of_it_is_right():
    right = _contest(lambda x: {"accelerated": lambda: x.bfloat16()})
    assert right["ours_ms"]
    assert "error" not in right
    wrong = _contest(lambda x: {"accelerated": lambda: x.bfloat16(), "accelerated_2": lambda: x.bfloat16() * 1.01})
    assert wrong["ours_ms"] is None
    assert "WrongResult" in wrong["error"]


def _zeroed_row(**named):
    out = reference.attention(**named).clone()
    out[..., 1, :] = 0
    return out


def _ignoring_a_key(query, key, value, **named):
    return reference.attention(query, key[..., :-1, :], value[..., :-1, :], **named)


@pytest.mark.parametrize(
    "wrong", [_zeroed_row, _ignoring_a_key, lambda **named: reference.attention(**named) * 1.06], ids=["row", "key", "factor"]
)
def test_a_subtly_wrong_bf16_kernel_gets_no_time(wrong, monkeypatch):
    """At the length of a ViT, where a row or a key is a small part of the whole; an honest one passes beside them."""
    case = problems.Attention("ViT", 1, 2, 197, 64)
    for function, right in ((functional.attention, True), (wrong, False)):
        monkeypatch.setattr(functional, "attention", function)
        monkeypatch.setattr(operators, "_why_not", lambda *_: "not asked")
        row = results.new_row("ViT", "attention", "forward", "bf16", case.shape)
        operators.run_case(case, row, DRY)
        assert (row["ours_ms"] is not None) == right
        assert ("WrongResult" in row.get("error", "")) != right


def test_what_may_be_erred():
    """Twice what eager errs, a row four times; an eager that is wrong sets no standard."""
    bf16 = torch.bfloat16
    assert accuracy.allowed(bf16, accuracy.Error(0.004, 0.01)).overall == pytest.approx(0.008 + 2**-10)
    assert accuracy.allowed(bf16, accuracy.Error(0.004, 0.01)).row == pytest.approx(0.04 + 2**-6)
    assert accuracy.allowed(bf16, accuracy.Error(0.5, 0.5)) == accuracy.allowed(bf16)
    x = torch.randn(100, 8, dtype=torch.float64)
    y = x.clone()
    y[3] *= 1.1
    (found,) = accuracy.errors([y], [x])
    assert found.row == pytest.approx(0.1)
    assert found.overall < 0.05


def test_a_failing_eager_peer_takes_nobodys_time(monkeypatch):
    def absent(**named):
        raise ModuleNotFoundError("no eager here")

    monkeypatch.setitem(peers.EAGER, "linear", absent)
    row = _row(cases.LINEAR[0])
    assert row["ours_ms"]
    assert "no eager here" in row["unavailable"]["eager"]
    x = torch.randn(3, 5)
    row = results.new_row("toy", "model", "forward", "bf16", [3, 5]) | {"gflop": 1.0}
    contest.run(row, DRY, x, {"eager": absent}, {"accelerated": lambda: lambda: x.bfloat16()})
    assert row["ours_ms"]


def test_a_failing_kernel_keeps_its_reason(monkeypatch):
    class CompilationError(Exception):
        pass

    def failing(*args, **named):
        try:
            raise ValueError("numel is too large")
        except ValueError as cause:
            raise CompilationError("at 3:8:\n  x = tl.arange(0, 7)\n      ^\narange must be a power of 2") from cause

    monkeypatch.setattr(functional, "linear", failing)
    row = _row(cases.LINEAR[0])
    assert row["error"] == "CompilationError: arange must be a power of 2 (from ValueError: numel is too large)"
    assert any("x = tl.arange" in line for line in row["traceback"])


@pytest.mark.parametrize(
    ("text", "sticky"),
    [
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: Triton Error [CUDA]: misaligned address", True),
        ("RuntimeError: CUDA error: operation not permitted when stream is capturing", False),
        ("RuntimeError: Triton Error [CUDA]: out of memory", False),
        ("WrongResult: errs by 0.1", False),
    ],
)
def test_errors_after_which_nothing_runs(text, sticky):
    assert results.is_sticky(text) == sticky


class FakeStream(str):
    def wait_stream(self, other):
        pass


class FakeGpu:
    """What ``measure`` asks of ``torch.cuda``: a current stream, memory, and graphs, of which a capture may fail at its end."""

    def __init__(self, patch, refuses):
        self.stream, self.refuses, self.peak, self.clock = FakeStream("default"), refuses, 0, 0.0
        fakes = {
            "synchronize": lambda: None,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", 0),
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: self.peak,
            "current_stream": lambda: self.stream,
            "default_stream": lambda: "default",
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "Stream": lambda: FakeStream("side"),
            "stream": self.entered,
            "graph": self.capture,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: setattr(self, "clock", self.clock + 1.0)),
            "Event": self.event,
        }
        patch.setattr(measure, "GPU", torch.device("cpu"))
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def entered(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextlib.contextmanager
    def capture(self, graph, stream=None):
        before, self.stream = self.stream, FakeStream(stream or "capturing")
        yield
        if self.refuses:  # as PyTorch's: the stream stays
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.stream = before

    def event(self, enable_timing):
        made = SimpleNamespace(at=0.0, elapsed_time=lambda end: end.at - made.at)
        made.record = lambda: setattr(made, "at", self.clock)
        return made

    def call(self):
        self.clock += 0.125
        self.peak = max(self.peak, 3 << 20)


@pytest.mark.parametrize(("refuses", "timed"), [(False, "replay"), (True, "events")])
def test_what_cannot_be_captured_is_timed_by_events_and_says_so(refuses, timed, monkeypatch):
    gpu = FakeGpu(monkeypatch, refuses)
    timing = measure.measure([gpu.call])
    assert (timing.timed, timing.events_ms, timing.peak_mb) == (timed, 0.125, 3.0)
    assert timing.ms == (0.125 if refuses else pytest.approx(1 / 20))
    assert gpu.stream == "default"


def test_a_graph_has_the_memory_of_its_capture(monkeypatch):
    gpu = FakeGpu(monkeypatch, refuses=False)
    monkeypatch.setattr(measure, "GPU", torch.device("meta"))
    places = []  # where indices land that a library makes at every call

    def call():
        places.append(torch.arange(2).device.type)
        gpu.call()

    timing = measure.measure([measure.graphed(call)], graphs=False)
    assert set(places) == {"meta"}
    assert (timing.timed, timing.peak_mb) == ("replay", 3.0)
    gpu.refuses = True
    with pytest.raises(RuntimeError, match="capturing"):
        measure.graphed(gpu.call)
    assert gpu.stream == "default"


@pytest.mark.parametrize(("replays", "ms"), [(True, 1 / 20), (False, 0.125)])
def test_contestants_take_turns_on_a_gpu(replays, ms, monkeypatch):
    gpu, order = FakeGpu(monkeypatch, refuses=False), []

    def call(name):
        order.append(name)
        gpu.call()

    timings = measure.in_turns({name: [lambda name=name: call(name)] for name in "ab"}, replays)
    assert order[:4] == (["a"] * 4 if replays else ["a", "b", "b", "a"])
    assert timings["a"].samples == pytest.approx([ms] * measure.ROUNDS_IN_TURNS)
    assert measure.paired(timings["a"], timings["b"])["ratio_quartiles"] == pytest.approx([1.0, 1.0])
    gpu.refuses = True
    if replays:
        with pytest.raises(RuntimeError, match="a could not be captured again"):
            measure.in_turns({"a": [gpu.call]}, replays)


@pytest.mark.parametrize(("eager", "found"), [(0.98, 1.25), (0.9, 0.9)])
def test_what_is_level_on_a_gpu_is_settled_in_turns(eager, found, monkeypatch):
    FakeGpu(monkeypatch, refuses=False)
    samples = {"eager": measure.summarize([5.0, 5.0]), "fastvit": measure.summarize([4.0, 4.0])}
    monkeypatch.setattr(measure, "in_turns", lambda contestants, replays: {name: samples[name] for name in contestants})
    names = ("eager", "compile", "fastvit")
    row = {"ours_ms": 1.0, "peers": {"eager": eager, "compile": 3.0}, "timed": dict.fromkeys(names, "replay"), "unavailable": {}}
    operators._settle(row, dict.fromkeys(names, list))
    assert results.ratio(row) == found


def test_what_cannot_be_settled_says_why_and_is_not_tried_again(monkeypatch):
    FakeGpu(monkeypatch, refuses=False)
    asked = []

    def broken(contestants, replays):
        asked.append(sorted(contestants))
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(measure, "in_turns", broken)
    row = {"ours_ms": 1.0, "peers": {"eager": 1.0}, "timed": dict.fromkeys(("eager", "fastvit"), "replay"), "unavailable": {}}
    operators._settle(row, dict.fromkeys(("eager", "fastvit"), list))
    assert row["broke"] == "eager in turns"
    assert "misaligned" in row["unavailable"]["eager in turns"]
    assert row["ours_ms"] == 1.0
    del row["broke"]
    operators._settle(row, {})
    assert asked == [["eager", "fastvit"]]


class FakeNvml:
    """NVML's four functions; ``codes`` {function: error code}."""

    def __init__(self, codes=None):
        self.codes, self.millijoules = codes or {}, 5000
        self.nvmlErrorString = lambda code: b"Not Supported"

    def __getattr__(self, function):
        def call(*arguments):
            if function == "nvmlDeviceGetTotalEnergyConsumption":
                arguments[-1]._obj.value = self.millijoules
            return self.codes.get(function, 0)

        return call


def test_energy_of_a_call(monkeypatch):
    """The counter before and after a stretch of a second or more, over the calls in it."""
    gpu, nvml = FakeGpu(monkeypatch, refuses=False), FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(energy, "LEAST_S", 0.05)
    made = []

    def call():
        gpu.call()
        nvml.millijoules += 250
        made.append(time.perf_counter())

    timing = measure.measure([call], 0.001, graphs=False, counter=energy.Counter())
    assert timing.joules == pytest.approx(0.25)
    assert timing.timed == "events"
    assert made[-1] - made[0] >= 0.05


@pytest.mark.parametrize("function", ["nvmlInit_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_without_an_energy_counter_says_why(function, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml({function: 3}))
    monkeypatch.setattr(energy, "_uuid", lambda: "GPU-1")
    with pytest.raises(energy.Absent, match=f"{function}: Not Supported"):
        energy.Counter()


def test_a_machine_without_a_driver_says_so(monkeypatch):
    def absent(name):
        raise OSError("cannot open")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(energy.Absent, match=r"libnvidia-ml\.so\.1: cannot open"):
        energy.Counter()


def test_a_contestant_that_takes_too_long_is_left_out():
    """Also where a library swallows what it does not know; the next one has its turn."""

    def searching():
        try:
            time.sleep(20)
        except Exception:
            pytest.fail("an autotuner would have gone on")

    x = torch.randn(3, 5)
    row = results.new_row("toy", "model", "forward", "bf16", [3, 5]) | {"gflop": 1.0}
    hurried = dataclasses.replace(DRY, limit_s=0.2)
    right = {"accelerated": lambda: lambda: x.bfloat16()}
    contest.run(row, hurried, x, {"searching": lambda: searching, "sdpa": right["accelerated"]}, right)
    assert row["unavailable"]["searching"] == "stopped after 0.2 s"
    assert row["peers"].keys() == {"sdpa"}
    assert row["took_s"]["searching"] < 5
    assert row["ours_ms"]
    with limits.limited(None):
        pass


def test_what_has_no_turn_is_left_for_another_run():
    x = torch.randn(3, 5)
    row = results.new_row("toy", "model", "forward", "bf16", [3, 5]) | {"gflop": 1.0}
    call = lambda: lambda: x.bfloat16()  # noqa: E731
    contest.run(row, dataclasses.replace(DRY, only=("s*", "acc*")), x, {"eager": call, "sdpa": call}, {"accelerated": call})
    assert row["unavailable"] == {"eager": results.NO_TIME}
    assert not results.is_complete(row)


def test_everyone_has_latencies_and_ours_images_a_second():
    row = _contest(lambda x: {"accelerated": lambda: x.bfloat16()})
    assert row["images_s"] == pytest.approx(3e3 / row["ours_ms"])
    assert row["p95_ms"] >= row["ours_ms"]
    assert row["peers_p95_ms"]["eager"] >= row["peers"]["eager"]
    assert row["energy_absent"] == "no GPU"


@pytest.mark.parametrize(("refused", "timed"), [(False, "replay"), (True, "events")])
def test_what_captures_itself_counts_as_a_replay_unless_it_refused(refused, timed, monkeypatch):
    FakeGpu(monkeypatch, refuses=False)
    x = torch.randn(3, 5)
    row = results.new_row("toy", "model", "forward", "bf16", [3, 5]) | {"gflop": 1.0}
    contender = contest.Contest(row, Settings("cuda", CEILINGS), x)
    contender.peers({"compile_max_autotune": lambda: contest.Captured(lambda: x.bfloat16(), lambda: refused)})
    assert row["timed"]["compile_max_autotune"] == timed
    assert (row["peers_peak_mb"]["compile_max_autotune"] is None) != refused


def test_graphs_that_are_not_replayed_are_no_time_and_no_defect():
    model = fastvit.accelerate(models.build("ViT-B/16", DRY), cuda_graphs=True)
    x = torch.randn(1, 3, 224, 224)
    exact = contest.inference(model, x)()
    row = results.new_row("toy", "model", "forward", "bf16", [1, 3, 224, 224]) | {"gflop": 1.0}
    contestants = {
        "accelerated": lambda: lambda: exact.bfloat16(),
        "accelerated_2": lambda: contest.replayed(model, contest.inference(model, x)),
    }
    contest.run(row, DRY, exact, {}, contestants)
    assert row["ours_ms"]
    assert "error" not in row
    assert "CUDA graphs need a CUDA device" in row["unavailable"]["accelerated_2"]


def test_features_far_from_float32s_are_no_fp8():
    x = torch.randn(4, 7, 16)
    rule = contest.Cosine()
    rule("near", x + 0.02 * torch.randn_like(x), x, False)
    assert 0.999 < rule.found["near"] < 1
    with pytest.raises(accuracy.WrongResult, match=r"cosine 0\.9"):
        rule("far", x + 0.3 * torch.randn_like(x), x, False)
    assert "far" not in rule.found


@pytest.mark.parametrize(("precision", "peer"), [("fp8", "torchao_float8"), ("int8", "torchao_int8")])
def test_8_bits_are_held_against_our_own_bf16(precision, peer):
    task = next(task for task in models.tasks(DRY) if task.row["case"] == f"ViT-L/16 224, batch 64, {precision}")
    task.measure(task.row, DRY)
    row = task.row
    assert "error" not in row
    assert row["cosine"] >= 0.999
    assert row["vs_bf16"] == pytest.approx(row["bf16_ms"] / row["ours_ms"])
    assert "torchao" in row["unavailable"][peer]
    assert set(row["ours_variants"]) == {f"accelerated_{precision}"}


def test_onnx_runtime_reads_and_writes_our_memory(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    call = exports.onnxruntime(exports.export(model, x, tmp_path / "x.onnx"), x)
    torch.testing.assert_close(call(), model(x).detach())
    first = call()
    x.mul_(2)
    assert call() is first
    torch.testing.assert_close(first, model(x).detach())


def test_sam_is_measured_without_other_libraries(monkeypatch):
    """Ours gets its time, checked against its own definition; the peers say what they lack."""

    def absent(*args):
        raise ModuleNotFoundError("No module named 'x'")

    monkeypatch.setattr(sam, "original", absent)
    monkeypatch.setattr(sam, "transformers_encoder", absent)
    wanted = ("SAM-B encoder, batch 8", "SAM-B encode + 1 point", "SAM-B masks of everything")
    for task in [task for task in sam.tasks(DRY) if task.row["case"] in wanted]:
        task.measure(task.row, DRY)
        assert "error" not in task.row
        assert task.row["ours_ms"] > 0
        assert task.row["exact"] == "fastvit, torch backend"
        assert "No module named 'x'" in task.row["unavailable"]["segment_anything"]


def test_compiling_that_fails_leaves_our_first_call(monkeypatch):
    def ran(command, **named):
        failed = "compile" in command
        return SimpleNamespace(returncode=int(failed), stderr="no compiler", stdout='{"first_ms": 2.0, "second_ms": 1.0}')

    monkeypatch.setattr(subprocess, "run", ran)
    (task,) = first_call.tasks(DRY)
    task.measure(task.row, Settings("cpu", CEILINGS))
    assert task.row["ours_ms"] == 2.0
    assert task.row["unavailable"]["compile"] == "RuntimeError: no compiler"


def test_one_hot_places_are_made_once_and_fold_to_the_same():
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    rel = torch.randn(1, 2, 6, 2), torch.randn(1, 2, 6, 3)
    expected = ways.dense(q, k, v, *rel, 0.3)
    for way in (ways.folded, ways.folded_flash):
        torch.testing.assert_close(way(q, k, v, *rel, 0.3), expected)
    assert ways._places(2, 3, k.dtype, k.device) is ways._places(2, 3, k.dtype, k.device)


def test_replays_are_compared_with_replays():
    """A peer that could not be captured is held against our own time without a graph."""
    row = {"ours_ms": 1.0, "peers": {"a": 1.5, "b": 1.2}}
    row |= {"timed": {"fastvit": "replay", "a": "replay", "b": "events"}, "events_ms": {"fastvit": 0.5, "a": 9.0, "b": 1.2}}
    assert results.ratio(row) == 1.5
    assert results.fastest_peer(row) == "a"
    row["events_ms"]["fastvit"] = 2.0
    assert results.ratio(row) == pytest.approx(0.6)
    assert results.fastest_peer(row) == "b"
    row["peers"]["b_graph"], row["timed"]["b_graph"] = 1.1, "replay"  # now b's replay stands for it
    assert results.ratio(row) == pytest.approx(1.1)


def test_nan_passes_no_check():
    with pytest.raises(accuracy.WrongResult, match="inf"):
        accuracy.check("x", [torch.tensor([1.0, float("nan")])], [torch.ones(2)], torch.float32)


def test_medians_and_spread():
    timing = measure.summarize([3.0, 1.0, 2.0, 100.0, 2.0])
    assert timing.ms == 2.0
    assert timing.spread == pytest.approx(1.0)  # from 1 to 3, the outlier left out


def test_contestants_take_turns():
    order = []
    timings = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.01)
    assert order[:8] == ["a", "b", "b", "a"] * 2
    assert len(timings["a"].samples) == len(timings["b"].samples) <= measure.MOST_ROUNDS
    timings["a"].samples, timings["b"].samples = [2.0, 6.0, 1.0], [1.0, 2.0, 2.0]
    assert measure.paired(timings["a"], timings["b"]) == {"paired_ratio": 2.0, "ratio_quartiles": [0.5, 3.0]}


@pytest.mark.skipif(not measure.forget_peak(), reason="this system does not let a process reset its peak")
def test_the_memory_that_a_call_adds():
    peak = measure.resident_peak_mb(lambda: [torch.ones(8 << 20) for _ in range(2)] and None)
    assert peak == pytest.approx(64, rel=0.05)
    assert measure.resident_peak_mb(lambda: None) < 2


def test_ratio_is_the_fastest_peer_over_ours():
    assert results.ratio({"ours_ms": 2.0, "peers": {"eager": 6.0, "compile": 3.0}}) == 1.5
    assert results.ratio({"ours_ms": 2.0, "peers": {}}) is None


def test_floors():
    """A square bf16 product is bound by arithmetic, a layer norm by bytes."""
    product = problems.Linear("square", 8192, 8192, 8192)
    assert cases.floor_ms(product, "forward", 2, 790.0, 4300.0) == pytest.approx(2 * 8192**3 / 790e12 * 1e3)
    norm = problems.LayerNorm("rows", 4096, 1024)
    assert cases.floor_ms(norm, "forward", 2, 790.0, 4300.0) == pytest.approx(2 * 4096 * 1024 * 2 / 4300e9 * 1e3)
    assert product.flops("step") == product.flops("forward") + product.flops("backward")
    assert DRY.floor_ms(*(f("forward", *a) / s for f, a, s in ((norm.flops, (), 1e9), (norm.bytes, (2,), 1e6)))) == pytest.approx(
        cases.floor_ms(norm, "forward", 2, 790.0, 4300.0)
    )


@pytest.mark.parametrize(("name", "gflop"), [("ViT-B/16", 35.1), ("ViT-L/16", 123), ("ViT-H/14", 335)])
def test_flops_of_vits(name, gflop):
    assert floors.vit_flops(224, **floors.VIT[name], classes=1000) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize(("name", "gflop"), [("SAM-B", 938), ("SAM-L", 2837), ("SAM-H", 5642)])
def test_flops_of_sams_encoders(name, gflop):
    assert floors.sam_encoder_flops(**floors.SAM[name]) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_flops_agree_with_a_count_of_the_running_model():
    """A ViT as it runs: PyTorch's counter sees the same products."""
    from torch.utils.flop_counter import FlopCounterMode

    model = models.build("ViT-B/16", DRY)
    for block in model.blocks:
        block.attn.fused_attn = False  # written out, which is what the counter knows on every device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert models.vit_gflop("ViT-B/16", 224, DRY) * 1e9 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_inputs_rotate_beyond_the_cache():
    small, large = problems.LayerNorm("small", 16, 64), problems.LayerNorm("large", 1 << 16, 1024)
    cache = 50 << 20
    assert cases.sets_beyond_cache(small, 2, cache) == 64  # capped
    assert cases.sets_beyond_cache(large, 2, cache) == 1
    middle = dataclasses.replace(small, rows=16 * 197, channels=768)
    assert cases.sets_beyond_cache(middle, 2, cache) * middle.bytes("forward", 2) >= 2 * cache


@pytest.mark.parametrize("case", ALL, ids=_name)
def test_a_cpu_gets_the_same_case_with_less_of_it(case):
    reduced = case.on_cpu()
    assert reduced.work()[0] <= 5 * problems.CPU_FLOPS
    assert type(reduced) is type(case)
    assert reduced.options.keys() == case.options.keys()
    assert all(few <= many for few, many in zip(reduced.shape, case.shape, strict=True))


def test_no_two_rows_are_the_same_measurement():
    for device, dry in (("cuda", False), ("cpu", False), ("cpu", True)):
        settings = Settings(device, CEILINGS, dry=dry)
        keys = [results.key(task.row) for part in cases.ALL for task in operators.tasks(part, settings)]
        assert len(keys) == len(set(keys))


def test_a_part_run_alone_joins_the_file():
    row = {"case": "a", "op": "linear", "pass": "forward", "dtype": "bf16", "shape": [1], "ours_ms": 1.0}
    old = {"commit": "c", "rows": [row, row | {"case": "b"}]}
    new = {"commit": "c", "rows": [row | {"ours_ms": 2.0}]}
    assert results.merge(old, new)["rows"] == [row | {"case": "b"}, row | {"ours_ms": 2.0}]
    assert results.merge(old | {"commit": "other"}, new) == new
    assert results.merge(None, new) == new


def test_rows_of_an_older_run_are_held_to_the_new_ones_rates():
    """A file has one pair of rates: what each kind of row was measured as under those is what joining makes of it."""
    old, new = ({"commit": "c", "gemm_tflop_s": flops, "copy_gb_s": copy} for flops, copy in ((700.0, 4000.0), (800.0, 3000.0)))

    def measured(rates):
        here = Settings("cpu", rates, dry=True)
        norm = results.new_row("norm", "layer_norm", "forward", "bf16", [1]) | {"gflop": 1.0, "mbyte": 900.0, "ours_ms": 0.4}
        model = results.new_row("ViT", "model", "forward", "bf16", [1]) | {"gflop": 35.0, "ours_ms": 0.1}
        model |= {"mfu": 35.0 / 0.1 / rates["gemm_tflop_s"], "floor_ms": here.floor_ms(35.0)}
        eight = results.new_row("fc1", "linear_8bit", "forward", "fp8", [1])
        linear_8bit.run(dataclasses.replace(linear_8bit.CASES[0], rows=5, channels=32), eight, here)
        launch = results.new_row("fc1", "linear", "launch", "bf16", [1]) | {"ours_ms": 0.01}
        return [norm | {"floor_ms": here.floor_ms(1.0, 900.0)}, model, eight | {"ours_ms": 1.0}, launch]

    assert [row["floor_ms"] for row in measured(old)] != [row["floor_ms"] for row in measured(new)]
    kept = results.merge(old | {"rows": measured(old)}, new | {"rows": []})["rows"]
    for row, expected in zip(kept, measured(new), strict=True):
        assert [row["floor_ms"], row.get("mfu")] == pytest.approx([expected["floor_ms"], expected.get("mfu")])


def test_the_result_file_is_named_by_gpu_day_and_commit(tmp_path):
    about = {"gpu": "NVIDIA H200 141GB", "commit": "0123456789"}
    path = results.path_of(tmp_path, about, datetime.date(2026, 1, 31))
    assert path == tmp_path / "nvidia-h200-141gb" / "2026-01-31-0123456.json"
    assert results.path_of(tmp_path, about | {"gpu": "none"}, datetime.date(2026, 1, 31)).parent.name == "cpu"


def test_a_row_without_a_time_is_printed_with_its_reason(monkeypatch, capsys):
    """As on a GPU without products in FP8 or dependent launches: no failure, nothing to try again, and nothing that throws."""
    absent = "needs compute capability 8.9"
    monkeypatch.setattr(quantized, "why_not", lambda precision, device: absent)
    monkeypatch.setattr(chains, "why_not", lambda case, settings: absent)
    tasks = [next(iter(part.tasks(Settings("cuda", CEILINGS)))) for part in (linear_8bit, chains)]
    tasks += [next(t for t in part.tasks(Settings("cuda", {})) if t.row["dtype"] == "fp8") for part in (models, sam)]
    rows = [suite._fill(task, Settings("cuda", CEILINGS)) for task in tasks]
    rows.append(results.new_row("never", "linear", "forward", "bf16", [1]))
    for row, reason in zip(rows, [absent] * 4 + ["not measured"], strict=True):
        assert "error" not in row
        assert results.is_complete(row)
        assert suite.progress(row).endswith(f": {reason}")
    show.print_rows(rows)
    assert capsys.readouterr().out.count(absent) == 4
    about = {"gpu": "A100", "commit": "0123456789", "date": "2026-01-31", "versions": {"torch": "2.13.0"}}
    page = show.page(about | {"rows": rows})
    assert "slower in 0, failed in 0" in page
    assert page.count(f"not run: {absent}") == 4
    wanted = [line for line in goals.listed(rows, "A100") if line.endswith(f"not measured: {absent}")]
    assert len(wanted) == 4  # how much faster FP8 is, and its cosine, of two models


def test_losses_are_printed_first(capsys):
    base = {"op": "linear", "pass": "forward", "floor_ms": 0.5, "ours_ms": 1.0}
    show.print_rows([base | {"case": "won", "peers": {"eager": 2.0}}, base | {"case": "lost", "peers": {"eager": 0.5}}])
    printed = capsys.readouterr().out
    assert printed.index("lost") < printed.index("won")
    assert "0.50" in printed


def test_test_parts_are_balanced_and_miss_nothing():
    counts = {f"tests/test_{index}.py": 1 + index * index % 97 for index in range(40)}
    groups = gpu.balanced(counts, 4)
    assert sorted(name for group in groups for name in group) == sorted(counts)
    sizes = [sum(counts[name] for name in group) for group in groups]
    assert max(sizes) <= 1.1 * min(sizes)
    listing = "tests/test_a.py::test_x[1]\ntests/test_a.py::test_x[a/b.py::c]\ntests/test_b.py::test_y\n\n3 tests collected"
    assert gpu.count_tests(listing) == {"tests/test_a.py": 2, "tests/test_b.py": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2():
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert "no GPU" in ran.stderr


WITHOUT_VIT_B = ("image_attention", "rotary", "training", "linear_8bit")


@pytest.mark.parametrize("part", [part for part in suite.PARTS if part != "first_call"])
def test_a_dry_run_of_every_part(part, tmp_path, capsys):
    """The same code as on a GPU, and nothing is written."""
    case = ["--case", "ViT-[BD]*" if part != "sam" else "SAM-B*"] if part not in WITHOUT_VIT_B else []
    assert gpu.main(["--dry-run", "--part", part, "--out", str(tmp_path), *case]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "no measurements" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_of_first_calls():
    (task,) = first_call.tasks(DRY)
    task.measure(task.row, DRY)
    assert task.row["ours_ms"] > 0
    assert task.row["warm_cache_ms"] > 0
    assert task.row["unavailable"] == {"compile": "not compiled in a dry run"}
