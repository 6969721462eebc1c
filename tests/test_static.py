"""Reading machine code and comparing it with what is committed, on texts written by hand: nothing is compiled."""

import json
import os

import pytest

from benchmarks.static import machine_code, snapshot

# A masked loop of one product inside a loop over heads, after an unmasked loop of the same product.
SASS = """
 Function kernel:
  REG:40 STACK:16 SHARED:0
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   MUFU.EX2 R5, R5 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   FSEL R5, R5, R6, P1 ;
        /*0070*/                   FMUL R5, R5, R6 ;
        /*0080*/                   MUFU.EX2 R5, R5 ;
        /*0090*/               @P0 BRA 0x50 ;
        /*00a0*/                   STL [R1], R5 ;
        /*00b0*/               @P0 BRA 0x40 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""

AMDGCN = """
kernel:
.LBB0_1:
\ts_waitcnt lgkmcnt(0)
\tglobal_load_dwordx4 v[4:7], v[2:3], off
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[4:5], v[6:7], a[0:15]
\tv_exp_f32_e32 v1, v1
\ts_cbranch_scc1 .LBB0_1
\tscratch_store_dword off, v1, s0
\ts_cbranch_vccnz .LBB0_2
.LBB0_2:
\ts_endpgm
"""


def test_loops_are_backward_branches():
    instructions = machine_code.read_sass(SASS)
    assert instructions == machine_code.read_sass(SASS.replace(" ;", "            &req={1,0}         ?trans5;")), (
        "for the scheduler"
    )
    assert [(body.start, body.stop) for body in machine_code.loops(instructions)] == [(1, 4), (5, 10), (4, 12)]


def test_the_hottest_loop_is_the_short_one_of_those_with_most_products():
    loop = machine_code.hottest_loop(machine_code.read_sass(SASS))
    assert loop == {"instructions": 3, "HGMMA": 1, "exp2": 1}


def test_counts_are_of_the_whole_kernel():
    counts = machine_code.count(machine_code.read_sass(SASS))
    expected = {"instructions": 14, "HGMMA": 2, "exp2": 2, "multiplications": 1, "loads": 2, "wide_loads": 1, "spills": 1}
    assert counts == expected
    assert machine_code.tensor_core(counts) == {"HGMMA": 2}


def test_amd_assembly_is_read_alike():
    instructions = machine_code.read_amdgcn(AMDGCN)
    assert machine_code.count(instructions) | {"instructions": 0} == {
        "instructions": 0, "MFMA": 1, "exp2": 1, "loads": 1, "wide_loads": 1, "spills": 1,
    }  # fmt: skip
    assert machine_code.hottest_loop(instructions) == {"instructions": 5, "loads": 1, "wide_loads": 1, "MFMA": 1, "exp2": 1}


def test_a_kernel_without_a_working_loop_has_none():
    spin = [machine_code.Instruction("SYNCS"), machine_code.Instruction("BRA", 0), machine_code.Instruction("EXIT")]
    assert machine_code.hottest_loop(spin) is None


def test_occupancy_is_bound_by_what_runs_out_first():
    assert machine_code.occupancy("sm_90", 128, 0, 8) == 0.25  # registers: two programs of 256 threads in 2048
    assert machine_code.occupancy("sm_90", 32, 100 * 1024, 4) == 0.125  # shared memory: two of 128
    assert machine_code.occupancy("sm_90", 16, 0, 4) == 1.0
    assert machine_code.occupancy("gfx942", 16, 0, 4) is None


REPORT = """
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions \
defining accumulator registers of a wgmma between start and end of the pipeline stage in the function '_kernel'
ptxas info    : Compiling entry function '_kernel' for 'sm_90a'
ptxas info    : Used 128 registers, used 1 barriers
"""


def test_ptxas_says_where_it_waits_for_each_product():
    assert machine_code.says_serialized(REPORT)
    assert not machine_code.says_serialized("\n".join(REPORT.splitlines()[3:]))


def test_no_kernel_may_wait_for_each_product():
    from benchmarks.static import compilation, inspection

    for serialized in (0, 12):
        arguments = {"op": "attention", "row": {}, "dtype": "bf16", "rows": [], "forward": True, "matrix": True}
        report = compilation.Report(name="name", kernel="kernel", asked_by=["asker"], **arguments, serialized=serialized)
        report.counts, report.tensor_core = {"wide_loads": 1}, {"HGMMA": 12}
        found = ["name waits for each of its 12 tensor-core instructions (ptxas: serialized)"] if serialized else []
        assert inspection.problems(report, 0, []) == found


def test_what_other_releases_of_triton_may_take():
    """The stack that is known of them, and shared memory beyond the row's word as long as that leads no GPU astray."""
    from benchmarks.static import compilation, inspection

    arguments = {"op": "attention", "row": {}, "dtype": "bf16", "rows": [0], "forward": True, "matrix": False}
    report = compilation.Report(name="name", kernel="kernel", asked_by=["asker"], **arguments, stack=40)
    report.counts = {"wide_loads": 1, "spills": 6}
    spills = "name spills: 40 bytes of stack, 6 spill instructions"
    for known, found in ((0, [spills]), (39, [spills]), (40, [])):
        assert inspection.problems(report, 232448, [{}], known) == found
    for stated, taken, found in ((65536, 101376, 0), (101376, 101377, 1), (101377, 166912, 0), (200000, 232449, 1)):
        report.shared = taken
        assert len(inspection.problems(report, 232448, [{"shared": stated}], 40)) == found


def _row(name, registers, **loop):
    counts = {"instructions": 100, "HGMMA": 4}
    return {
        "name": name, "registers": registers, "stack": 0, "shared": 0, "occupancy": 0.25, "counts": counts,
        "tensor_core": {"HGMMA": 4}, "serialized": 0, "loop": {"instructions": 50} | loop,
    }  # fmt: skip


def test_a_difference_names_row_value_before_and_after():
    old = snapshot.lines_of([_row("a", 128, exp2=16), _row("b", 40), _row("c", 40), _row("elsewhere", 40)])
    new = snapshot.lines_of([_row("a", 140, exp2=18, spills=2), _row("b", 40), _row("d", 40)])
    assert snapshot.difference(old, new, ["a", "b", "d", "elsewhere"]) == [
        "c: is gone",
        "a: registers 128 → 140, loop exp2 16 → 18, loop spills 0 → 2",
        "d: is new",
    ]
    assert snapshot.difference(old, {name: old[name] for name in "ab"}, list(old)) == []


def test_a_snapshot_is_a_row_a_line():
    lines = snapshot.lines_of([_row("b", 40), _row("a", 128, exp2=16), _row("a", 64)])
    text = snapshot.dump("sm_90", "3.7.1", lines)
    assert json.loads(text) == {"target": "sm_90", "triton": "3.7.1", "rows": lines}
    (line,) = [line for line in text.splitlines() if '"a"' in line]
    assert '"registers": 128' in line
    assert "serialized" not in line
    assert snapshot.lines_of([_row("a", 128) | {"serialized": 4}])["a"]["serialized"] == 4
    assert '"loop": {"instructions": 50, "exp2": 16}' in line
    assert "stack" not in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "nosuch"], "--op: got nosuch, expected a part of one of activation_backward, "),
        (["--share", "a/b"], "--share: got a/b, expected K/N"),
        (["--share", "0/2"], "--share: got 0/2, expected K/N"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(monkeypatch, capsys, arguments, words):
    from benchmarks.static import inspection  # noqa: F401  kernels are imported before the interpreter is switched off

    for name in ("TRITON_INTERPRET", "FASTVIT_TABLES"):  # the command's module takes them out of the environment
        monkeypatch.setenv(name, os.environ.get(name, ""))
    from benchmarks.static import __main__ as command

    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
