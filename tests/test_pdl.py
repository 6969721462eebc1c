"""Programmatic dependent launch: which launches are, what their machine code keeps to, and that the driver is asked for it.

Compiling and launching want a Triton that does not interpret, so they run in processes of their own. That a kernel which does
keep to it computes the same is for a GPU to show (``benchmarks/chains.py``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvit.kernels import _launch, _tuning

from benchmarks import chains, smoke
from benchmarks.settings import Settings
from benchmarks.static import compilation, inspection, machine_code
from benchmarks.static.workloads import _meta
from fastvit.ops import attention, layer_norm, linear

ROOT = Path(__file__).resolve().parents[1]
HALF, DRY = torch.bfloat16, Settings("cpu", {"gemm_tflop_s": 1.0, "copy_gb_s": 1.0}, dry=True)

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   CCTL.E.PF2 [R2] ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/               @P1 BRA {branch} ;
        /*0040*/                   {wait} ;
        /*0050*/                   PREEXIT ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   CALL.REL.NOINC 0xb0 ;
        /*00a0*/                   BRA 0x40 ;
        /*00b0*/                   RET.REL.NODEC R2 0x0 ;
"""
AFTER_THE_WAIT = ["LDGSTS.E.BYPASS.128", "PREEXIT", "STG.E.128"]


def _block(rows: int) -> None:
    """What a block launches: the norm after a sum, a product with GELU, attention."""
    x, parameter = _meta(1, rows, 768), _meta(768)
    layer_norm.add_layer_norm_forward(x, x, parameter, parameter, 1e-6, None, False)
    linear.linear_forward(x, _meta(3072, 768), _meta(3072), "gelu", False)
    query, key, value = _meta(1, rows, 3, 12, 64).permute(2, 0, 3, 1, 4).unbind(0)
    attention.attention_forward(query, key, value, None, None, None, False, 0.125)


def _launches(target: str, rows: int = 197) -> list[_launch.Launch]:
    with _launch.record(target) as launches:
        _block(rows)
    return launches


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_one_image_is_dependent_launches(target):
    for launch in _launches(target):
        assert launch.options.get("launch_pdl") is True
        assert launch.arguments["PDL"] is True


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "gfx942", "interpreter"])
def test_gpus_without_them_have_none(target):
    for launch in _launches(target):
        assert "launch_pdl" not in launch.options
        assert launch.arguments["PDL"] is False


def test_many_images_are_launched_as_ever():
    for launch in _launches("sm_90", rows=64 * 197):
        assert "launch_pdl" not in launch.options
        assert launch.arguments["PDL"] is False


def test_rows_that_ask_for_them_do_so_in_vain_before_sm_90():
    row = {"BLOCK_ROWS": 4, "PDL": 1000, "num_warps": 1}
    for target, dependent in (("sm_89", False), ("gfx942", False), ("sm_90", True), ("sm_121", True)):
        with _launch.record(target), _tuning.override("layer_norm_forward", row):
            assert _launch.dependent((1000,), _meta(1), row) is dependent
            assert not _launch.dependent((501, 2), _meta(1), row)


def test_a_tuner_leaves_it_to_the_chains():
    from benchmarks import candidates

    assert {config["PDL"] for config in candidates.grid({"BLOCK_ROWS": 4, "PDL": 528, "num_warps": 1})} == {528}


@pytest.mark.parametrize(
    ("branch", "wait", "found"),
    [
        ("0x40", "ACQBULK", []),
        ("0x90", "ACQBULK", []),  # a call, and back before the wait
        ("0x50", "ACQBULK", AFTER_THE_WAIT),  # past it
        ("0x70", "ACQBULK", ["STG.E.128"]),
        ("0x40", "NOP", AFTER_THE_WAIT),
    ],
)
def test_every_way_is_followed_to_the_wait(branch, wait, found):
    assert machine_code.unwaited(machine_code.read_sass(SASS.format(branch=branch, wait=wait))) == found


def test_a_wait_that_may_be_left_out_is_none():
    text = SASS.format(branch="0x40", wait="ACQBULK").replace("      ACQBULK", "  @P2 ACQBULK")
    assert machine_code.unwaited(machine_code.read_sass(text)) == AFTER_THE_WAIT
    lost = SASS.format(branch="0x40", wait="ACQBULK").replace("LDC R1, c[0x0][0x28]", "BRX R2 -0x10")
    assert machine_code.unwaited(machine_code.read_sass(lost)) == ["BRX"]


def test_what_is_not_kept_to_is_a_problem():
    def told(dependent: bool, **counts: int) -> str:
        report = compilation.Report("name", "linear", "_linear", {}, "bf16", [], [], True, False, dependent=dependent)
        report.counts = {"wide_loads": 1} | counts
        report.unwaited = ["LDG.E.128"] if counts.get("early") else []
        return " ".join(inspection.problems(report, 1000, []))

    assert told(True, waits=1, triggers=1) == told(False) == ""
    assert "has not waited for the kernels ahead before: LDG.E.128" in told(True, waits=1, triggers=1, early=1)
    assert "waits 0 times" in told(True, triggers=1)
    assert "is no dependent launch" in told(False, triggers=1)


def _python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]


COMPILED = """
import json
from fastvit.kernels._tuning import override
from benchmarks.static import compilation
from tests.test_pdl import _launches

found = []
for target, most in (("sm_90", 264), ("sm_90", 0), ("sm_80", 264)):
    with override("launch", {"PDL": most}):
        launch = next(launch for launch in _launches(target) if launch.op == "linear")
    job = compilation.Job(launch, *compilation.specialize(launch, target), asked_by=["a block"])
    report = compilation.compile_job(job, target)
    disciplines = [report.counts.get(kind, 0) for kind in ("waits", "triggers")]
    found.append([report.error, report.dependent, report.unwaited, *disciplines])
    if report.dependent:
        assert report.counts["prefetches"] > 0
print(json.dumps(found))
"""


@pytest.mark.aot
def test_a_linear_of_one_image_waits_before_it_reads():
    assert json.loads(_python(COMPILED)) == [[None, True, [], 1, 1], *[[None, False, [], 0, 0]] * 2]


LAUNCHED = """
import tempfile
from benchmarks import overhead

with tempfile.TemporaryDirectory() as folder:
    count = overhead.pretend_gpu(folder)
    import torch
    from fastvit import functional as F, use_backend
    from fastvit.kernels import _tuning

    weight, bias = torch.randn(2, 300, dtype=torch.float16)
    few, many = torch.randn(4, 300, dtype=torch.float16), torch.randn(4 * 528 + 1, 300, dtype=torch.float16)
    found = []
    with torch.no_grad(), use_backend("triton"):
        for x in (few, few, few, many, many):  # compiled, then by a plan, then by a recipe
            F.layer_norm(x, weight, bias)
            found.append(count()[1])
        with _tuning.override("launch", {"PDL": 0}):
            F.layer_norm(few, weight, bias)
        found += count()
print(found)
"""


@pytest.mark.aot
def test_the_driver_is_asked_for_them():
    """Triton's own launcher, the CUDA driver a stub that reads the attributes it is given."""
    assert json.loads(_python(LAUNCHED)) == [1, 2, 3, 3, 3, 6, 3]


GLOBALS = """
import importlib, json, pkgutil
from triton.runtime.jit import JITFunction
from fastvit import kernels

rooms = [importlib.import_module(f"fastvit.kernels.{room.name}") for room in pkgutil.iter_modules(kernels.__path__)]
functions = {name: value for room in rooms for name, value in vars(room).items() if isinstance(value, JITFunction)}
for _ in range(2):  # what a function uses comes to those that call it if it was hashed before them
    for function in functions.values():
        function.hash = None
        function.cache_key
assert len(functions) > 50
print(json.dumps({name: str(function.used_global_vals) for name, function in functions.items() if function.used_global_vals}))
"""


def test_no_kernel_reads_a_global():
    """Launches of those that do are never kept (``plan_of``), constants included."""
    assert json.loads(_python(GLOBALS)) == {}


CHAINED = """
import json, tempfile
from benchmarks import overhead

with tempfile.TemporaryDirectory() as folder:
    count = overhead.pretend_gpu(folder)
    import torch
    from benchmarks import chains
    from fastvit import use_backend
    from fastvit.kernels import _launch
    from fastvit.ops import _recipes, block, dispatch

    def half(*shape):
        return torch.randn(*shape, dtype=torch.float16)

    C, x = 128, half(1, 5, 128)
    tensors = [x, half(C), half(C), half(C, C), half(C), None, half(C), half(C)]
    tensors += [half(4 * C, C), half(4 * C), half(C, 4 * C), half(C)]
    tensors += [None] * (block.FIXED - len(tensors)) + [half(3 * C, C), half(3 * C)]
    options, found = block.Options(2, 1e-6, 1e-6, 0.125, "gelu", None), []

    def infer():
        before = count()
        assert block.infer(tensors, options, None, None) is not None
        found.append([now - then for now, then in zip(count(), before)])

    with torch.no_grad(), use_backend("triton"):
        for _ in range(3):  # whole, then by a recipe
            infer()
        with chains.one_after_the_other():
            infer()
        with dispatch.collect(), _launch.observe() as made:
            infer()
    found.append([sum(type(entry) is tuple for entry in made), sum(map(bool, _recipes._recipes.values()))])
print(json.dumps(found))
"""


@pytest.mark.aot
def test_a_chain_is_held_to_the_same_kernels():
    """A block whole, by its recipe, one kernel after the other, and counted: as many launches, and a recipe there is."""
    whole, *again, serial, counted, [observed, recipes] = json.loads(_python(CHAINED))
    assert whole[0] == observed >= whole[1] > 4
    assert again == [whole, whole]
    assert serial == [whole[0], 0]
    assert counted == whole
    assert recipes == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", chains.CASES[:1])
def test_chains_are_walked_through(case):
    assert case.check(DRY) == 0.0
    assert chains.why_not(case, DRY) is None


def test_smoke_checks_chains():
    assert sum(item.part == smoke.CHAINS for item in smoke.items(settings=DRY)) == len(chains.CASES)
