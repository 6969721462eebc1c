"""The launches that workloads make, compiled as they would have been on the GPU: same specialization, same options.

``jobs`` records them under ``fastvit.kernels._launch.record``; ``compile_job`` compiles one and reads the machine code. Nothing
is cached beyond Triton's own cache. The process must not have ``TRITON_INTERPRET`` set when Triton is imported.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from fastvit.kernels._launch import Launch, record
from fastvit.kernels._tuning import asked, first_fitting, table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import machine_code
from .workloads import workloads

# The table's name → the GPU it is compiled for. The default table serves GPUs without one of their own; sm_89 is such a GPU,
# with the least shared memory of those that Triton serves.
TARGETS = {name: name for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")} | {"default": "sm_89"}

MATRIX_OPS = (
    "linear",
    "linear_backward",
    "linear_split_norm",
    "linear_fp8",
    "linear_fp8_quantized",
    "linear_int8",
    "linear_int8_quantized",
    "attention_forward",
    "attention_short",
    "attention_backward_query",
    "attention_backward_key",
    "attention_backward_mask",
    "attention_backward_short",
    "rotary_attention",
    "image_attention_forward",
    "image_attention_global",
    "image_attention_window",
    "image_attention_backward_query",
    "image_attention_backward_key",
    "image_attention_backward_window",
    "image_attention_positions",
    "image_attention_positions_backward",
)

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Job:
    """One compilation and the launches that asked for it."""

    launch: Launch
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    asked_by: list[str]
    rows: set[int] = field(default_factory=set)  # which rows of the operator's table it is launched for

    @property
    def dtype(self) -> str:
        """The 16-bit type among the tensors, the 8-bit one where there is none, or "fp32"."""
        found = {t.dtype for t in self.launch.arguments.values() if isinstance(t, Tensor)}
        narrow = found & {torch.bfloat16, torch.float16} or found & {torch.float8_e4m3fn, torch.int8}
        return TYPES[narrow.pop()] if narrow else "fp32"

    @property
    def name(self) -> str:
        """Operator, kernel, dtype, whether it is a dependent launch, table row, and what asked for it first."""
        row = " ".join(f"{name}={value}" for name, value in self.launch.row.items())
        how = " dependent" if self.dependent else ""
        return f"{self.launch.op} {self.launch.kernel.__name__} {self.dtype}{how} [{row}] {self.asked_by[0]}"

    @property
    def dependent(self) -> bool:
        return self.launch.options.get("launch_pdl", False)


def specialize(launch: Launch, target: str) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's own launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        default = parameter.default if parameter.has_default else None
        name, value = parameter.name, launch.arguments.get(parameter.name, default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
            if target.startswith("gfx") and value.untyped_storage().nbytes() < 2**31:
                attributes[(index,)].append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{launch.kernel.__name__}: cannot specialize {name} = {value!r}")
    return signature, constants, attributes


def _rows_of(launch: Launch, shapes: list[tuple[str, dict[str, int]]], rows: list[dict]) -> set[int]:
    """Which rows of the operator's table a launch has, its key block perhaps made narrower by the kernel's own rule."""
    looked_up = [first_fitting(rows, shape, None) for op, shape in shapes if op == launch.op]
    fixed = [{k: v for k, v in row["config"].items() if k != "BLOCK_N"} for row in rows]
    return {i for i, row in enumerate(rows) if row in looked_up and fixed[i].items() <= launch.row.items()}


def jobs(target: str, op: str = "", one_a_row: bool = False) -> tuple[list[Job], list[str]]:
    """Every distinct compilation that the workloads ask for, and the table rows that none of them reaches, or none with the
    dependent launch that the row allows.

    ``one_a_row``: of each kernel, table row and dtype, only the first, and the first dependent one.
    """
    found: dict[str, Job] = {}
    ops = table(target)["ops"]
    for description, run in workloads(target):
        with record(target) as launches, asked() as shapes:
            run()
        for launch in launches:
            if op not in launch.op:
                continue
            specialized = specialize(launch, TARGETS[target])
            key = f"{launch.op} {launch.kernel.__module__}.{launch.kernel.__name__} {specialized} {launch.options}"
            job = found.setdefault(key, Job(launch, *specialized, asked_by=[]))
            job.rows |= _rows_of(launch, shapes, ops[launch.op])
            if description not in job.asked_by:
                job.asked_by.append(description)
    reached = {(job.launch.op, row) for job in found.values() for row in job.rows}
    uncovered = [
        f"{name} when {row['when']}"
        for name, rows in ops.items()
        for number, row in enumerate(rows)
        if op in name and (name, number) not in reached
    ]
    dependent = {(job.launch.op, row) for job in found.values() if job.dependent for row in job.rows}
    uncovered += [
        f"{name} when {row['when']} by a launch of at most {row['config']['PDL']} programs"
        for name, rows in ops.items()
        for number, row in enumerate(rows)
        if op in name and row["config"].get("PDL") and (name, number) not in dependent
    ]
    todo = list(found.values())
    if one_a_row:
        firsts: dict[tuple, Job] = {}
        for job in todo:
            row = json.dumps(job.launch.row, sort_keys=True)
            firsts.setdefault((job.launch.op, job.launch.kernel.__name__, job.dtype, row, job.dependent), job)
        todo = list(firsts.values())
    return todo, uncovered


@dataclass
class Report:
    """What one compilation came to. Sizes in bytes; counts are of instructions, in the whole kernel or in the hottest loop."""

    name: str
    op: str
    kernel: str
    row: dict[str, int]
    dtype: str
    asked_by: list[str]
    rows: list[int]
    forward: bool
    matrix: bool
    registers: int = 0
    stack: int = 0
    shared: int = 0
    occupancy: float | None = None
    tensor_core: dict[str, int] = field(default_factory=dict)
    serialized: int = 0  # tensor-core instructions that ptxas waits for one by one
    counts: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] | None = None
    atomics: int = 0
    dependent: bool = False  # launched by Triton while the kernel ahead runs
    unwaited: list[str] = field(default_factory=list)  # what it does before it has waited for that one, and must not
    error: str | None = None


def _gpu_target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def compile_job(job: Job, gpu: str) -> Report:
    """Compiles one job for ``gpu`` ("sm_90", …) and reads what came out; a failure is reported, not raised."""
    launch = job.launch
    report = Report(
        name=job.name,
        op=launch.op,
        kernel=launch.kernel.__name__,
        row=launch.row,
        dtype=job.dtype,
        asked_by=job.asked_by,
        rows=sorted(job.rows),
        forward="backward" not in launch.kernel.__name__ and not job.constants.get("BACKWARD", False),
        matrix=launch.op in MATRIX_OPS,
    )
    source = ASTSource(launch.kernel, job.signature, job.constants, job.attributes)
    try:
        built = triton.compile(source, target=_gpu_target(gpu), options=launch.options | {"enable_fp_fusion": True})
    except Exception as error:  # whatever a compiler throws is this row's result
        report.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return report
    code = machine_code.of_cubin(built.asm["cubin"]) if "cubin" in built.asm else machine_code.of_amdgcn(built.asm["amdgcn"])
    report.registers, report.stack, report.shared = code.registers, code.stack, built.metadata.shared
    report.occupancy = machine_code.occupancy(gpu, code.registers, report.shared, built.metadata.num_warps)
    report.counts = machine_code.count(code.instructions)
    report.tensor_core = machine_code.tensor_core(report.counts)
    if machine_code.serialized(built.asm.get("ptx", "")):
        report.serialized = sum(report.tensor_core.values())
    report.loop = machine_code.hottest_loop(code.instructions)
    report.dependent = getattr(built.metadata, "launch_pdl", False)
    if report.dependent:
        report.unwaited = machine_code.unwaited(code.instructions)
    report.atomics = built.asm["ttir"].count("tt.atomic")
    return report
