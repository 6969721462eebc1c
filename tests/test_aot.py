"""Every kernel at every row of every tuning table, compiled for its GPU and read, none of which need be present.

Compilation wants a Triton that does not interpret, so each target runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parent.parent
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "default"]

MAX_STACK = 32  # bytes a thread: what the compiler sets aside for calls, as against spilled tiles


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def _problems(result: dict) -> list[str]:
    found = [f"no shape reaches the row {row}" for row in result["uncovered"]]
    for row in result["rows"]:
        name = f"{row['kernel']} ({row['dtype']}, {row['row']}, for {row['asked_by'][0]})"
        if row["error"]:
            found.append(f"{name} does not compile: {row['error']}")
            continue
        if row["forward"] and (row["spills"] or row["stack"] > MAX_STACK):
            found.append(f"{name} spills: {row['stack']} bytes of stack, {row['spills']} spill instructions")
        if row["shared"] > result["shared_memory"]:
            found.append(f"{name} takes {row['shared']} bytes of shared memory of {result['shared_memory']}")
        if row["matrix"] and row["dtype"] != "fp32" and not row["tensor_core"]:
            found.append(f"{name} uses no tensor cores")
        if not row["wide_loads"] and not (row["matrix"] and row["dtype"] == "fp32"):  # float32 tiles are kept narrow
            found.append(f"{name} has no 16-byte load among its {row['loads']}")
        if row["atomics"]:
            found.append(f"{name} has {row['atomics']} atomics, whose order is not the same twice")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_at_every_row(target):
    process = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    ran = _python("-m", "benchmarks.static", "--target", target, "--json", "--jobs", process)
    assert ran.stdout, ran.stderr
    result = json.loads(ran.stdout)
    assert len(result["rows"]) > 50
    problems = _problems(result)
    assert not problems, "\n".join(problems)


def test_every_table_is_compiled():
    committed = {path.stem for path in (ROOT / "kernels" / "tables").glob("*.json")} - {"interpreter"}
    assert committed == set(TARGETS)


TOY = """
import sys
import torch
import triton
import triton.language as tl
from benchmarks import static
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


def report(kernel, target, block, num_warps=4, count=4096):
    x = torch.empty(1 << 20, device="meta")
    with record(target) as launches:
        row = {"BLOCK": block, "num_warps": num_warps}
        launch("toy", kernel, (1,), x, row, x_ptr=x, out_ptr=x, count=count)
    job = static.Job(launches[0], *static._specialize(launches[0], target), asked_by=[])
    return static.compile_job(job, target)


for target in ("sm_90", "gfx942"):
    toy = report(good, target, 1024)
    assert (toy.spills, toy.stack, toy.atomics, toy.error) == (0, 0, 0, None), toy
    assert toy.wide_loads == toy.loads > 0, toy
    toy = report(atomic, target, 1024)
    assert toy.atomics == 1, toy
    assert toy.wide_loads == 0, toy
    toy = report(spilling, target, 256, num_warps=2 if target == "gfx942" else 4)
    assert toy.stack > 32, toy
    assert toy.spills > 0, toy
    toy = report(broken, target, 64)
    assert toy.error, toy
"""


def test_the_instrument_sees_what_it_looks_for(tmp_path):
    """Spills, atomics, narrow loads and kernels that do not compile are told apart from their opposites."""
    script = tmp_path / "toys.py"
    script.write_text(TOY)
    ran = _python(str(script))
    assert ran.returncode == 0, ran.stderr


SPECIALIZATION = """
from benchmarks import static
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

jobs, _ = static.jobs("sm_90")
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
