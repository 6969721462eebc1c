"""How a GPU's minutes are spent: what is run first, what that may take, and that one broken kernel takes nobody else's turn."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import (
    accuracy,
    cases,
    chains,
    contest,
    first_call,
    goals,
    gpu,
    linear_8bit,
    models,
    plan,
    results,
    sam,
    smoke,
    smoke_8bit,
    suite,
    training,
)
from benchmarks.settings import Settings, Task
from fastvit import functional, reference
from fastvit.ops import quantized

CEILINGS = {"gemm_tflop_s": 790.0, "copy_gb_s": 4300.0}
DRY = Settings("cpu", CEILINGS, dry=True)
GPU = Settings("cuda", CEILINGS)


def test_first_has_a_row_for_every_goal():
    rows = [task.row for task in suite.tasks(suite.FIRST, GPU)]
    assert len({results.key(row) for row in rows}) == len(rows)
    for goal in goals.GOALS:
        assert any(goals._asks(goal, row) for row in rows), goal.title


def test_first_fits_a_session(monkeypatch):
    """Estimates, with smoke's four minutes, where every library is there; whole models begin before half of it is over."""
    monkeypatch.setattr(plan, "_there", lambda name: True)
    rows = plan.estimated({"first": list(suite.tasks(suite.FIRST, GPU))}, GPU)["first"]
    assert all(task.seconds > 0 for task in rows)
    assert max(task.seconds for task in rows) < suite.LIMIT_S
    minutes = sum(task.seconds for task in rows) / 60
    assert 4 + minutes < 28
    page = (results.ROOT / "docs" / "benchmarks.md").read_text()
    assert f"again until nothing is left (about {minutes:.0f} in all)" in page
    before = [task.seconds for task in rows[: [task.row["op"] for task in rows].index("model")]]
    assert sum(before) < 8 * 60


@pytest.mark.slow
@pytest.mark.parametrize("part", [models, sam, training])
def test_who_has_a_turn_is_who_is_counted(part):
    """Of one row of every kind, as it comes out of a dry run."""
    kinds = {}
    for task in part.tasks(DRY):
        kinds.setdefault(
            (task.row["case"].partition(" ")[0][:3], task.row["case"].partition(" ")[2], task.row["shape"][0] == 1), task
        )
    for task in kinds.values():
        if task.row["case"].startswith("DINO") or "everything" in task.row["case"]:
            continue
        counted = set(plan.contestants(task.row))
        task.measure(task.row, DRY)
        met = {*task.row["peers"], *task.row["unavailable"], *task.row.get("ours_variants", ()), *task.row.get("cosines", ())}
        graphs = {name for name in counted ^ met if "_graph" in name}  # a dry run has two images in place of many
        assert counted ^ met == graphs, task.row["case"]


def test_a_row_that_would_not_be_done_in_time_is_left_to_the_next_run(tmp_path, monkeypatch):
    made = []

    def measure(row, settings):
        made.append((row["case"], settings.only))
        row["ours_ms"], row["unavailable"]["flex"] = 1.0, results.NO_TIME

    def picked(tasks_of):
        for name, seconds in (("a", 900.0), ("b", 900.0), ("c", 1.0)):
            yield Task(results.new_row(name, "linear", "forward", "bf16", [1]), measure, ("eager",), seconds=seconds)

    monkeypatch.setattr(plan, "first", picked)
    monkeypatch.setattr(suite, "ceilings_of", lambda *_: CEILINGS)
    job = suite.Run("cpu", (suite.FIRST,), tmp_path)
    result, _ = suite.run(job)
    assert made == [("a", ("eager",)), ("c", ("eager",))]
    assert result["not_begun"] == ["linear b forward bf16 1"]
    suite.run(job)  # goes on with b; what was left out of a and c was not asked for
    assert [case for case, _ in made] == ["a", "c", "b"]
    assert not results.is_complete(result["rows"][0])
    assert results.is_complete(result["rows"][0], ("eager",))


def test_a_row_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    """The next run times those who had no turn, and nobody again."""
    x, ran = torch.randn(2, 3), []

    def contender(name):
        return lambda: (ran.append(name), lambda: x.bfloat16())[1]

    def measure(row, settings):
        row["gflop"] = 1.0
        others, ours = ({name: contender(name) for name in names} for names in (("sdpa", "eager"), ("accelerated", "other")))
        contest.run(row, replace(settings, only=wanted), x, others, ours)

    def tasks(part, settings):
        return [Task(results.new_row("toy", "model", "forward", "bf16", [2, 3]), measure)]

    monkeypatch.setattr(suite, "tasks", tasks)
    monkeypatch.setattr(suite, "ceilings_of", lambda *_: CEILINGS)
    job, wanted = suite.Run("cpu", ("models",), tmp_path), ("sdpa",)
    (row,) = suite.run(job)[0]["rows"]
    assert row["error"] == f"fastvit: {results.NO_TIME}"
    assert row["ours_ms"] is None
    wanted = ("*",)
    (row,) = suite.run(job)[0]["rows"]
    assert ran == ["sdpa", "eager", "accelerated", "other"]
    assert row["peers"].keys() == {"sdpa", "eager"}
    assert row["ours_variants"].keys() == {"accelerated", "other"}
    assert "error" not in row
    assert row["unavailable"] == {}
    suite.run(job)
    assert len(ran) == 4


def test_a_row_gone_on_with_is_held_to_the_same_standard():
    """A result 2.5 % off is refused where the peer is 0.3 % off, also after that peer was timed in an earlier run."""
    torch.manual_seed(0)
    exact = torch.randn(64, 1000)
    peer = exact * (1 + 0.003 * torch.randn_like(exact))
    others = {"eager": lambda: lambda: peer, "sdpa": lambda: lambda: peer}
    row, told = results.new_row("toy", "model", "forward", "bf16", [64, 3]) | {"gflop": 1.0}, []
    contest.run(row, replace(DRY, only=("sdpa",)), exact, others, {"accelerated": lambda: lambda: exact * 1.025})
    for only in (("sdpa", "accelerated"), ("*",)):
        again = json.loads(json.dumps(results.resumed(row)))
        contest.run(again, replace(DRY, only=only), exact, others, {"accelerated": lambda: lambda: exact * 1.025})
        assert again["ours_ms"] is None
        assert again["standard"]["of"] == "sdpa"
        told.append(again["error"])
    assert told[0] == told[1]
    assert "WrongResult: accelerated errs by 0.025, allowed 0.007" in told[0]
    del (unsaid := results.resumed(row))["standard"]
    contest.run(unsaid, replace(DRY, only=("sdpa", "accelerated")), exact, others, {"accelerated": lambda: lambda: exact * 1.025})
    assert unsaid["error"] == told[0]


def test_an_operator_is_stopped_where_the_run_ends():
    """Also in a process of its own, as first calls are; the next run takes it up with who had no turn."""
    slow = (lambda: time.sleep(20), lambda: subprocess.run([sys.executable, "-c", "import time; time.sleep(20)"], check=False))

    def measure(wait, row, settings):
        row |= {"ours_ms": 1.0 if row["case"] == "peer" else None, "peers": {"eager": 1.0}}
        wait()

    tasks = [
        Task(results.new_row(case, "linear", "first_call", "bf16", [1]), partial(measure, wait), contestants=("eager", "compile"))
        for case, wait in zip(("ours", "peer"), slow, strict=True)
    ]
    ending = replace(DRY, ends=time.monotonic() + 0.2)
    for task, error in zip(tasks, (f"fastvit: {results.NO_TIME}", None), strict=True):
        start = time.monotonic()
        row = suite._fill(task, ending)
        assert time.monotonic() - start < 5
        assert (row.get("error"), row["unavailable"]) == (error, {"compile": results.NO_TIME})
        assert not results.is_complete(row)


def test_when_the_run_is_over_nobody_has_a_turn():
    settings = replace(GPU, limit_s=100.0, ends=time.monotonic() - 1)
    assert settings.why_not("sdpa") == results.NO_TIME
    assert settings.left_s() == 1.0
    assert 9 < replace(settings, ends=time.monotonic() + 10).left_s() <= 10
    assert replace(settings, ends=time.monotonic() + 1000).left_s() == 100
    assert DRY.left_s() is DRY.run_left_s() is None


def test_the_plan_needs_no_gpu(capsys):
    assert gpu.main(["--plan", "--part", "linear", "--case", "SAM-H fc1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("linear: 2 rows, about ")
    assert "linear SAM-H fc1 backward" in printed[2]


def test_smoke_finds_a_wrong_kernel(monkeypatch):
    item = next(item for item in smoke.items() if item.case.op == "linear")
    assert smoke.outcome(item, DRY).error < 0.01
    monkeypatch.setattr(functional, "linear", lambda *args, **named: reference.linear(*args, **named) * 1.1)
    told = smoke.outcome(item, DRY)
    assert told.error is None
    assert told.why.startswith("WrongResult: the kernel errs by 0.1")


def test_smoke_has_every_case_both_ways_and_one_of_each_operator_first():
    found = smoke.items()
    directions = [case.directions for group in cases.ALL.values() for case in group]
    assert len(found) == len(set(found)) == sum(map(len, directions)) + len(chains.CASES) + len(smoke_8bit.CASES)
    operators = {case.op for group in cases.ALL.values() for case in group}
    firsts = sum(len(cases.ALL[part][index].directions) for part, index in first_call.one_of_each())
    assert {item.case.op for item in found[:firsts]} == operators


def test_smoke_has_every_8_bit_kernel(monkeypatch):
    """What rounds and what multiplies, in either format; in one where the GPU has only that."""
    found = [item for item in smoke.items() if item.part == smoke.IN_8_BITS]
    kinds = {(item.case.precision, item.case.op, item.name.split()[-2 if item.case.op == "linear_8bit" else 1]) for item in found}
    assert len(kinds) == 2 * (3 + 3)
    assert len({item.name for item in found}) == len(found)
    monkeypatch.setattr(smoke_8bit.quantized, "why_not", lambda precision, device: "too old" if precision == "fp8" else None)
    asked = [item for item in smoke.items(settings=GPU) if item.part == smoke.IN_8_BITS]
    assert asked == [item for item in found if item.case.precision == "int8"]


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_smoke_checks_8_bit_kernels(monkeypatch, device, precision):
    """The kernels themselves, at sizes that an interpreter bears; and then with a scale that is wrong."""
    if reason := quantized.why_not(precision, torch.device(device)):
        pytest.skip(reason)
    here = Settings(device, CEILINGS)
    monkeypatch.setattr(smoke_8bit, "KINDS", dict.fromkeys(smoke_8bit.KINDS, (5, 160)))
    checked = [smoke_8bit.Rounding(kind, precision) for kind in smoke_8bit.KINDS]
    small = {kind: linear_8bit.Case("small", 5, 32, kind, precision) for kind in linear_8bit.KINDS}
    checked += [smoke_8bit.Product(case) for case in small.values()]
    monkeypatch.setattr(smoke_8bit, "CASES", checked)
    items = [item for item in smoke.items() if item.part == smoke.IN_8_BITS]
    for item in items:
        assert smoke.outcome(item, here).why == "", item.name
    for name in ("layer_norm", "add_layer_norm", "glu", "linear", "linear_quantized"):
        monkeypatch.setattr(quantized, name, _scaled(getattr(quantized, name)))
    for item in items:
        assert smoke.outcome(item, here).why.startswith("WrongResult: fastvit errs by "), item.name
        assert smoke.outcome(item, DRY).why == ""


def test_one_wrong_row_of_many_is_seen():
    """Which the error of the whole tensor hides."""
    exact = torch.randn(4000, 128, dtype=torch.float64)
    found = linear_8bit.by_definition(exact.float(), "fp8", 128)
    assert 0.02 < linear_8bit.check("fp8", found, exact) < 0.03
    found.values[7] = 0
    with pytest.raises(accuracy.WrongResult, match=r"fastvit errs by 0\.0\d+, 1 in a row"):
        linear_8bit.check("fp8", found, exact)


def _scaled(function):
    """A version whose first row comes out twice as large."""

    def wrong(*args, **named):
        out = function(*args, **named)
        first = out[0] if isinstance(out, tuple) and not isinstance(out, quantized.Quantized) else out
        if isinstance(first, quantized.Quantized):
            first.scale[..., 0] *= 2
        else:
            first[0] *= 2
        return out

    return wrong


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    item = json.loads(line)
    if item["index"] == 1:
        os._exit(3)
    if item["index"] == 2:
        time.sleep(60)
    sticky = item["index"] == 3
    why = "RuntimeError: CUDA error: an illegal memory access" if sticky else f"process {os.getpid()}"
    print(json.dumps({"item": item, "error": None if sticky else 0.0, "why": why, "seconds": 0.0}), flush=True)
"""


def test_a_kernel_that_breaks_its_process_takes_nobody_elses_turn(monkeypatch):
    def start(settings):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-S", "-c", WORKER], **pipes)

    monkeypatch.setattr(smoke.Process, "_start", staticmethod(start))
    monkeypatch.setattr(smoke, "LIMIT_S", 1.0)
    asked = [smoke.Item("attention", index, "forward") for index in range(6)]
    found = {told.item.index: told for told in smoke.run(asked, DRY, 60.0, say=lambda line: None)}
    assert found[1].why == "the process died with status 3"
    assert "stopped after 1 s" in found[2].why
    assert "illegal memory access" in found[3].why
    processes = [found[index].why for index in (0, 4, 5)]
    assert processes[0] != processes[1] == processes[2]
    late = smoke.run(asked, DRY, -1.0, say=lambda line: None)
    assert {told.why for told in late} == {results.NO_TIME}


@pytest.mark.slow
def test_a_dry_smoke_run(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--part", "smoke", "--case", "SAM-H fc1", "--out", str(tmp_path)]) == 0
    assert "4 of 4 right" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_of_what_comes_first(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--part", "first", "--case", "ViT-L*", "--out", str(tmp_path)]) == 0
    assert "no measurements" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_smoke_needs_a_gpu(capsys):
    assert gpu.main(["--part", "smoke"]) == 2
    assert "no GPU" in capsys.readouterr().err
