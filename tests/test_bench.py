"""``fastvit bench``: files, pictures and pages, going on where a run stopped, comparisons; the tables in the documentation."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import time

import pytest
from fastvit.benchmarks import suite as installed_suite  # the command line's, which in a checkout is another module

from benchmarks import measure, plots, results, show, suite, tables
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
        for module in (suite, installed_suite):
            patch.setattr(module, "ceilings_of", lambda *_: {"copy_gb_s": 10.0, "gemm_tflop_s": 0.1})
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
    losses, notes, compared = results.compare(old, new)
    assert compared == 3
    assert [line.split(":")[0] for line in losses] == ["linear slower forward fp32 1", "linear broken forward fp32 1"]
    assert "+6%" in losses[0]
    assert "WrongResult" in losses[1]
    assert notes == ["only in the new run: linear fresh forward fp32 1", "only in the old run: linear gone forward fp32 1"]
    assert results.compare(old | {"gpu": "H200"}, new)[1][0] == "another machine: gpu was H200, is none"


def test_comparing_on_a_cpu_goes_by_the_anchor_and_beyond_the_spread():
    """A machine that is busier in one run slows everyone; a slowed kernel slows itself."""

    def run_of(ours, eager, spread=0.0):
        return {"gpu": "none", "rows": [_row("x", ours, peers={"eager": eager}, ours_spread=spread)]}

    assert results.compare(run_of(1.0, 2.0), run_of(2.0, 4.0))[0] == []
    (loss,) = results.compare(run_of(1.0, 2.0), run_of(1.2, 2.0))[0]
    assert "0.5 -> 0.6 of eager's time, +20%" in loss
    assert results.compare(run_of(1.0, 2.0, 0.1), run_of(1.2, 2.0, 0.1))[0] == []
    assert results.compare(run_of(1.0, 2.0, 0.05), run_of(1.2, 2.0, 0.05))[0]
    on_gpu = {"gpu": "H200"}
    assert results.compare(run_of(1.0, 2.0) | on_gpu, run_of(1.2, 4.0) | on_gpu)[0]


def test_comparing_with_nothing_in_common_is_a_mistake(measured, tmp_path):
    other = results.read(measured)
    other["rows"][0]["shape"] = [1, 2, 3]
    results.write(tmp_path / "other.json", other)
    code, out, error = call(*ONE, "--out", measured.parents[1], "--compare", tmp_path / "other.json")
    assert code == 1
    assert "0 compared" in out
    assert "nothing in it was measured in this run" in error
    assert error.count("\n") == 1


def test_a_run_without_time_for_anything_writes_nothing_and_says_so(tmp_path, monkeypatch):
    right = installed_suite.run
    monkeypatch.setattr(installed_suite, "run", lambda job, say: right(dataclasses.replace(job, deadline_s=-1.0), say))
    code, out, error = call(*ONE, "--out", tmp_path)
    assert code == 0
    assert "wrote" not in out
    assert "no time left" in error
    assert list((tmp_path / "cpu").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu", "--part", "lin"], "expected one of models, attention"),
        (["--device", "cpu", "--part", "linear", "--case", "nothing"], "nothing"),
        ([*ONE, "--compare", "absent.json"], "absent.json"),
        ([*ONE, "--compare", "broken.json"], "is not JSON"),
        ([*ONE, "--compare", "other.json"], "no result file"),
        ([*ONE, "--compare", "list.json"], "no result file"),
        ([*ONE, "--compare", "texts.json"], "no result file"),
        ([*ONE, "--out", "broken.json"], "broken.json"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rows": [{"case": 1}]}')
    (tmp_path / "list.json").write_text('{"commit": "x", "rows": [1]}')
    (tmp_path / "texts.json").write_text(json.dumps({"commit": "x", "rows": [_row("a", "fast")]}))
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

    first = _run_of(tmp_path, monkeypatch, measure)
    assert [row["case"] for row in first["rows"]] == ["a", "b"]
    assert first["broken"].startswith("linear b")
    assert "the device is unusable after linear b" in capsys.readouterr().err
    result = _run_of(tmp_path, monkeypatch, measure)
    assert order == ["a", "b", "c", "b"]
    assert {row["case"]: row["ours_ms"] for row in result["rows"]} == {"a": 1.0, "b": None, "c": 1.0}


def test_a_peer_that_broke_the_device_is_left_out_of_the_next_run(tmp_path, monkeypatch):
    seen = []

    def measure(row, settings):
        seen.append((row["case"], dict(row["unavailable"])))
        row["ours_ms"] = 1.0
        if row["case"] == "b" and "sdpa" not in row["unavailable"]:
            row["unavailable"]["sdpa"], row["broke"] = "RuntimeError: Triton Error [CUDA]: misaligned address", "sdpa"

    assert _run_of(tmp_path, monkeypatch, measure)["broken"].startswith("linear b")
    result = _run_of(tmp_path, monkeypatch, measure)
    assert "broken" not in result
    assert [case for case, _ in seen] == ["a", "b", "c", "b"]
    assert "misaligned" in seen[-1][1]["sdpa"]
    assert all(map(results.is_complete, result["rows"]))


def test_a_broken_device_fails_the_run(tmp_path, monkeypatch):
    done = {"rows": [_row("a", 1.0)], "broken": "linear a: sdpa: CUDA error: misaligned address"}
    monkeypatch.setattr(installed_suite, "run", lambda job, say: (done, None))
    code, _, error = call(*ONE, "--out", tmp_path)
    assert code == 1
    assert "left unusable by linear a: sdpa" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_changed_tree_is_another_commit(tmp_path, monkeypatch):
    """Rows are reused by commit, so what is not committed is part of its name."""
    monkeypatch.delenv("FASTVIT_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "core.hooksPath=/dev/null")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    source = tmp_path / "kernels" / "a.py"
    for path in (source, tmp_path / "benchmarks" / "results" / "x.json", tmp_path / "fastvit" / "b.py"):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = results.commit()
    assert len(clean) == 40
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("2")
    assert results.commit() == clean
    found = set()
    for text in ("2", "3"):
        source.write_text(text)
        found.add(results.commit())
    (tmp_path / "fastvit" / "new.py").write_text("1")
    found.add(results.commit())
    assert len(found) == 3
    assert all(name.startswith(f"{clean}+dirty-") for name in found)
    assert results.short(min(found)) == clean[:7] + min(found)[40:]
    monkeypatch.setattr(results, "ROOT", tmp_path / "fastvit")  # as installed: the sources themselves
    assert results.commit().startswith("v")


def test_without_git_every_source_is_part_of_the_name(tmp_path, monkeypatch):
    """A kernel, a tuning table or the instrument itself changed on a copy: its rows are another commit's. Results are not."""
    monkeypatch.delenv("FASTVIT_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results.fastvit, "__file__", str(tmp_path / "fastvit" / "__init__.py"))
    sources = ("fastvit/__init__.py", "kernels/linear.py", "kernels/tables/h100.json", "benchmarks/measure.py")
    for name in (*sources, "benchmarks/results/h100/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    found = {results.commit()}
    for name in sources:
        (tmp_path / name).write_text("2")
        found.add(results.commit())
    assert len(found) == 5
    assert all(name.startswith("v") for name in found)
    (tmp_path / "benchmarks/results/h100/x.json").write_text("2")
    assert results.commit() in found


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
    assert len(result["not_begun"]) == 16
    assert "no time left for 16 rows" in capsys.readouterr().err


def test_plots_of_a_whole_table(tmp_path):
    """All five, of times that are made up: a sweep of lengths with peers, one of which is missing once, and a model's batches."""
    rows = []
    for tokens in (197, 577, 1025):
        row = results.new_row(f"ViT-B/16 {tokens}", "attention", "forward", "fp32", [1, 2, tokens, tokens, 64])
        row |= {"ours_ms": tokens / 100, "gflop": tokens**2 / 1e4, "mbyte": tokens / 10, "peak_mb": 1.0}
        row |= {"peers": {"eager": tokens / 50}, "peers_peak_mb": {"eager": tokens**2 / 1e5}}
        rows.append(row)
    rows[0]["peers"]["sdpa"], rows[0]["peers_peak_mb"]["sdpa"] = 1.0, None
    for batch, ours in ((1, 8.0), (8, 60.0), (64, 500.0)):
        row = results.new_row(f"ViT-B/16 224, batch {batch}", "model", "forward", "fp32", [batch, 3, 224, 224])
        rows.append(
            row | {"ours_ms": ours, "floor_ms": 1.0, "peers": {"sdpa": 7.0 * batch} | ({"eager": 9.0} if batch == 1 else {})}
        )
    rows.append(results.new_row("SAM-B", "sam", "forward", "fp32", [1]) | {"error": "x"})
    rows.append(results.new_row("ViT-B/16 blocks", "chain", "forward", "bf16", []) | {"ours_ms": 1.0, "mbyte": 170.0})
    about = {"gpu": "none", "threads": 2, "cpu": "CPU", "copy_gb_s": 10.0, "gemm_tflop_s": 0.1, "rows": rows}
    drawn = plots.draw(about, tmp_path / "x")
    assert [path.name for path in drawn] == [f"x-{name}.png" for name in ("roofline", "tokens", "memory", "images", "ratios")]
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


def test_a_gpus_models_have_latencies_energy_and_reasons():
    """The fastest peer in the first table, FP8 against bf16 in the second, everyone and who is missing in the third."""
    row = _row("ViT-L, batch 64, fp8", 4.0, op="model", shape=[64, 3], p95_ms=4.5, mfu=0.5, peak_mb=100.0)
    row |= {"peers": {"torchao_float8": 6.0, "torchao_float8_compile": 5.0}, "peers_p95_ms": {"torchao_float8": 6.5}}
    row |= {"joules_an_image": 0.05, "peers_joules_an_image": {"torchao_float8_compile": 0.08}, "vs_bf16": 1.5, "bf16_ms": 6.0}
    row |= {
        "cosine": 0.99931,
        "ours": "accelerated_fp8",
        "ours_variants": {"accelerated_fp8": 4.0},
        "unavailable": {"tensorrt": "No module named x"},
    }
    failed = _row("ViT-H", None, op="model", error="WrongResult: y")
    failed |= {"energy_absent": "no NVML"}
    lines = show.model_section([row, failed], {"gpu": "H200"})
    numbers = "4.00 ms (4.50 ms), accelerated_fp8 | 16,000 | 1.25 | 50% | – → 100 MiB | 0.08 → 0.05"
    assert f"| ViT-L, batch 64, fp8 | torchao_float8_compile, 5.00 ms | {numbers} |" in lines
    assert "| ViT-L, batch 64, fp8 | 6.00 ms | 4.00 ms | 1.50 | 0.99931 |" in lines
    everyone = "torchao_float8 6.00 ms (6.50 ms), torchao_float8_compile 5.00 ms, **accelerated_fp8** 4.00 ms"
    assert f"| ViT-L, batch 64, fp8 | {everyone} | tensorrt: No module named x |" in lines
    assert any(line.endswith("| energy: no NVML |") for line in lines)
    (line,) = [line for line in lines if "**failed**" in line]
    assert line.count("|") == lines[0].count("|")


def test_of_how_many_runs_a_number_is():
    """And up to how many the 95th percentile and the quartiles are nothing but the extremes."""
    for count in range(2, 30):
        times = [1.0 + number for number in range(count)]
        assert (measure.summarize(times).p95_ms == times[-1]) == (count <= show.MAXIMUM_UP_TO)
        halves = measure.paired(measure.summarize(times), measure.summarize([1.0] * count))["ratio_quartiles"]
        assert (halves == [times[0], times[-1]]) == (count <= show.EXTREMES_UP_TO)
    said = [show.runs([_row("a", 1.0, rounds=least), _row("b", 1.0, rounds=50), _row("c", 1.0)]) for least in (2, 4, 12)]
    assert said[0] == " of 2–50 runs (of 11 or fewer, p95 is the longest; of 3 or fewer, quartiles are the extremes)"
    assert said[1:] == [" of 4–50 runs (of 11 or fewer, p95 is the longest)", " of 12–50 runs"]
    assert show.runs([_row("c", 1.0)]) == ""
    about = {"gpu": "H200", "commit": "0123456789", "date": "2026-01-31", "versions": {"torch": "2.13.0"}}
    assert "of 2 runs (of 11 or fewer, p95" in show.page(about | {"rows": [_row("a", 1.0, rounds=2)]})


def test_models_are_listed_by_batch():
    named = ["ViT-B, batch 256", "ViT-L, batch 256", "ViT-B, batch 1", "ViT-B, batch 64, fp8", "SAM", "ViT-L, batch 8"]
    ordered = [row["case"] for row in show.by_batch(_row(name, 1.0) for name in named)]
    assert ordered == [named[at] for at in (2, 0, 5, 1, 3, 4)]


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
    assert "| ViT | 6.00 ms | 2.00 ms | 500 | 3.00 | 10 MiB → 5.0 MiB |" in text
    assert "old" not in text
    assert text.startswith("a\n<!-- table: cpu models -->\n")
    assert text.endswith("<!-- end of table -->\nb\n")
    assert tables.filled(text, docs=False) == text
    with pytest.raises(ValueError, match="no table 'x'"):
        tables.filled("<!-- table: x -->\n<!-- end of table -->", docs=False)


def test_a_cpus_table_takes_every_models_newest_row_and_says_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    about = {"gpu": "none", "threads": 2, "cpu": "CPU", "versions": {"torch": "2.13.0"}}
    old, new = "timm ViT-B/16, 224 px, batch 8", "timm ViT-B/16, 224 px, batch 1"
    runs = {"01": ("aaaaaaaaaa", [(old, 1.0), ("gone", 2.0)]), "02": ("bbbbbbbbbb", [(new, 3.0), ("gone", 4.0)])}
    for day, (commit, cases) in runs.items():
        rows = [
            _row(case, ms, op="model", unavailable={"openvino": "ImportError: x"} if case == old else {}) for case, ms in cases
        ]
        rows.append(_row("step", 5.0, op="training"))
        results.write(tmp_path / "cpu" / f"2026-01-{day}.json", about | {"commit": commit, "date": day, "rows": rows})
    lines = tables.cpu_models(docs=True)
    table = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0][2:] for row in table] == [new, old, "gone", "step"]
    assert [row[-1][:7] for row in table] == ["bbbbbbb", "aaaaaaa", "bbbbbbb", "bbbbbbb"]
    assert f"Could not run: {old}: openvino: ImportError: x." in lines
    assert [line.count("[File]") for line in lines].count(1) == 2
    (tmp_path / "cpu" / "2026-01-01.json").unlink()
    assert "commit" not in tables.cpu_models(docs=True)[0]


def test_each_gpu_table_takes_the_newest_file_that_has_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    about = {"gpu": "H200", "commit": "0123456789", "versions": {"torch": "2.13.0"}}
    for day, row in (("2026-01-01", _row("ViT", 1.0, op="model")), ("2026-01-02", _row("fc1", 2.0))):
        results.write(tmp_path / "h200" / f"{day}-0123456.json", about | {"date": day, "rows": [row]})
    readme, docs = ("\n".join(tables.gpu(docs)) for docs in (False, True))
    assert "| ViT | none | 1.00 ms |" in readme
    assert "2026-01-01" in readme
    assert "fc1" not in readme
    assert "| ViT |" in docs
    assert "| fc1 |" in docs
    assert docs.count("**H200**") == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    results.write(path, {"rows": []})
    with pytest.raises(TypeError):
        results.write(path, {"rows": {1}})
    assert json.loads(path.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [path]


def test_every_published_result_can_be_read():
    files = [path for path in tables.RESULTS.rglob("[0-9]*.json")]
    assert files
    for path in files:
        json.dumps(results.read(path))
