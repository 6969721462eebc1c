"""How a GPU's minutes are spent: what is run first, what that may take, and that one broken kernel takes nobody else's turn."""

import subprocess
import sys

import pytest
import torch

from benchmarks import cases, goals, gpu, models, plan, results, sam, smoke, suite, training
from benchmarks.settings import Settings, Task
from fastvit import functional, reference

CEILINGS = {"gemm_tflop_s": 790.0, "copy_gb_s": 4300.0}
DRY = Settings("cpu", CEILINGS, dry=True)
GPU = Settings("cuda", CEILINGS)


def test_first_has_a_row_for_every_goal():
    rows = [task.row for task in suite.tasks(suite.FIRST, GPU)]
    assert len({results.key(row) for row in rows}) == len(rows)
    for goal in goals.GOALS:
        assert any(goals._asks(goal, row) for row in rows), goal.title


def test_first_fits_a_session():
    """Estimates, of four calls of eight minutes; whole models begin before half of it is over."""
    rows = plan.estimated({"first": list(suite.tasks(suite.FIRST, GPU))}, GPU)["first"]
    assert all(task.seconds > 0 for task in rows)
    assert max(task.seconds for task in rows) < suite.LIMIT_S
    assert sum(task.seconds for task in rows) < 28 * 60
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
        graphs = {name for name in counted ^ met if name.endswith("_graph")}  # a dry run has two images in place of many
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
    assert len(found) == len(set(found)) == 2 * sum(map(len, cases.ALL.values()))
    operators = {case.op for group in cases.ALL.values() for case in group}
    assert {item.case.op for item in found[: 2 * len(operators)]} == operators


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
    assert "2 of 2 right" in capsys.readouterr().out
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
