"""The tuner where there is no GPU: its grid, what it rejects, what it writes, and that it goes on where it stopped.

Kernels run in the interpreter on a small case; compiling and timing are played by functions of the test.
"""

import json

import pytest
import torch
from fastvit.kernels import _tuning

from benchmarks import accuracy, candidates, cases, measure, operators, tune

ABOUT = {
    "target": "interpreter", "gpu": "none", "driver": "none", "commit": "abc", "date": "today", "torch": "2", "triton": "3",
}  # fmt: skip
COMMITTED = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 4, "num_warps": 4, "MAX_TOKENS": 64}


def test_the_grid_begins_with_what_is_committed_and_goes_outwards():
    grid = candidates.grid(COMMITTED)
    assert grid[0] == COMMITTED
    changes = [sum(config[name] != value for name, value in COMMITTED.items()) for config in grid]
    assert changes == sorted(changes)
    assert max(changes) == candidates.MOST_CHANGES
    assert len({json.dumps(config) for config in grid}) == len(grid)


def test_the_grid_stays_on_the_ladders():
    for config in candidates.grid(COMMITTED):
        assert config["MAX_TOKENS"] == 64
        assert config["GROUP"] == 4
        for name in ("BLOCK_M", "BLOCK_N", "num_warps"):
            assert config[name] in candidates.LADDERS[name]
    assert candidates.grid({"MAX_TOKENS": 64}) == [{"MAX_TOKENS": 64}]


def _entry(ms, **config):
    return {"ms": ms, "config": config}


def test_a_winner_is_worth_the_change():
    assert candidates.winner([_entry(1.0, a=1), _entry(0.99, a=2)], {"a": 1})["config"] == {"a": 1}
    assert candidates.winner([_entry(1.0, a=1), _entry(0.97, a=2)], {"a": 1})["config"] == {"a": 2}
    assert candidates.winner([_entry(None, a=1), _entry(9.0, a=2)], {"a": 1})["config"] == {"a": 2}
    assert candidates.winner([_entry(None, a=1)], {"a": 1}) is None


def _won(block, **shape):
    return {"shape": shape, "config": {"BLOCK": block}, "shared": 0}


def test_rows_admit_what_was_measured_with_its_own_config():
    winners = [
        _won(1, element_size=2, head_dim=64, queries=197),
        _won(2, element_size=2, head_dim=64, queries=4096),
        _won(3, element_size=2, head_dim=80, queries=257),
        _won(4, element_size=4, head_dim=64, queries=100),
    ]
    rows = candidates.rows(winners)
    for winner in winners:
        assert _tuning.first_fitting(rows, winner["shape"], None)["config"] == winner["config"]
    taken = _tuning.first_fitting(rows, {"element_size": 2, "head_dim": 64, "queries": 100000}, None)
    assert taken["config"] == {"BLOCK": 2}  # beyond the largest size
    assert _tuning.first_fitting(rows, {"element_size": 2, "head_dim": 128, "queries": 1}, None) is None  # never a larger tile


LINEAR = cases.ALL["linear"][0].small()
SUBJECT = tune.Subject(LINEAR, "forward")


class FakeBench(tune.Bench):
    """Runs in the interpreter; takes a time that the config says, and one config computes wrongly."""

    wrong = None

    def _config(self):
        return _tuning.config("linear", "interpreter", element_size=2, rows=LINEAR.shape[0])

    def run(self):
        return [t * 1.1 if self._config() == FakeBench.wrong else t for t in super().run()]

    def time(self):
        config = self._config()
        return measure.Timing(ms=config["BLOCK_M"] / 100 + config["BLOCK_N"] / 1000, spread=0.01)


@pytest.fixture
def grid(monkeypatch):
    """Five candidates: the committed config, one that is wrong, one that spills, one that breaks, one that is faster."""
    committed = _tuning.config("linear", "interpreter", element_size=2, rows=LINEAR.shape[0])
    found = [committed, *(committed | {"BLOCK_M": 16, "GROUP_M": group} for group in (1, 2, 3)), committed | {"BLOCK_N": 16}]
    monkeypatch.setattr(candidates, "grid", lambda config: found)
    monkeypatch.setattr(FakeBench, "wrong", found[1])
    return found


def _inspect_all(grid, seen):
    def inspect_all(subject, op, configs, seconds):
        for config in configs:
            seen.append(config)
            reason = {2: "spills: 64 bytes of stack", 3: "takes 300000 bytes of shared memory of 1"}.get(grid.index(config))
            yield {"reason": reason, "registers": 32, "stack": 0, "shared": 1024}

    return inspect_all


def _run(log, grid, seen, **options):
    said = []
    inspect_all = _inspect_all(grid, seen)
    options = {"op": "linear", "device": "cpu", "make_bench": FakeBench} | options
    return tune.run([SUBJECT], "interpreter", log, said.append, inspect_all, **options), said


def test_only_right_candidates_that_fit_are_timed(grid, tmp_path):
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    complete, said = _run(log, grid, [])
    assert complete
    assert [entry["config"] for entry in log.entries] == grid
    assert [entry["ms"] is not None for entry in log.entries] == [True, False, False, False, True]
    assert "WrongResult" in log.entries[1]["reason"]
    assert log.entries[2]["reason"].startswith("spills")
    assert len(tune.rejected(log)) == 3
    (row,) = tune.table_of(log, 5)["ops"]["linear"]
    assert row["config"] == grid[4]
    assert row["shared"] == 1024
    assert "linear" in said[0]


def test_what_was_measured_is_not_measured_again(grid, tmp_path):
    log, seen = tune.Log(tmp_path / "log.jsonl", ABOUT), []
    times = iter([0, 0, 0, 0, 0, 61])  # the deadline passes after two candidates
    complete, _ = _run(log, grid, seen, minutes=1, clock=lambda: next(times))
    assert not complete
    assert len(log.entries) == 2
    again = tune.Log(tmp_path / "log.jsonl", ABOUT)
    assert again.entries == log.entries
    seen.clear()
    assert _run(again, grid, seen)[0]
    assert seen == grid[2:]


def test_a_log_of_another_gpu_is_refused(tmp_path):
    tune.Log(tmp_path / "log.jsonl", ABOUT)
    with pytest.raises(ValueError, match="was measured with gpu none, this is other"):
        tune.Log(tmp_path / "log.jsonl", ABOUT | {"gpu": "other"})


@pytest.mark.parametrize("key", ["commit", "torch", "triton", "driver"])
def test_a_log_of_other_software_is_refused_in_a_line_that_says_what_to_do(tmp_path, key):
    tune.Log(tmp_path / "log.jsonl", ABOUT)
    with pytest.raises(ValueError, match=f"was measured with {key} .*, this is other; give another --out, or delete the file"):
        tune.Log(tmp_path / "log.jsonl", ABOUT | {key: "other"})
    assert tune.Log(tmp_path / "log.jsonl", ABOUT | {"date": "tomorrow"}).entries == []


@pytest.mark.parametrize("text", ["{}\n[1]\n", "[1]\n", "a list\nof mine", "mine"])
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="is not a tuning log"):
        tune.Log(tmp_path / "log.jsonl", ABOUT)
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("half", ['{"op": "linear", "sha', '{"op": "linear×'.encode()[:-1], '{"op": "lin\n'])
def test_of_a_log_that_ends_in_half_a_line_the_rest_is_kept(grid, tmp_path, half):
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    _run(log, grid, [])
    with log.path.open("ab") as file:
        file.write(half if isinstance(half, bytes) else half.encode())
    again = tune.Log(log.path, ABOUT)
    assert again.dropped is not None
    assert again.dropped.startswith('{"op": "lin')
    assert again.entries == log.entries
    again.add(log.entries[0])  # on a line of its own
    assert tune.Log(log.path, ABOUT).entries == [*log.entries, log.entries[0]]
    assert tune.Log(log.path, ABOUT).dropped is None


def test_a_header_that_was_half_written_is_written_again(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"target": "inter')
    assert tune.Log(tmp_path / "log.jsonl", ABOUT).dropped
    assert tune.Log(tmp_path / "log.jsonl", ABOUT).dropped is None


def test_the_float64_result_is_built_for_what_is_measured_alone(grid, tmp_path, monkeypatch):
    built, double = [], operators.double
    monkeypatch.setattr(operators, "double", lambda inputs: built.append(1) or double(inputs))
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    assert _run(log, grid, [], op="nosuch")[0]
    assert built == []
    assert _run(log, grid, [])[0]
    assert built == [1]
    assert _run(log, grid, [])[0]  # all of it is in the log
    assert built == [1]


def test_a_candidate_may_err_as_eager_does(monkeypatch):
    bench = tune.Bench(SUBJECT, "cpu")
    bench.check()
    assert bench.standard is not None
    monkeypatch.setattr(bench, "standard", [accuracy.Error(0.0, 0.0)])
    with pytest.raises(accuracy.WrongResult):
        bench.check()


def test_a_compiler_that_aborts_or_hangs_is_a_result_and_the_next_is_compiled():
    codes = ["7", "__import__('os').abort()", "8", "__import__('time').sleep(600)", "9"]
    pool, inspect_all = tune.inspecting("sm_90", 0, 1, work=eval, compile_s=0.5)
    submit = pool.submit
    pool.submit = lambda subject, op, config, target, limit: submit(config["code"])
    try:
        found = list(inspect_all(SUBJECT, "linear", [{"code": code} for code in codes], 60.0))
        assert [entry for entry in found if isinstance(entry, int)] == [7, 8, 9]
        assert found[1]["reason"] == "its compilation ended with exit code -6"
        assert found[3]["reason"] == "its compilation did not end within 0.5 s"
        assert list(inspect_all(SUBJECT, "linear", [{"code": codes[3]}], 0.0)) == [None]
    finally:
        pool.close()


def test_what_the_time_does_not_suffice_for_is_not_logged(grid, tmp_path):
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    late = lambda subject, op, configs, seconds: iter([None] * len(configs))  # noqa: E731
    assert not tune.run([SUBJECT], "interpreter", log, print, late, op="linear", device="cpu", make_bench=FakeBench)
    assert log.entries == []


@pytest.mark.parametrize("kind", ["CUDA error:", "Triton Error [CUDA]:"])
def test_a_candidate_that_breaks_the_device_ends_the_run_and_is_logged(grid, tmp_path, monkeypatch, kind):
    def broken(self):
        raise RuntimeError(f"{kind} an illegal memory access was encountered")

    monkeypatch.setattr(FakeBench, "time", broken)
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    with pytest.raises(tune.Broken):
        _run(log, grid, [])
    assert len(tune.Log(tmp_path / "log.jsonl", ABOUT).entries) == 1


def test_the_table_that_is_written_is_used(grid, tmp_path, monkeypatch):
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    _run(log, grid, [])
    tune.write(log, tmp_path / "interpreter.json", 5)
    written = json.loads((tmp_path / "interpreter.json").read_text())
    assert "measured on none" in written["provenance"]
    remembered = (_tuning.table, _tuning.config)
    for lookup in remembered:
        lookup.cache_clear()
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    try:
        assert _tuning.config("linear", "interpreter", element_size=2, rows=LINEAR.shape[0]) == grid[4]
    finally:
        for lookup in remembered:
            lookup.cache_clear()


@pytest.mark.parametrize(
    ("direction", "op", "knob", "value"),
    [("forward", "linear", "BLOCK_N", 16), ("backward", "activation_backward", "BLOCK", 256)],
)
def test_a_candidate_is_what_would_be_launched(direction, op, knob, value):
    subject = tune.Subject(LINEAR, direction)
    asked = dict(tune.Bench(subject, "cpu").asked())
    assert op in asked
    assert direction == "backward" or "activation_backward" not in asked
    config = _tuning.config(op, "interpreter", **asked[op]) | {knob: value}
    made = tune.launches(subject, op, config, "sm_90", "cpu")
    assert made
    assert all(launch.op == op and launch.arguments[knob] == value for launch in made)


def test_the_best_cases_come_first():
    names = [(s.direction, s.case.name) for s in tune.subjects()]
    assert names[0][0] == "forward"
    assert names[0][1].startswith("ViT")
    directions = [direction for direction, _ in names]
    assert directions == sorted(directions, reverse=True)
    assert {s.case.name for s in tune.subjects("SAM-B*")} >= {"SAM-B global", "SAM-B windows"}
    assert tune.subjects("no such case") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_2(monkeypatch, capsys):
    from fastvit.cli import app

    monkeypatch.setattr("sys.argv", ["fastvit", "tune"])
    with pytest.raises(SystemExit) as ended:
        app.run()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
