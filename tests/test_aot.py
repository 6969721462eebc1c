"""Every kernel at every row of every tuning table, compiled for its GPU and read, none of which need be present.

Compilation wants a Triton that does not interpret, so each target runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import snapshot

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parent.parent
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "default"]


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


# Shares of a target's launches, each a test of its own, so that both workers of a test run have some at any time.
SHARES = 2


def _result(target: str, share: int) -> dict:
    number = f"{share}/{SHARES}"
    ran = _python("-m", "benchmarks.static", "--target", target, "--json", "--rows", "--jobs", "1", "--share", number)
    assert ran.stdout, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("share", range(1, SHARES + 1))
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_at_every_row(target, share):
    """Each compiles, keeps to the shared memory and the stack it may have, and (the reference Triton) is as committed."""
    result = _result(target, share)
    assert len(result["rows"]) > 75 // SHARES
    found = [f"no shape reaches {row}" for row in result["uncovered"]] + result["problems"]
    if result["triton"] == snapshot.TRITON:
        changed = snapshot.difference(snapshot.load(target)["rows"], snapshot.lines_of(result["rows"]), result["names"])
        if changed:
            found += [f"machine code is not as committed ({len(changed)} rows):", *changed]
            found.append("where that is meant, rewrite the snapshot: " + snapshot.COMMAND.format(target))
    assert not found, "\n".join(found)


def test_every_table_is_compiled():
    committed = {path.stem for path in (ROOT / "kernels" / "tables").glob("*.json")} - {"interpreter"}
    assert committed == set(TARGETS)
    assert {path.stem for path in snapshot.FOLDER.glob("*.json")} == committed


TOY = """
import sys
import torch
import triton
import triton.language as tl
from benchmarks.static import compilation, inspection
from fastvit.kernels._launch import launch, record
from triton.language.extra import libdevice


@triton.jit
def good(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < count, other=0.0), mask=lanes < count)


@triton.jit
def atomic(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + lanes, tl.load(x_ptr + lanes * 3))


@triton.jit
def spilling(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * BLOCK + column)
    for step in range(count):
        x += tl.load(x_ptr + step + column) * x
    tl.store(out_ptr + row * BLOCK + column, x)


@triton.jit
def broken(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    tile = tl.load(x_ptr + tl.arange(0, 3))
    tl.store(out_ptr + tl.arange(0, 3), tile)


@triton.jit
def multiplying(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * BLOCK + column).to(tl.bfloat16)
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for step in range(count):
        y = tl.load(x_ptr + step * BLOCK * BLOCK + row * BLOCK + column)
        acc = tl.dot(x, tl.exp2(y).to(tl.bfloat16), acc)
    tl.store(out_ptr + row * BLOCK + column, tl.exp2(acc))


def report(kernel, target, block, num_warps=4, count=4096):
    x = torch.empty(1 << 20, device="meta")
    with record(target) as launches:
        row = {"BLOCK": block, "num_warps": num_warps}
        launch("toy", kernel, (1,), x, row, x_ptr=x, out_ptr=x, count=count)
    job = compilation.Job(launches[0], *compilation.specialize(launches[0], target), asked_by=["a toy"])
    return compilation.compile_job(job, target)


for target in ("sm_90", "gfx942"):
    toy = report(good, target, 1024)
    assert (toy.stack, toy.atomics, toy.error, toy.loop) == (0, 0, None, None), toy
    assert "spills" not in toy.counts, toy
    assert toy.counts["wide_loads"] == toy.counts["loads"] > 0, toy
    assert inspection.problems(toy, 100000, []) == []
    toy = report(atomic, target, 1024)
    assert toy.atomics == 1, toy
    assert "wide_loads" not in toy.counts, toy
    assert len(inspection.problems(toy, 100000, [])) == 2
    toy = report(spilling, target, 256, num_warps=2 if target == "gfx942" else 4)
    assert toy.stack > 32, toy
    assert toy.counts["spills"] > 0, toy
    assert "bytes of stack" in inspection.problems(toy, 100000, [])[0]
    toy = report(broken, target, 64)
    assert toy.error, toy
    assert "does not compile" in inspection.problems(toy, 100000, [])[0]
    toy = report(multiplying, target, 64)
    matrix = {"sm_90": "HGMMA", "gfx942": "MFMA"}[target]
    assert toy.loop[matrix] > 0, toy
    assert toy.loop["exp2"] > 0, toy
    assert toy.loop["instructions"] < toy.counts["instructions"], toy
    assert toy.loop["exp2"] < toy.counts["exp2"], toy  # the one after the loop is not in it
"""


def test_the_instrument_sees_what_it_looks_for(tmp_path):
    """Spills, atomics, narrow loads and kernels that do not compile are told apart from their opposites."""
    script = tmp_path / "toys.py"
    script.write_text(TOY)
    ran = _python(str(script))
    assert ran.returncode == 0, ran.stderr


SPECIALIZATION = """
from benchmarks.static import compilation
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

jobs, _ = compilation.jobs("sm_90")
for job in jobs:
    for index, parameter in enumerate(job.launch.kernel.params):
        if parameter.is_constexpr:
            continue
        value = job.launch.arguments.get(parameter.name)
        special = not parameter.do_not_specialize
        kind, key = native_specialize_impl(CUDABackend, value, parameter.is_const, special, special)
        ours = job.signature[parameter.name]
        assert ours == kind, (job.launch.kernel.__name__, parameter.name, ours, kind)
        divisible = bool(isinstance(key, str) and "D" in key)
        assert divisible == bool(job.attributes.get((index,))), (job.launch.kernel.__name__, parameter.name, value, key)
print(len(jobs))
"""


def test_arguments_are_specialized_as_triton_does(tmp_path):
    """What is compiled here is what a launch on the GPU would compile."""
    script = tmp_path / "specialization.py"
    script.write_text(SPECIALIZATION)
    ran = _python(str(script))
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 50
