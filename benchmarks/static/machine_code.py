"""What a kernel's machine code consists of: counts for the whole kernel and for one round of its hottest loop.

NVIDIA's SASS comes from ``cuobjdump``, AMD's assembly from the compiler. A loop is what lies between a backward branch and
where it leads. The hottest is the innermost one with the most tensor-core instructions (without any: the most loads); of equals
the shortest, because a loop without masks is the one that repeats. The compiler may unroll a loop, so one round can be several
steps of the kernel's own loop: compare ratios.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas

# Registers and threads of one multiprocessor, and the shared memory that its programs divide.
MULTIPROCESSORS = {
    "sm_80": (65536, 2048, 167936),
    "sm_89": (65536, 1536, 102400),
    "sm_90": (65536, 2048, 233472),
    "sm_100": (65536, 2048, 233472),
    "sm_120": (65536, 1536, 102400),
}

# What a dependent launch must not do before it has waited for the kernels ahead (ACQBULK): read or write global memory, or let
# the next begin (PREEXIT). Prefetches (CCTL, UBLKPF) do neither.
AFTER_WAITING = r"PREEXIT|(LD|LDG|LDGSTS|LDGMC|ST|STG|STAS|ATOM|ATOMG|RED|REDG|UTMA\w+|UBLKCP|UBLKRED|UREDG?)(\..*)?"

MATRIX = r"(HGMMA|HMMA|UTCHMMA|QGMMA|QMMA|UTCQMMA|IGMMA|IMMA|UTCIMMA)\b.*|v_mfma_.*"

# What is counted, as patterns of whole opcodes: NVIDIA's first, AMD's after it.
KINDS = {
    "exp2": r"MUFU\.EX2.*|v_exp_f32\w*",
    "conversions": r"(F2FP|F2F|I2F|F2I|I2FP)\b.*|v_cvt\w+",
    "multiplications": r"FMUL2?\b.*|v_(pk_)?mul_f32\w*",
    "additions": r"FADD2?\b.*|v_(pk_)?(add|sub|subrev)_f32\w*",
    "fused": r"FFMA2?\b.*|v_(pk_)?(fma|fmac|mac|mad)_f32\w*",
    "loads": r"(LDG|LDGSTS|UTMALDG)\b.*|(global|buffer)_load\w+",
    "wide_loads": r"(LDG|LDGSTS)\b.*\.128\b.*|UTMALDG\b.*|(global|buffer)_load_dwordx4",
    "shared_loads": r"(LDS|LDSM)\b.*|ds_read\w*",
    "prefetches": r"(CCTL\b.*\.PF|UBLKPF\b).*",
    "waits": r"ACQBULK",
    "triggers": r"PREEXIT",
    "spills": r"(LDL|STL)\b.*|scratch_(load|store)\w+",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``leads_to`` is the index of the one that a branch or a call goes to, ``guarded`` whether a predicate may
    keep it from running (NVIDIA's only)."""

    opcode: str
    leads_to: int | None = None
    guarded: bool = False


@dataclass
class MachineCode:
    """One compiled kernel: what it takes (bytes a thread of stack, registers a thread) and its instructions in order."""

    registers: int
    stack: int
    instructions: list[Instruction]


def read_sass(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``; from sm_100 on CUDA 12.8's, in Triton 3.6, shows what the scheduler is told after
    the operands ("&req={1} ?trans5")."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;\n]*)", text, re.M)
    index = {int(address, 16): number for number, (address, _, _, _) in enumerate(lines)}
    instructions = []
    for _, predicate, opcode, operands in lines:
        target = re.search(r"\b0x([0-9a-f]+)(\s+[?&]\S+)*\s*$", operands) if opcode.split(".")[0] in ("BRA", "CALL") else None
        leads_to = index.get(int(target[1], 16)) if target else None
        instructions.append(Instruction(opcode, leads_to, bool(predicate)))
    return instructions


def read_amdgcn(text: str) -> list[Instruction]:
    """The instructions of AMD's assembly."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([svbgd][a-z0-9]*_\w+)\s*([^;]*)", line):
            lines.append((found[1], found[2].strip()))
    branches = ("s_branch", "s_cbranch")
    return [Instruction(opcode, labels.get(operands) if opcode.startswith(branches) else None) for opcode, operands in lines]


def loops(instructions: Sequence[Instruction]) -> list[range]:
    """The index ranges between each backward branch and where it leads, an empty loop at the end left out."""
    found = {}
    for number, instruction in enumerate(instructions):
        start = instruction.leads_to
        if start is not None and start < number:
            found[start] = range(start, max(number + 1, found.get(start, range(0)).stop))
    return list(found.values())


def count(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions there are of each kind, tensor-core instructions by name; kinds without any are left out."""
    opcodes = Counter(instruction.opcode for instruction in instructions)
    counts = Counter({"instructions": len(instructions)})
    for opcode, number in opcodes.items():
        if re.fullmatch(MATRIX, opcode):
            counts["MFMA" if opcode.startswith("v_mfma") else opcode.split(".")[0]] += number
        for kind, pattern in KINDS.items():
            if re.fullmatch(pattern, opcode):
                counts[kind] += number
    return dict(counts)


def unwaited(instructions: Sequence[Instruction]) -> list[str]:
    """Opcodes of ``AFTER_WAITING`` on some way from the beginning that has not come to the wait for the kernels ahead, and of
    branches that cannot be followed. Every branch may be taken or not, and a wait with a predicate is none."""
    seen, ahead, found = set(), [0], []
    while ahead:
        number = ahead.pop()
        if number in seen or number >= len(instructions):
            continue
        seen.add(number)
        instruction = instructions[number]
        kind = instruction.opcode.split(".")[0]
        if kind in ("ACQBULK", "EXIT", "RET") and not instruction.guarded:
            continue
        lost = kind in ("BRX", "JMX") or (kind in ("BRA", "CALL") and instruction.leads_to is None)
        if lost or re.fullmatch(AFTER_WAITING, instruction.opcode):
            found.append(instruction.opcode)
        ahead += [number + 1] if instruction.leads_to is None else [number + 1, instruction.leads_to]
    return sorted(found)


def tensor_core(counts: dict[str, int]) -> dict[str, int]:
    """The part of ``count`` that is tensor-core instructions."""
    return {name: number for name, number in counts.items() if name.isupper()}


def hottest_loop(instructions: Sequence[Instruction]) -> dict[str, int] | None:
    """``count`` of one round of the hottest loop; None where no loop loads or multiplies."""
    counted = [(body, count(instructions[body.start : body.stop])) for body in loops(instructions)]
    for weigh in (lambda counts: sum(tensor_core(counts).values()), lambda counts: counts.get("loads", 0)):
        working = [(body, counts) for body, counts in counted if weigh(counts)]
        bodies = [body for body, _ in working]
        innermost = [(body, counts) for body, counts in working if not any(_inside(other, body) for other in bodies)]
        if innermost:
            return max(innermost, key=lambda pair: (weigh(pair[1]), -pair[1]["instructions"]))[1]
    return None


def _inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def of_cubin(cubin: bytes) -> MachineCode:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump told nothing of the resources: {text[:200]!r}")
    return MachineCode(int(usage[1]), int(usage[2]), read_sass(text))


def serialized(ptx: str) -> bool:
    """Whether ptxas says (C7512 … C7515) that it waits after every product of a kernel for sm_90, so that none overlap.

    Asked again of the PTX, by the ptxas that it is written for: a kernel that Triton's cache holds has no report.
    """
    if "wgmma.mma_async" not in ptx:  # as on every GPU but sm_90
        return False
    tool = get_ptxas(90).path  # wheels carry two; for sm_90 Triton takes the older up to 3.8 and the newer in 3.9
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{source}.cubin"]
        return says_serialized(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def says_serialized(report: str) -> bool:
    """Whether ptxas's report on a kernel says that its products are serialized."""
    return re.search(r"wgmma\S* instructions are serialized", report) is not None


def of_amdgcn(text: str) -> MachineCode:
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    return MachineCode(numbers.get("vgpr_count", 0), numbers.get("private_segment_fixed_size", 0), read_amdgcn(text))


def occupancy(target: str, registers: int, shared: int, warps: int) -> float | None:
    """The share of a multiprocessor's threads that fit at once; None for GPUs whose numbers are not known here."""
    if target not in MULTIPROCESSORS:
        return None
    all_registers, threads, all_shared = MULTIPROCESSORS[target]
    allocated = math.ceil(registers / 8) * 8 * 32 * warps
    programs = min(all_registers // allocated, threads // (32 * warps), all_shared // (shared + 1024))
    return programs * 32 * warps / threads
