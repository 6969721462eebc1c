"""``fastvit bench``: files, pictures and pages, going on where a run stopped, comparisons; the tables in the documentation."""

import contextlib
import io
import json
import shutil
import time

import pytest

from benchmarks import plots, results, show, suite, tables
from benchmarks.settings import Task
from fastvit import functional
from fastvit.cli.app import run

CASE = "SAM mask decoder fc1"
ONE = ["--device", "cpu", "--part", "linear", "--case", CASE, "--quick"]


def call(*arguments):
    """Runs ``fastvit bench`` with the arguments: (exit code, stdout, stderr)."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr("sys.argv", ["fastvit", "bench", *map(str, arguments)])
        patch.setattr(suite, "ceilings_of", lambda *_: {"copy_gb_s": 10.0, "gemm_tflop_s": 0.1})
        with pytest.raises(SystemExit) as exit:
            run()
    return exit.value.code, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder with the result of one case."""
    folder = tmp_path_factory.mktemp("bench")
    code, _, error = call(*ONE, "--out", folder)
    assert (code, error) == (0, "")
    return folder


@pytest.fixture
def measured(first_run, tmp_path):
    """The result of one case, in a folder of the test's own."""
    shutil.copytree(first_run, tmp_path / "old")
    (file,) = (tmp_path / "old" / "cpu").glob("*.json")
    return file


def test_a_run_writes_json_a_page_and_plots(measured):
    (row,) = results.read(measured)["rows"]
    assert row["case"] == CASE
    assert row["ours_ms"] > 0
    assert row["peers"]["eager"] > 0
    assert row["ours_cpu_ms"] > 0
    assert row["unavailable"]["compile"] == "not compiled in a quick run"
    page = measured.with_suffix(".md").read_text()
    assert CASE in page
    assert "A quick run" in page
    picture = measured.with_name(f"{measured.stem}-roofline.png")
    assert f"]({picture.name})" in page
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_already_is_not_measured_again(measured):
    before = results.read(measured)
    assert call(*ONE, "--out", measured.parents[1])[0] == 0
    assert results.read(measured)["rows"] == before["rows"]
    failed = before | {"rows": [before["rows"][0] | {"error": "x", "ours_ms": None}]}
    results.write(measured, failed)
    assert call(*ONE, "--out", measured.parents[1])[0] == 0
    assert results.read(measured)["rows"][0]["ours_ms"] > 0


def test_a_slowed_operator_is_flagged(measured, tmp_path, monkeypatch):
    right = functional.linear

    def slowed(*args, **named):
        time.sleep(0.5)
        return right(*args, **named)

    monkeypatch.setattr(functional, "linear", slowed)
    code, out, error = call(*ONE, "--out", tmp_path / "new", "--compare", measured)
    assert code == 1
    assert f"linear {CASE} forward fp32" in out
    assert "over 5 % slower" in error
    assert error.count("\n") == 1


def test_a_wrong_operator_fails_the_run_and_gets_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda input, weight, bias, activation=None: input @ weight.T)
    code, _, error = call(*ONE, "--out", tmp_path)
    assert code == 1
    assert "WrongResult" in error
    (file,) = (tmp_path / "cpu").glob("*.json")
    assert results.read(file)["rows"][0]["ours_ms"] is None


def _row(case, ms, **more):
    return results.new_row(case, "linear", "forward", "fp32", [1]) | {"ours_ms": ms} | more


def test_comparing():
    old = {
        "gpu": "none",
        "rows": [_row("slower", 1.0), _row("same", 1.0), _row("gone", 1.0), _row("broken", 1.0), _row("x", None)],
    }
    new = {"gpu": "none", "rows": [_row("slower", 1.06), _row("same", 1.04), _row("fresh", 9.0), _row("x", 5.0)]}
    new["rows"].append(_row("broken", None, error="WrongResult: y"))
    losses, notes = results.compare(old, new)
    assert [line.split(":")[0] for line in losses] == ["linear slower forward fp32 1", "linear broken forward fp32 1"]
    assert "+6%" in losses[0]
    assert "WrongResult" in losses[1]
    assert notes == ["only in the new run: linear fresh forward fp32 1", "only in the old run: linear gone forward fp32 1"]
    assert results.compare(old | {"gpu": "H200"}, new)[1][0] == "another machine: gpu was H200, is none"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu", "--part", "lin"], "expected one of models, attention"),
        (["--device", "cpu", "--part", "linear", "--case", "nothing"], "nothing"),
        ([*ONE, "--compare", "absent.json"], "absent.json"),
        ([*ONE, "--compare", "broken.json"], "is not JSON"),
        ([*ONE, "--compare", "other.json"], "no result file"),
        ([*ONE, "--out", "broken.json"], "broken.json"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rows": [{"case": 1}]}')
    code, _, error = call(*arguments)
    assert code == 1
    assert error.count("\n") == 1
    assert says in error


def _run_of(tmp_path, monkeypatch, measure):
    """A run of three rows "a", "b" and "c" whose measurement is the function given."""
    rows = [_row(name, None) for name in "abc"]
    monkeypatch.setattr(suite, "tasks", lambda part, settings: [Task(dict(row), measure) for row in rows])
    monkeypatch.setattr(suite, "ceilings_of", lambda *_: {"copy_gb_s": 10.0, "gemm_tflop_s": 0.1})
    return suite.run(suite.Run("cpu", ("linear",), tmp_path))[0]


def test_a_run_cut_short_goes_on_with_what_was_never_begun(tmp_path, monkeypatch, capsys):
    """A kernel that breaks the device ends the run; the next one begins behind it, and tries it again last."""
    order = []

    def measure(row, settings):
        order.append(row["case"])
        row["ours_ms"] = 1.0
        if row["case"] == "b":
            row["unavailable"]["eager"] = "AcceleratorError: CUDA error: an illegal memory access"
            raise RuntimeError("CUDA error: an illegal memory access")

    assert [row["case"] for row in _run_of(tmp_path, monkeypatch, measure)["rows"]] == ["a", "b"]
    assert "the device is unusable after linear b" in capsys.readouterr().err
    result = _run_of(tmp_path, monkeypatch, measure)
    assert order == ["a", "b", "c", "b"]
    assert {row["case"]: row["ours_ms"] for row in result["rows"]} == {"a": 1.0, "b": None, "c": 1.0}


def test_what_was_left_out_for_want_of_time_is_measured_again(tmp_path, monkeypatch):
    seen = []

    def measure(row, settings):
        row["ours_ms"] = 1.0
        if not seen:
            row["unavailable"]["compile"] = results.NO_TIME
        seen.append(row["case"])

    _run_of(tmp_path, monkeypatch, measure)
    result = _run_of(tmp_path, monkeypatch, measure)
    assert seen == ["a", "b", "c", "a"]
    assert not any(row["unavailable"] for row in result["rows"])


def test_after_the_deadline_nothing_is_begun(tmp_path, capsys):
    job = suite.Run("cpu", ("layer_norm",), tmp_path, deadline_s=-1.0, dry=True)
    result, _ = suite.run(job)
    assert result["rows"] == []
    assert len(result["not_begun"]) == 12
    assert "no time left for 12 rows" in capsys.readouterr().err


def test_plots_of_a_whole_table(tmp_path):
    """All three, of times that are made up: a sweep of lengths with peers, one of which is missing once."""
    rows = []
    for tokens in (197, 577, 1025):
        row = results.new_row(f"ViT-B/16 {tokens}", "attention", "forward", "fp32", [1, 2, tokens, tokens, 64])
        row |= {"ours_ms": tokens / 100, "gflop": tokens**2 / 1e4, "mbyte": tokens / 10, "peak_mb": 1.0}
        row |= {"peers": {"eager": tokens / 50}, "peers_peak_mb": {"eager": tokens**2 / 1e5}}
        rows.append(row)
    rows[0]["peers"]["sdpa"], rows[0]["peers_peak_mb"]["sdpa"] = 1.0, None
    about = {"gpu": "none", "threads": 2, "cpu": "CPU", "copy_gb_s": 10.0, "gemm_tflop_s": 0.1, "rows": rows}
    drawn = plots.draw(about, tmp_path / "x")
    assert [path.name for path in drawn] == ["x-roofline.png", "x-tokens.png", "x-memory.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_a_page_names_failures_and_losses():
    rows = [_row("lost", 2.0, peers={"eager": 1.0}, peers_peak_mb={"eager": 3.0}), _row("bad", None, error="WrongResult: z")]
    about = {
        "gpu": "none",
        "threads": 2,
        "cpu": "CPU",
        "commit": "0123456789",
        "date": "2026-01-31",
        "versions": {"torch": "2.13.0"},
    }
    page = show.page(about | {"rows": rows})
    assert "slower in 1, failed in 1" in page
    assert "| lost | forward | 1 | eager, 1.00 ms | 2.00 ms | 0.50 |" in page
    assert "- linear bad forward fp32 1: WrongResult: z" in page


def test_the_tables_in_the_documentation_agree_with_the_result_files():
    assert [path.name for path, _ in tables.stale()] == [], "run python -m benchmarks.tables"


def test_every_marked_table_is_filled_from_the_newest_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    about = {"gpu": "none", "threads": 2, "cpu": "CPU", "commit": "0123456789", "versions": {"torch": "2.13.0"}}
    for day, ms in (("2026-01-31", 1.0), ("2026-02-01", 2.0), ("2026-01-01", 3.0)):
        row = _row("ViT", ms, op="model", peers={"original": 6.0}, peers_peak_mb={"original": 10.0}, peak_mb=5.0)
        results.write(tmp_path / "cpu" / f"{day}-0123456.json", about | {"date": day, "rows": [row]})
    (tmp_path / "cpu" / "2026-03-01-0123456-quick.json").write_text("{}")
    text = tables.filled("a\n<!-- table: cpu models -->\nold\n<!-- end of table -->\nb\n", docs=False)
    assert "| ViT | 6.00 ms | 2.00 ms | 3.00 | 10 MiB → 5.0 MiB |" in text
    assert "old" not in text
    assert text.startswith("a\n<!-- table: cpu models -->\n")
    assert text.endswith("<!-- end of table -->\nb\n")
    assert tables.filled(text, docs=False) == text
    with pytest.raises(ValueError, match="no table 'x'"):
        tables.filled("<!-- table: x -->\n<!-- end of table -->", docs=False)


def test_every_published_result_can_be_read():
    files = [path for path in tables.RESULTS.rglob("[0-9]*.json")]
    assert files
    for path in files:
        json.dumps(results.read(path))
