"""The benchmark instrument where there is no GPU: its arithmetic, its schema, and that a wrong kernel gets no time."""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, gpu, measure
from fastvit import functional, reference

ROOT = Path(__file__).parent.parent
CEILINGS = {"gemm_tflop_s": 790.0, "copy_gb_s": 4300.0}
ALL = [case for group in cases.ALL.values() for case in group]

SCHEMA = {
    "case": str, "op": str, "pass": str, "dtype": str, "shape": list, "ours_ms": float, "ours_spread": float, "peers": dict,
    "floor_ms": float, "peak_mb": float, "peers_peak_mb": dict, "max_error": float,
}  # fmt: skip


def _name(case):
    return f"{case.op} {case.name}"


@pytest.mark.parametrize("part", ["attention", "linear", "layer_norm"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_has_the_schema(part, direction):
    """A dry run of the first case of each part: the same code as on a GPU, on small shapes."""
    row = gpu.run_case(cases.ALL[part][0].small(), "bf16", direction, CEILINGS, "cpu", late=False)
    assert "error" not in row
    for key, kind in SCHEMA.items():
        assert isinstance(row[key], kind), key
    assert row["peers"].keys() == row["peers_peak_mb"].keys()
    assert "eager" in row["peers"]
    assert {"compile", "compile_max_autotune"} <= row["unavailable"].keys()
    json.dumps(row)


@pytest.mark.parametrize("case", ALL, ids=_name)
def test_every_case_computes_what_its_reference_does(case):
    """Small, in float32: the contestants of a case are the same function of the same inputs."""
    case = case.small()
    ours, exact, peers = gpu.contestants(case)
    inputs = case.inputs(torch.float32, "cpu", requires_grad=False)
    expected = gpu._outputs(exact(**gpu._double(inputs)))
    for name in ("eager", "sdpa_math"):
        if name in peers:
            measure.check(name, gpu._outputs(peers[name](**inputs)), expected, torch.float32)
    measure.check("fastvit", gpu._outputs(ours(**inputs)), expected, torch.float32)


def test_a_wrong_kernel_gets_an_error_and_no_time(monkeypatch):
    monkeypatch.setattr(functional, "linear", lambda *args, **named: reference.linear(*args, **named) * 1.1)
    row = gpu.run_case(cases.LINEAR[0].small(), "bf16", "forward", CEILINGS, "cpu", late=False)
    assert row["ours_ms"] is None
    assert "WrongResult" in row["error"]
    assert gpu.ratio(row) is None


def test_a_wrong_gradient_gets_an_error_and_no_time(monkeypatch):
    """Right forward, wrong backward."""

    def detached(input, weight, bias, activation=None):
        out = reference.linear(input, weight, bias, activation=activation)
        return out + (out - out.detach())

    monkeypatch.setattr(functional, "linear", detached)
    assert "error" not in gpu.run_case(cases.LINEAR[0].small(), "bf16", "forward", CEILINGS, "cpu", late=False)
    assert "WrongResult" in gpu.run_case(cases.LINEAR[0].small(), "bf16", "backward", CEILINGS, "cpu", late=False)["error"]


def test_nan_passes_no_check():
    with pytest.raises(measure.WrongResult, match="inf"):
        measure.check("x", [torch.tensor([1.0, float("nan")])], [torch.ones(2)], torch.float32)


def test_medians_and_spread():
    timing = measure.summarize([3.0, 1.0, 2.0, 100.0, 2.0])
    assert timing.ms == 2.0
    assert timing.spread == pytest.approx(1.0)  # from 1 to 3, the outlier left out


def test_ratio_is_the_fastest_peer_over_ours():
    assert gpu.ratio({"ours_ms": 2.0, "peers": {"eager": 6.0, "compile": 3.0}}) == 1.5
    assert gpu.ratio({"ours_ms": 2.0, "peers": {}}) is None


def test_floors():
    """A square bf16 product is bound by arithmetic, a layer norm by bytes."""
    product = cases.Linear("square", 8192, 8192, 8192)
    assert cases.floor_ms(product, "forward", 2, 790.0, 4300.0) == pytest.approx(2 * 8192**3 / 790e12 * 1e3)
    norm = cases.LayerNorm("rows", 4096, 1024)
    assert cases.floor_ms(norm, "forward", 2, 790.0, 4300.0) == pytest.approx(2 * 4096 * 1024 * 2 / 4300e9 * 1e3)
    assert product.flops("step") == product.flops("forward") + product.flops("backward")


def test_inputs_rotate_beyond_the_cache():
    small, large = cases.LayerNorm("small", 16, 64), cases.LayerNorm("large", 1 << 16, 1024)
    cache = 50 << 20
    assert cases.sets_beyond_cache(small, 2, cache) == 64  # capped
    assert cases.sets_beyond_cache(large, 2, cache) == 1
    middle = dataclasses.replace(small, rows=16 * 197, channels=768)
    assert cases.sets_beyond_cache(middle, 2, cache) * middle.bytes("forward", 2) >= 2 * cache


def test_a_part_run_alone_joins_the_file():
    row = {"case": "a", "op": "linear", "pass": "forward", "dtype": "bf16", "ours_ms": 1.0}
    old = {"commit": "c", "rows": [row, row | {"case": "b"}]}
    new = {"commit": "c", "rows": [row | {"ours_ms": 2.0}]}
    assert gpu.merge(old, new)["rows"] == [row | {"case": "b"}, row | {"ours_ms": 2.0}]
    assert gpu.merge(old | {"commit": "other"}, new) == new
    assert gpu.merge(None, new) == new


def test_the_result_file_is_named_by_gpu_day_and_commit(tmp_path):
    about = {"gpu": "NVIDIA H200 141GB", "commit": "0123456789"}
    path = gpu.result_path(tmp_path, about, datetime.date(2026, 1, 31))
    assert path == tmp_path / "nvidia-h200-141gb" / "2026-01-31-0123456.json"


def test_losses_are_printed_first(capsys):
    base = {"op": "linear", "pass": "forward", "floor_ms": 0.5, "ours_ms": 1.0}
    gpu.print_rows([base | {"case": "won", "peers": {"eager": 2.0}}, base | {"case": "lost", "peers": {"eager": 0.5}}])
    printed = capsys.readouterr().out
    assert printed.index("lost") < printed.index("won")
    assert "0.50" in printed


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


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--part", "layer_norm", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "no measurements" in capsys.readouterr().out
