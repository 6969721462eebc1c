"""The tuner where there is no GPU: its grid, what it rejects, what it writes, and that it goes on where it stopped.

Kernels run in the interpreter on a small case; compiling and timing are played by functions of the test.
"""

import json

import pytest
import torch
from fastvit.kernels import _tuning

import fastvit
from benchmarks import accuracy, candidates, cases, measure, operators, tune, tuning_bench, tuning_cases
from fastvit import functional
from fastvit.ops import dispatch
from tests.conftest import in_the_interpreter

pytestmark = in_the_interpreter

ABOUT = {
    "target": "interpreter", "gpu": "none", "driver": "none", "commit": "abc", "date": "today", "torch": "2", "triton": "3",
}  # fmt: skip
COMMITTED = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 4, "num_warps": 4, "TABLE": 32, "FLAG": 1}


def test_the_grid_begins_with_what_is_committed_and_goes_outwards():
    grid = candidates.grid(COMMITTED)
    assert grid[0] == COMMITTED
    changes = [sum(config[name] != value for name, value in COMMITTED.items()) for config in grid]
    assert changes == sorted(changes)
    assert max(changes) == candidates.MOST_CHANGES
    assert len({json.dumps(config) for config in grid}) == len(grid)


def test_the_grid_stays_on_the_ladders():
    for config in candidates.grid(COMMITTED):
        assert config["TABLE"] == 32
        assert config["FLAG"] == 1
        for name in ("BLOCK_M", "BLOCK_N", "num_warps"):
            assert config[name] in candidates.LADDERS[name]


def test_integers_without_a_ladder_are_halved_and_doubled():
    assert candidates.grid({"SPLITS": 8}) == [{"SPLITS": value} for value in (8, 4, 16, 2, 32)]
    assert candidates.grid({"SHORT_KEYS": 224}) == [{"SHORT_KEYS": value} for value in (224, 208, 272, 0)]


@pytest.mark.parametrize("target", [*_tuning.targets(), "default"])
def test_the_largest_attention_tile_is_a_candidate_everywhere(target):
    for row in _tuning.committed(target)["ops"]["attention_forward"]:
        wanted = row["config"] | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
        assert wanted in candidates.grid(row["config"], "attention_forward")[: tune.NEAR]


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

    def time(self, step=False):
        config = self._config()
        return measure.Timing(ms=config["BLOCK_M"] / 100 + config["BLOCK_N"] / 1000, spread=0.01)


@pytest.fixture
def grid(monkeypatch):
    """Five candidates: the committed config, one that is wrong, one that spills, one that breaks, one that is faster."""
    committed = _tuning.config("linear", "interpreter", element_size=2, rows=LINEAR.shape[0])
    found = [committed, *(committed | {"BLOCK_M": 16, "GROUP_M": group} for group in (1, 2, 3)), committed | {"BLOCK_N": 16}]
    monkeypatch.setattr(candidates, "grid", lambda config, op: found)
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
    return tune.Run([SUBJECT], "interpreter", log, said.append, inspect_all, **options)(), said


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
    times = iter([0] * 7 + [61])  # the deadline passes after two candidates
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
    monkeypatch.setattr(tune, "ROUNDS", ((False, None),))
    built, double = [], operators.double
    monkeypatch.setattr(operators, "double", lambda inputs: built.append(1) or double(inputs))
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    with pytest.raises(ValueError, match="no chosen case asks for an operator nosuch"):
        _run(log, grid, [], op="nosuch")
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
    assert not tune.Run([SUBJECT], "interpreter", log, print, late, op="linear", device="cpu", make_bench=FakeBench)()
    assert log.entries == []


@pytest.mark.parametrize("kind", ["CUDA error:", "Triton Error [CUDA]:"])
def test_a_candidate_that_breaks_the_device_ends_the_run_and_is_logged(grid, tmp_path, monkeypatch, kind):
    def broken(self, step=False):
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
    asked = dict(tune.asked(subject, "interpreter", "cpu"))
    assert op in asked
    assert direction == "backward" or "activation_backward" not in asked
    config = _tuning.config(op, "interpreter", **asked[op]) | {knob: value}
    made = [launch for launch in tuning_bench.launches(subject, op, config, "sm_90", "cpu") if launch.op == op]
    assert made
    assert all(launch.arguments[knob] == value for launch in made)


def test_the_best_cases_come_first():
    names = [(s.direction, s.case.name) for s in tune.subjects()]
    assert names[0][0] == "forward"
    assert names[0][1].startswith("ViT")
    directions = [direction for direction, _ in names]
    assert directions == sorted(directions, reverse=True)
    assert {s.case.name for s in tune.subjects("SAM-B*")} >= {"SAM-B global", "SAM-B windows"}
    assert tune.subjects("no such case") == []
    first = [s.name for s in tune.subjects()[:12]]
    assert "linear ViT-H/14 224 fc1 forward" in first
    assert "attention ViT-B/16 224 forward" in [s.name for s in tune.subjects()[:40]]
    assert all(map(tune.leads, tune.subjects()[:20]))


def test_every_operator_of_the_tables_has_a_case():
    """Small cases under record: nothing is computed."""
    found = set()
    for subject in tune.subjects():
        small = tune.Subject(subject.case.small(), subject.direction)
        found |= {op for op, _ in tune.asked(small, "sm_90", "cpu")}
    launched = {name for name in tune.names() if not name.startswith("dispatch ")}
    # Asked for where the sizes call for them, which small cases do not have.
    assert launched - found <= {
        "attention_short",
        "attention_split",
        "image_attention_backward_key",
        "image_attention_global",
        "image_attention_positions",
        "image_attention_positions_backward",
        "linear_split",
        "split_norm",
    }


WIDE = {"layer_norm wide": pytest.mark.slow}  # rows that no program holds, in many steps
CASES = {f"{case.op} {case.name}": case for case in tuning_cases.CASES}


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=WIDE.get(name, ())) for name, case in CASES.items()])
def test_the_tuners_own_cases_are_right(case):
    small = case.small()
    for direction in getattr(case, "directions", tune.DIRECTIONS):
        bench = tune.Bench(tune.Subject(small, direction), "cpu")
        with fastvit.use_backend("triton"):
            bench.check()


class Choosing(tune.Bench):
    """Takes a time that the way and the tile say; ``wrong`` computes wrongly."""

    times: dict = {}  # noqa: RUF012
    wrong = None

    def _way(self):
        held = _tuning.overridden("dispatch linear")
        return "kernel" if held is None else held["serve"]

    def run(self):
        return [t * 1.1 if self._way() == self.wrong else t for t in super().run()]

    def time(self, step=False):
        tile = _tuning.config("linear", "interpreter", element_size=2, rows=LINEAR.shape[0])["BLOCK_N"]
        ms = self.times[self._way()] - (0.05 if tile == 16 else 0)
        return measure.Timing(ms=ms * (3 if step else 1), spread=0.01)


@pytest.fixture
def choosing(monkeypatch, tmp_path):
    """``choosing(times, wrong, case)``: the log and rules of a run on the small linear, every candidate passing inspection."""
    monkeypatch.setattr(functional, "resolve", lambda tensor: "triton")
    monkeypatch.setattr(candidates, "grid", lambda config, op: [config, config | {"BLOCK_N": 16}])

    def inspect_all(subject, op, configs, seconds):
        return iter([tune.NOT_INSPECTED | {"launches": str(config)} for config in configs])

    def choose(times, wrong=None, direction="forward", case=LINEAR):
        monkeypatch.setattr(Choosing, "times", times)
        monkeypatch.setattr(Choosing, "wrong", wrong)
        log = tune.Log(tmp_path / "log.jsonl", ABOUT)
        subjects = [tune.Subject(case, direction)]
        run = tune.Run(subjects, "interpreter", log, print, inspect_all, op="*linear", device="cpu", make_bench=Choosing)
        assert run()
        return log, tune.table_of(log, 5)["dispatch"].get("linear")

    return choose


def test_a_faster_vendor_gets_a_rule(choosing):
    log, (rule,) = choosing({"kernel": 1.0, "vendor": 0.9})
    assert rule["serve"] == "vendor"
    assert rule["why"] == f"kernel 0.95 ms, vendor 0.9 ms: {SUBJECT.name}"
    assert rule["basis"] == "measured"
    rows, width, outputs = LINEAR.shape
    assert rule["when"] == {
        "activation": "gelu", "dtype": "half", "pass": "inference",
        "rows": [rows // 4, None], "width": [width, width], "outputs": [outputs, outputs],
    }  # fmt: skip
    held = [entry["config"]["with"]["linear"]["BLOCK_N"] for entry in log.of("dispatch linear", log.entries[-1]["shape"])[::2]]
    assert held == [held[0], 16], "the kernel is measured again with a better config"
    assert log.entries[-1]["committed"] == {"serve": "kernel"}


@pytest.mark.parametrize(("vendor", "serves"), [(0.94, "kernel"), (0.92, "vendor"), (1.5, "kernel")])
def test_ties_stay_with_the_kernel(choosing, vendor, serves):
    _, (rule,) = choosing({"kernel": 1.0, "vendor": vendor})
    assert rule["serve"] == serves


def test_a_wrong_vendor_gets_no_rule(choosing):
    log, (rule,) = choosing({"kernel": 1.0, "vendor": 0.5}, wrong="vendor")
    assert rule["serve"] == "kernel"
    assert [entry["reason"].split(":")[0] for entry in log.entries if entry["ms"] is None] == ["WrongResult"]


def test_training_is_decided_by_a_whole_step(choosing):
    log, (rule,) = choosing({"kernel": 1.0, "vendor": 0.9}, direction="backward")
    assert (rule["when"]["pass"], rule["serve"]) == ("training", "vendor")
    assert [entry["ms"] for entry in log.entries if entry["config"] == {"serve": "vendor"}] == [pytest.approx(2.7)]


def test_the_vendors_epilogue_is_a_candidate_where_it_is_exact():
    inference = {"pass": "inference"}
    assert tuning_bench.ways("linear", inference | {"activation": "relu"}) == ["kernel", "vendor", "vendor_fused"]
    assert tuning_bench.ways("linear", inference | {"activation": "gelu"}) == ["kernel", "vendor"]
    assert tuning_bench.ways("linear", {"pass": "training", "activation": "relu"}) == ["kernel", "vendor"]
    assert tuning_bench.ways("attention", inference) == ["kernel", "sdpa"]


def _timed(way, ms, **sizes):
    shape = {"kind": "plain", "head_dim": 64} | sizes
    return {"shape": shape, "config": {"serve": way}, "ms": ms, "case": "a case"}


def test_rules_admit_what_was_measured_and_nothing_of_another_kind():
    entries = []
    for size, sdpa in ((197, 1.5), (1024, 1.0), (4096, 0.5)):
        sizes = {"queries": size, "keys": size}
        entries += [_timed("kernel", 1.0, **sizes), _timed("sdpa", sdpa, **sizes)]
    few = {"queries": 7, "keys": 4096, "kind": "masked"}
    entries += [_timed("kernel", 1.0, **few), _timed("sdpa", 0.5, **few)]
    rules = candidates.rules(entries)

    def served(**call):
        call = {"kind": "plain", "head_dim": 64} | call
        return next((rule["serve"] for rule in rules if _tuning.admits(rule["when"], call)), None)

    assert [served(queries=n, keys=n) for n in (197, 577, 1024, 2000, 4096, 10**6)] == ["kernel"] * 3 + ["sdpa"] * 3
    assert served(queries=16, keys=16) is None, "far below what was measured"
    assert served(queries=197, keys=197, head_dim=80) is None
    assert served(queries=7, keys=4096, kind="masked") == "sdpa"


def test_the_rules_that_are_written_are_used(choosing, tmp_path, monkeypatch):
    log, _ = choosing({"kernel": 1.0, "vendor": 0.9})
    tune.write(log, tmp_path / "interpreter.json", 5)
    monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
    forget = (_tuning.table.cache_clear, _tuning.config.cache_clear, dispatch.forget)
    try:
        for clear in forget:
            clear()
        with fastvit.use_backend("auto"), dispatch.collect() as found:
            functional.linear(**LINEAR.inputs(torch.bfloat16, "cpu", False), activation="gelu")
        assert [way for way in found.values() if way.startswith("vendor: kernel 0.95 ms, vendor 0.9 ms")]
    finally:
        monkeypatch.undo()
        for clear in forget:
            clear()


def test_candidates_that_launch_the_same_are_measured_once(tmp_path, monkeypatch):
    def inspect_all(subject, op, configs, seconds):
        return iter([tune.NOT_INSPECTED | {"launches": "the same"} for _ in configs])

    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    monkeypatch.setattr(tune, "ROUNDS", ((False, 1), (False, 4)))
    tune.Run([SUBJECT], "interpreter", log, print, inspect_all, op="linear", device="cpu", make_bench=FakeBench)()
    assert [entry["ms"] is not None for entry in log.entries] == [True, False, False, False]
    assert tune.rejected(log) == []


def test_what_leads_is_measured_near_and_far_before_the_rest_begins(tmp_path, monkeypatch):
    other = tune.Subject(cases.ALL["linear"][6].small(), "forward")
    assert not tune.leads(other)
    monkeypatch.setattr(candidates, "grid", lambda config, op: [config | {"GROUP_M": group} for group in range(30)])
    monkeypatch.setattr(tune.Run, "_add", lambda self, bench, op, shape, config, committed, found: log.add(
        {"op": op, "shape": shape, "config": config, "ms": 1.0}))  # fmt: skip
    log = tune.Log(tmp_path / "log.jsonl", ABOUT)
    inspect_all = lambda subject, op, configs, seconds: iter([dict(tune.NOT_INSPECTED) for _ in configs])  # noqa: E731
    monkeypatch.setattr(
        tune, "asked", lambda subject, target, device: [("linear", {"element_size": 2, "rows": 5, "of": subject.name})]
    )
    monkeypatch.setattr(tune, "decisions", lambda *_: [])
    tune.Run([other, SUBJECT], "interpreter", log, lambda line: None, inspect_all, device="cpu", make_bench=lambda s, d: s)()
    order = [entry["shape"]["of"] for entry in log.entries]
    near = tune.NEAR
    assert order == [SUBJECT.name] * near + [other.name] * near + [other.name] * (30 - near) + [SUBJECT.name] * (30 - near)


def test_what_cannot_be_set_up_is_said_and_left_out(grid, tmp_path, monkeypatch):
    def make_bench(subject, device):
        raise RuntimeError("CUDA out of memory" if said == [] else "never again")

    log, said = tune.Log(tmp_path / "log.jsonl", ABOUT), []
    run = tune.Run(
        [SUBJECT], "interpreter", log, said.append, _inspect_all(grid, []), "linear", device="cpu", make_bench=make_bench
    )
    assert run()
    assert said == [f"{SUBJECT.name}: left out: RuntimeError: CUDA out of memory"]
    assert log.entries == []


def test_an_unknown_operator_is_one_error(monkeypatch, capsys):
    from fastvit.cli import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["fastvit", "tune", "--op", "nosuch"])
    with pytest.raises(SystemExit):
        app.run()
    error = capsys.readouterr().err
    assert error.startswith("fastvit: --op nosuch: no operator has such a name; there are")
    assert "attention_forward" in error
    assert "dispatch attention" in error


def test_without_a_gpu_it_is_one_line_and_exit_2(monkeypatch, capsys):
    from fastvit.cli import app

    monkeypatch.setattr("sys.argv", ["fastvit", "tune"])
    with pytest.raises(SystemExit) as ended:
        app.run()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
