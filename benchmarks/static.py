"""What the compiler made of every kernel, for GPUs that need not be present.

    python -m benchmarks.static --target sm_90 [--op attention] [--json] [--jobs 2]

Every operator is run on tensors without memory, with shapes that reach every row of the target's tuning table. Its launches
are recorded instead of made, compiled as they would have been (same specialization, same options), and the machine code
is read: registers, spills, shared memory, occupancy, tensor-core instructions, load widths. A table row that no shape
reaches is reported as uncovered. Nothing is cached beyond Triton's own cache.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

# A Triton that interprets has nothing to compile; this process is only started to compile.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from fastvit.kernels._launch import Launch, record
from fastvit.kernels._tuning import table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvit.ops import attention as attention_op
from fastvit.ops import fp8 as fp8_op
from fastvit.ops import glu as glu_op
from fastvit.ops import image_attention as image_attention_op
from fastvit.ops import layer_norm as layer_norm_op
from fastvit.ops import linear as linear_op
from fastvit.ops import rotary as rotary_op
from fastvit.ops import rotary_attention as rotary_attention_op

# The table's name → the GPU it is compiled for. The default table serves GPUs without one of their own; sm_89 is such a GPU,
# with the least shared memory of those that Triton serves.
TARGETS = {name: name for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")} | {"default": "sm_89"}

# Registers and threads of one multiprocessor, and the shared memory that its programs divide.
MULTIPROCESSORS = {
    "sm_80": (65536, 2048, 167936),
    "sm_89": (65536, 1536, 102400),
    "sm_90": (65536, 2048, 233472),
    "sm_100": (65536, 2048, 233472),
    "sm_120": (65536, 1536, 102400),
}

HALF, SINGLE = torch.bfloat16, torch.float32


# --- the launches ---------------------------------------------------------------------------------------------------------


def _meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    dim: int,
    dtype: torch.dtype = HALF,
    extra: str = "plain",
    tokens: int = 197,
    queries: int | None = None,
    backward: bool = True,
) -> None:
    """q, k, v as a ViT hands them over, slices of one (B, N, 3, H, D) tensor; ``queries`` takes only so many of them."""
    query, key, value = _meta(2, tokens, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    query = query if queries is None else query[:, :, :queries]
    mask = rel_h = rel_w = None
    if extra == "boolean mask":
        mask = _meta(2, 1, 1, tokens, dtype=torch.bool)
    if extra == "additive mask":
        mask = _meta(1, 12, query.shape[2], tokens, dtype=dtype)
    if extra == "rel":
        side = math.isqrt(tokens)
        rel_h, rel_w = (_meta(2, 12, tokens, side, dtype=dtype) for _ in range(2))
    arguments = (query, key, value, mask, rel_h, rel_w)
    causal = extra == "causal"
    out, lse = attention_op.attention_forward(*arguments, causal, dim**-0.5)
    if backward:
        wants_mask = extra == "additive mask"
        attention_op.attention_backward(out, *arguments, out, lse, causal, dim**-0.5, wants_mask)


def _image_attention(dim: int, dtype: torch.dtype = HALF, window: int = 0, grid: int = 64, bare: bool = False) -> None:
    """A square image's qkv, trained with all gradients; ``bare``: no tables, padding of zeros."""
    size = [window or grid] * 2
    qkv, out_of = _meta(1, grid, grid, 3 * 12 * dim, dtype=dtype), (12, size, dim**-0.5)
    table, pad = (None, None) if bare else (_meta(2 * size[0] - 1, dim, dtype=dtype), _meta(3 * 12 * dim, dtype=dtype))
    out, *saved = image_attention_op.image_attention_forward(qkv, table, table, pad, *out_of)
    image_attention_op.image_attention_backward(out, qkv, table, table, pad, out, *saved, *out_of, not bare, not bare)


def _layer_norm(channels: int, dtype: torch.dtype = HALF, statistics: str = "token") -> None:
    x, weight, bias = _meta(8, 197, channels, dtype=dtype), _meta(channels, dtype=SINGLE), _meta(channels, dtype=SINGLE)
    y, mean, rstd = layer_norm_op.layer_norm_forward(x, weight, bias, 1e-6, statistics)
    layer_norm_op.layer_norm_backward(y, x, weight, bias, mean, rstd, statistics)


def _add_layer_norm(channels: int, dtype: torch.dtype = HALF) -> None:
    x, parameter = _meta(8, 197, channels, dtype=dtype), _meta(channels, dtype=dtype)
    y, total, mean, rstd = layer_norm_op.add_layer_norm_forward(x, x, parameter, parameter, 1e-6, parameter)
    layer_norm_op.add_layer_norm_backward(y, total, x, total, parameter, parameter, parameter, mean, rstd, dtype, dtype)


def _linear(rows: int, dtype: torch.dtype = HALF, activation: str | None = None) -> None:
    x, weight, bias = _meta(rows, 768, dtype=dtype), _meta(3072, 768, dtype=dtype), _meta(3072, dtype=dtype)
    linear_op.linear_forward(x, weight, bias, activation, False)


def _linear_training(rows: int, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = _meta(rows, 768, dtype=dtype), _meta(3072, 768, dtype=dtype), _meta(3072, dtype=dtype)
    out, pre = linear_op.linear_forward(x, weight, bias, activation, True)
    linear_op.linear_backward(out, x, weight, pre, activation, True, [True] * 3)


def _mlp_training(rows: int, dtype: torch.dtype = HALF) -> None:
    x, fc1, fc2 = _meta(rows, 768, dtype=dtype), _meta(3072, 768, dtype=dtype), _meta(768, 3072, dtype=dtype)
    fc1_bias, fc2_bias = _meta(3072, dtype=dtype), _meta(768, dtype=dtype)
    out, pre = linear_op.mlp_forward(x, fc1, fc1_bias, fc2, fc2_bias, "gelu", True)
    linear_op.mlp_backward(out, x, fc1, fc2, pre, "gelu", True, True, [True] * 5)


def _fp8(rows: int, channels: int) -> None:
    """What a block does in FP8: norm1 and qkv, norm2, fc1 and fc2."""
    x, parameter = _meta(rows, channels), _meta(channels)
    qkv, fc1, fc2 = (
        fp8_op.Fp8Weight(_meta(n, k, dtype=fp8_op.E4M3), _meta(n, dtype=SINGLE), _meta(n, dtype=SINGLE))
        for n, k in ((3 * channels, channels), (4 * channels, channels), (channels, 4 * channels))
    )
    values, scale, _ = fp8_op.fp8_quantize(x, None, None, True, parameter, parameter, 1e-6)
    fp8_op.fp8_linear(values, scale, *qkv, None, None, HALF)
    values, scale, total = fp8_op.fp8_quantize(x, x, parameter, True, parameter, parameter, 1e-6)
    hidden, scale = fp8_op.fp8_linear_quantized(values, scale, *fc1, "gelu")
    fp8_op.fp8_linear(hidden, scale, *fc2, None, total, HALF)


def _glu(channels: int, dtype: torch.dtype = HALF, activation: str = "silu") -> None:
    """Gate and value as the halves of one packed tensor."""
    gate, value = _meta(8, 197, 2 * channels, dtype=dtype).chunk(2, dim=-1)
    out = glu_op.glu_forward(gate, value, activation)
    glu_op.glu_backward(out, gate, value, activation)


def _qk_norm_rope(dim: int, norm: str | None, interleaved: bool, dtype: torch.dtype = HALF, rotate: bool = True) -> None:
    """q and k as slices of one (B, N, 3, H, D) tensor, one class token before the rotated ones."""
    query, key, _ = _meta(2, 197, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (_meta(1, 196, dim, dtype=SINGLE) if rotate else None for _ in range(2))
    weight, bias = (_meta(dim, dtype=SINGLE) if wanted else None for wanted in (norm, norm == "layer"))
    shared = (cos, sin, interleaved, norm, weight, bias, weight, bias, 1e-6)
    out = rotary_op.qk_norm_rope_forward(query, key, *shared, False)
    if norm is None:
        rotary_op.qk_norm_rope_forward(*out, *shared, True)
    else:
        rotary_op.qk_norm_rope_backward(*out, query, key, *shared)


def _rotary_attention(dim: int, norm: str | None, interleaved: bool, dtype: torch.dtype = HALF, rotate: bool = True) -> None:
    """As above with the values, of so few tokens that every row's kernel serves them."""
    query, key, value = _meta(2, 37, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (_meta(1, 36, dim, dtype=SINGLE) if rotate else None for _ in range(2))
    weight, bias = (_meta(dim, dtype=SINGLE) if wanted else None for wanted in (norm, norm == "layer"))
    parameters = (weight, bias, weight, bias)
    rotary_attention_op.rotary_attention_forward(query, key, value, cos, sin, interleaved, norm, *parameters, 1e-6, dim**-0.5)


def _bounds(target: str, name: str, ops: tuple[str, ...], beyond: int) -> list[int]:
    """One value of the shape number ``name`` for every row of ``ops``: each row's bound, and one beyond them all."""
    rows = [row for op, rows in table(target)["ops"].items() if op in ops for row in rows]
    return sorted({row["when"][name] for row in rows if name in row["when"]} | {beyond})


def workloads(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(description, operators run forward and backward) that together reach every row of the table."""
    whens = [row["when"] for op, rows in table(target)["ops"].items() if op.startswith("attention") for row in rows]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256), when.get("queries")) for when in whens}
    for element_size, dim, queries in sorted(corners, key=str):
        name, dtype = ("bf16", HALF) if element_size == 2 else ("fp32", SINGLE)
        few = f", {queries} queries" if queries else ""
        yield f"attention {name} D={dim}{few}", partial(_attention, dim, dtype, queries=queries, backward=not queries)
    for extra in ("boolean mask", "additive mask", "causal"):
        yield f"attention bf16 D=64 {extra}", partial(_attention, 64, extra=extra)
    for dim in (64, 80):
        yield f"attention bf16 D={dim} rel, 64×64 tokens", partial(_attention, dim, extra="rel", tokens=4096)
    yield "attention bf16 D=64 rel, 14×14 tokens", partial(_attention, 64, extra="rel", tokens=196, backward=False)
    yield "attention bf16 D=80", partial(_attention, 80, backward=False)
    yield "attention bf16 D=128 boolean mask", partial(_attention, 128, extra="boolean mask", backward=False)
    yield "attention fp32 D=128", partial(_attention, 128, SINGLE, backward=False)
    for dtype, name in ((SINGLE, "fp32"), (HALF, "bf16")):
        for dim in _bounds(target, "head_dim", ("attention_backward_mask",), 256):
            yield f"attention {name} D={dim} additive mask", partial(_attention, dim, dtype, extra="additive mask")

    image_ops = [rows for op, rows in table(target)["ops"].items() if op.startswith("image_attention")]
    whens = [row["when"] for rows in image_ops for row in rows]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256), when.get("keys", 4096)) for when in whens}
    for element_size, dim, keys in sorted(corners | {(2, dim, keys) for dim in (64, 80) for keys in (196, 4096)}):
        name, dtype, window = "bf16" if element_size == 2 else "fp32", HALF if element_size == 2 else SINGLE, math.isqrt(keys)
        run = partial(_image_attention, dim, dtype, 0 if window == 64 else window)
        yield f"image attention {name} D={dim}, {window}×{window} of 64×64 tokens", run
    yield "image attention bf16 D=64 bare, 14×14 of 64×64 tokens", partial(_image_attention, 64, window=14, bare=True)
    yield "image attention bf16 D=64, 100×100 tokens", partial(_image_attention, 64, grid=100)

    layer_norm_ops = ("layer_norm_forward", "layer_norm_backward")
    for channels in _bounds(target, "channels", layer_norm_ops, 16384):
        yield f"add_layer_norm bf16 C={channels}", partial(_add_layer_norm, channels)
    yield "layer_norm bf16 C=768", partial(_layer_norm, 768)
    yield "layer_norm fp32 C=768", partial(_layer_norm, 768, SINGLE)
    yield "add_layer_norm bf16 C=20000", partial(_add_layer_norm, 20000)
    yield "layer_norm bf16 C=768 image statistics", partial(_layer_norm, 768, statistics="image")

    for rows in _bounds(target, "rows", ("linear", "linear_backward"), 16384):
        yield f"linear bf16 M={rows}", partial(_linear, rows)
        yield f"linear bf16 M={rows} gelu", partial(_linear, rows, activation="gelu")
        yield f"mlp bf16 M={rows} training", partial(_mlp_training, rows)
    yield "linear fp32 M=16384 gelu", partial(_linear, 16384, SINGLE, "gelu")
    yield "mlp fp32 M=16384 training", partial(_mlp_training, 16384, SINGLE)
    yield "linear bf16 M=16384 quick_gelu training", partial(_linear_training, 16384, HALF, "quick_gelu")

    if "linear_fp8" in table(target)["ops"]:
        for rows in _bounds(target, "rows", ("linear_fp8", "linear_fp8_quantized"), 16384):
            yield f"block fp8 M={rows}", partial(_fp8, rows, 1024)
        for channels in _bounds(target, "channels", ("quantize",), 16384):
            yield f"block fp8 C={channels}", partial(_fp8, 16384, channels)

    for activation in ("silu", "gelu", "sigmoid"):
        yield f"glu bf16 C=2048 {activation}", partial(_glu, 2048, HALF, activation)
    yield "glu fp32 C=2048 gelu", partial(_glu, 2048, SINGLE, "gelu")

    for dim in _bounds(target, "dim", ("qk_norm_rope", "qk_norm_rope_backward"), 256):
        yield f"qk_norm_rope bf16 D={dim}", partial(_qk_norm_rope, dim, None, False)
        yield f"qk_norm_rope bf16 D={dim} layer interleaved", partial(_qk_norm_rope, dim, "layer", True)
        yield f"qk_norm_rope fp32 D={dim} layer", partial(_qk_norm_rope, dim, "layer", False, SINGLE)
    yield "qk_norm_rope bf16 D=80 layer", partial(_qk_norm_rope, 80, "layer", False)
    yield "qk_norm_rope bf16 D=64 rms, not rotated", partial(_qk_norm_rope, 64, "rms", False, rotate=False)

    whens = [row["when"] for row in table(target)["ops"]["rotary_attention"]]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256)) for when in whens}
    for element_size, dim in sorted(corners | {(2, 64), (2, 80)}):
        name, dtype = ("bf16", HALF) if element_size == 2 else ("fp32", SINGLE)
        yield f"rotary_attention {name} D={dim}", partial(_rotary_attention, dim, None, False, dtype)
        yield f"rotary_attention {name} D={dim} interleaved", partial(_rotary_attention, dim, None, True, dtype)
        yield f"rotary_attention {name} D={dim} layer interleaved", partial(_rotary_attention, dim, "layer", True, dtype)
    yield "rotary_attention bf16 D=64 layer", partial(_rotary_attention, 64, "layer", False)
    yield "rotary_attention bf16 D=64 rms, not rotated", partial(_rotary_attention, 64, "rms", False, rotate=False)


@dataclass
class Job:
    """One compilation and the launches that asked for it."""

    launch: Launch
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    asked_by: list[str]


def _specialize(launch: Launch, target: str) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's own launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments.get(parameter.name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
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


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def jobs(target: str, op: str = "") -> tuple[list[Job], list[str]]:
    """Every distinct compilation that the workloads ask for, and the table rows that none of them reaches."""
    found: dict[str, Job] = {}
    reached = set()
    for description, run in workloads(target):
        with record(target) as launches:
            run()
        for launch in launches:
            reached.add((launch.op, json.dumps(launch.row, sort_keys=True)))
            if op not in launch.op:
                continue
            specialized = _specialize(launch, TARGETS[target])
            key = f"{launch.kernel.__module__}.{launch.kernel.__name__} {specialized} {launch.options}"
            job = found.setdefault(key, Job(launch, *specialized, asked_by=[]))
            if description not in job.asked_by:
                job.asked_by.append(description)
    rows = [(name, row) for name, rows in table(target)["ops"].items() if op in name for row in rows]
    uncovered = [
        f"{name} when {row['when']}" for name, row in rows if (name, json.dumps(row["config"], sort_keys=True)) not in reached
    ]
    return list(found.values()), uncovered


# --- the machine code -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What one compilation came to. Sizes in bytes; counts are of instructions in the whole kernel."""

    op: str
    kernel: str
    row: dict[str, int]
    dtype: str
    asked_by: list[str]
    forward: bool
    matrix: bool
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    occupancy: float | None = None
    tensor_core: dict[str, int] = field(default_factory=dict)
    wide_loads: int = 0
    loads: int = 0
    exponentials: int = 0
    conversions: int = 0
    instructions: int = 0
    atomics: int = 0
    error: str | None = None


def _gpu_target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(report: Report, cubin: bytes, target: str, warps: int) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [_tool("cuobjdump"), file.name]
        usage = subprocess.run([*dump, "-res-usage"], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([*dump, "-sass"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told nothing of the resources: {usage[:200]!r}")
    report.registers, report.stack = map(int, found.groups())
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.M))

    def count(*prefixes: str, width: str = "") -> int:
        return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in prefixes and width in opcode)

    report.instructions = opcodes.total()
    report.spills = count("LDL", "STL")
    report.tensor_core = {name: count(name) for name in ("HGMMA", "HMMA", "UTCHMMA", "QGMMA", "QMMA", "UTCQMMA") if count(name)}
    report.loads = count("LDG", "LDGSTS", "UTMALDG")
    report.wide_loads = count("LDG", "LDGSTS", width=".128") + count("UTMALDG")
    report.exponentials = sum(n for opcode, n in opcodes.items() if opcode.startswith("MUFU.EX2"))
    report.conversions = count("F2FP", "F2F", "I2F", "F2I", "I2FP")
    registers, threads, shared = MULTIPROCESSORS[target]
    allocated = math.ceil(report.registers / 8) * 8 * 32 * warps
    programs = min(registers // allocated, threads // (32 * warps), shared // (report.shared + 1024))
    report.occupancy = programs * 32 * warps / threads


def _read_amd(report: Report, text: str) -> None:
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    opcodes = Counter(re.findall(r"^\s+([a-z][a-z0-9_]+) ", text, re.M))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))

    report.registers = numbers.get("vgpr_count", 0)
    report.stack = numbers.get("private_segment_fixed_size", 0)
    report.spills = numbers.get("vgpr_spill_count", 0)  # scalar registers spill into vector registers, not into memory
    report.instructions = count(r"[svbgd]\w+")
    report.tensor_core = {"MFMA": count(r"v_mfma\w*")} if count(r"v_mfma\w*") else {}
    report.loads = count(r"(global|buffer)_load\w+")
    report.wide_loads = count(r"(global|buffer)_load_dwordx4")
    report.exponentials = count(r"v_exp_f32\w*")
    report.conversions = count(r"v_cvt\w+")


_MATRIX_OPS = (
    "linear",
    "linear_backward",
    "linear_fp8",
    "linear_fp8_quantized",
    "attention_forward",
    "attention_backward_query",
    "attention_backward_key",
    "attention_backward_mask",
    "rotary_attention",
    "image_attention_forward",
    "image_attention_backward_query",
    "image_attention_backward_key",
    "image_attention_positions",
    "image_attention_positions_backward",
)


def compile_job(job: Job, target: str) -> Report:
    """Compiles one job for ``target`` (a GPU, not a table) and reads what came out; a failure is reported, not raised."""
    launch = job.launch
    tensors = {t.dtype for t in launch.arguments.values() if isinstance(t, Tensor)}
    dtypes = tensors & {HALF, torch.float16} or tensors & {torch.float8_e4m3fn}
    report = Report(
        op=launch.op,
        kernel=launch.kernel.__name__,
        row=launch.row,
        dtype=_TYPES[dtypes.pop()] if dtypes else "fp32",
        asked_by=job.asked_by,
        forward="backward" not in launch.kernel.__name__ and not job.constants.get("BACKWARD", False),
        matrix=launch.op in _MATRIX_OPS,
    )
    source = ASTSource(launch.kernel, job.signature, job.constants, job.attributes)
    try:
        built = triton.compile(source, target=_gpu_target(target), options=launch.options | {"enable_fp_fusion": True})
    except Exception as error:  # whatever a compiler throws is this row's result
        report.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return report
    report.shared = built.metadata.shared
    report.atomics = len(re.findall(r"\btt\.atomic", built.asm["ttir"]))
    if "cubin" in built.asm:
        _read_nvidia(report, built.asm["cubin"], target, built.metadata.num_warps)
    else:
        _read_amd(report, built.asm["amdgcn"])
    return report


@cache
def _jobs_of_this_process(target: str, op: str) -> list[Job]:
    return jobs(target, op)[0]


def _compile_numbered(target: str, op: str, number: int) -> Report:
    return compile_job(_jobs_of_this_process(target, op)[number], TARGETS[target])


def inspect(target: str, op: str = "", processes: int = 1) -> dict[str, Any]:
    """Every kernel × row of the table ``target``: {"target", "gpu", "shared_memory", "uncovered", "rows": [Report, …]}."""
    todo, uncovered = jobs(target, op)
    numbers = range(len(todo))
    if processes > 1:
        import multiprocessing

        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            reports = list(pool.map(partial(_compile_numbered, target, op), numbers))
    else:
        reports = [compile_job(job, TARGETS[target]) for job in todo]
    return {
        "target": target,
        "gpu": TARGETS[target],
        "triton": triton.__version__,
        "torch": torch.__version__,
        "shared_memory": table(target)["shared_memory"],
        "uncovered": uncovered,
        "rows": [asdict(report) for report in reports],
    }


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['target']} compiled for {result['gpu']} by Triton {result['triton']}")
    print(f"{'kernel':34} {'dtype':5} {'regs':>5} {'stack':>5} {'spills':>6} {'shared':>7} {'occ':>4}  matrix, wide/all loads")
    for row in result["rows"]:
        matrix = " ".join(f"{name}:{count}" for name, count in row["tensor_core"].items())
        occupancy = "" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
        print(
            f"{row['kernel']:34} {row['dtype']:5} {row['registers']:5} {row['stack']:5} {row['spills']:6} {row['shared']:7}"
            f" {occupancy:>4}  {matrix} {row['wide_loads']}/{row['loads']}  {row['asked_by'][0]}"
        )
        if row["error"]:
            print(f"    does not compile: {row['error']}")
    for row in result["uncovered"]:
        print(f"no shape reaches: {row}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.static")
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90", help="the tuning table (default: %(default)s)")
    parser.add_argument("--op", default="", help="only operators whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    result = inspect(options.target, options.op, options.jobs)
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        _print_table(result)
    return 1 if result["uncovered"] or any(row["error"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
