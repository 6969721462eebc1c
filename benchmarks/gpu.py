"""The kernels on a GPU: the test suite, then their times against eager PyTorch, every SDPA backend and torch.compile.

    python -m benchmarks.gpu [--part tests|attention|linear|layer_norm|models] [--out DIR]

Writes ``DIR/<gpu>/<date>-<commit>.json`` after every row, so that a run cut short keeps what it measured, and prints a
table, losses first. A part run alone joins the file of the same day and commit (``FASTVIT_COMMIT`` names the commit where
git cannot). After ``--deadline`` seconds nothing more is begun; shortly before, torch.compile is left out. Each row's result
is checked against float64 before it is timed. Without a GPU: one sentence and exit status 2. ``--device cpu`` walks through
the same code with tiny shapes, measures nothing worth keeping and writes nothing.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from benchmarks import cases, measure
from fastvit import functional, reference

ROOT = Path(__file__).parent.parent
PARTS = ("tests", "attention", "linear", "layer_norm", "models")
DEADLINE_S = 440  # from here on nothing is begun
COMPILING_SHARE = 0.75  # of a part's share of the time; after it torch.compile is left out, and the rows say so

Function = Callable[..., Any]


# --- what is compared -----------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend | None, query, key, value, attn_mask=None, rel_h=None, rel_w=None, is_causal=False):
    """PyTorch's fused attention as models call it (its own choice without a backend): a decomposed bias is written out first."""
    bias = attn_mask
    if rel_h is not None:
        bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=is_causal)


def _activation(x, activation):
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return reference.activate(x, activation)


def _eager_linear(input, weight, bias, activation=None):
    return _activation(F.linear(input, weight, bias), activation)


def _eager_layer_norm(input, weight, bias):
    return F.layer_norm(input, input.shape[-1:], weight, bias, 1e-6)


def _eager_add_layer_norm(residual, branch, weight, bias, layer_scale):
    total = residual + layer_scale * branch
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-6), total


def _compiled(function: Function, mode: str | None = None) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, mode=mode)


def contestants(case: cases.Case) -> tuple[Function, Function, dict[str, Function]]:
    """(ours, the float64 reference, the peers by name); a peer is built when it is called for the first time."""
    options: dict[str, Any] = {}
    peers: dict[str, Function] = {}
    if case.op == "attention":
        options = {"is_causal": case.causal}
        eager: Function = reference.attention
        backends = {
            "sdpa": None,
            "sdpa_flash": SDPBackend.FLASH_ATTENTION,
            "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
            "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa_math": SDPBackend.MATH,
        }
        peers = {name: functools.partial(_sdpa, backend, **options) for name, backend in backends.items()}
    elif case.op == "linear":
        options, eager = {"activation": case.activation}, _eager_linear
    else:
        eager = {"layer_norm": _eager_layer_norm, "add_layer_norm": _eager_add_layer_norm}[case.op]
    eager = functools.partial(eager, **options)
    compiled = peers.get("sdpa", eager)  # what a model that is compiled calls
    peers = {"eager": eager} | peers | {"compile": compiled, "compile_max_autotune": compiled}
    ours = functools.partial(getattr(functional, case.op), **options)
    return ours, functools.partial(getattr(reference, case.op), **options), peers


# --- one row --------------------------------------------------------------------------------------------------------------


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _leaves(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def _gradients(function: Function, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_outputs(function(**inputs)), _leaves(inputs), upstream)


def _results(function: Function, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...], direction: str) -> tuple[Tensor, ...]:
    """What is checked: the outputs, or every gradient."""
    if direction == "forward":
        with torch.no_grad():
            return _outputs(function(**inputs))
    return _gradients(function, inputs, upstream)


def _calls(function: Function, sets: list[dict[str, Tensor]], upstream: tuple[Tensor, ...], direction: str) -> list[Callable]:
    """What is timed, once for every set of inputs. Backward is timed alone, on graphs recorded beforehand."""
    if direction == "forward":

        def forward(inputs):
            with torch.no_grad():
                return function(**inputs)

        return [functools.partial(forward, inputs) for inputs in sets]
    recorded = [(_outputs(function(**inputs)), _leaves(inputs)) for inputs in sets]
    return [functools.partial(torch.autograd.grad, outputs, leaves, upstream, retain_graph=True) for outputs, leaves in recorded]


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def run_case(case: cases.Case, dtype_name: str, direction: str, ceilings: dict[str, float], device: str, late: bool) -> dict:
    """One row of the result file. Whatever goes wrong is in the row: a wrong kernel gets an ``error`` and no time."""
    dtype = cases.DTYPES[dtype_name]
    element = torch.empty(0, dtype=dtype).element_size()
    ours, exact_function, peers = contestants(case)
    row: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "pass": direction,
        "dtype": dtype_name,
        "shape": case.shape,
        "ours_ms": None,
        "ours_spread": None,
        "peers": {},
        "floor_ms": cases.floor_ms(case, direction, element, ceilings["gemm_tflop_s"], ceilings["copy_gb_s"]),
        "peak_mb": None,
        "peers_peak_mb": {},
        "max_error": None,
        "unavailable": {},
    }
    torch.manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    needs_grad = direction != "forward"
    sets = [case.inputs(dtype, device, needs_grad) for _ in range(cases.sets_beyond_cache(case, element, cache))]
    with torch.no_grad():
        upstream = tuple(torch.randn_like(out) for out in _outputs(peers["eager"](**sets[0])))
    exact = [t.cpu() for t in _results(exact_function, _double(sets[0]), tuple(u.double() for u in upstream), direction)]

    def timed(name: str, function: Function) -> tuple[float, measure.Timing]:
        results = [t.cpu() for t in _results(function, sets[0], upstream, direction)]
        error = measure.check(name, results, exact, dtype)
        budget_s = 0.2 if device == "cuda" else 0.0
        # A backward pass runs on the stream its forward was recorded on, which a graph of its own cannot capture.
        return error, measure.measure(
            _calls(function, sets, upstream, direction), device, budget_s, graphs=direction == "forward"
        )

    try:
        with fastvit.use_backend("auto" if device == "cuda" else "torch"):  # what a user gets, dispatch included
            row["max_error"], timing = timed("fastvit", ours)
        row |= {"ours_ms": timing.ms, "ours_spread": timing.spread, "peak_mb": timing.peak_mb}
        if device == "cuda":
            with fastvit.use_backend("triton"):  # the kernel alone
                row["kernel_ms"] = timed("kernel", ours)[1].ms
    except Exception as error:  # a failing kernel is a result too
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    for name, function in peers.items():
        if name.startswith("compile") and device == "cpu":
            row["unavailable"][name] = "not compiled in a dry run"
            continue
        if name.startswith("compile") and (late or (name.endswith("autotune") and direction == "backward")):
            row["unavailable"][name] = "left out: no time" if late else "timed in forward only"
            continue
        try:
            if name.startswith("compile"):
                function = _compiled(function, "max-autotune-no-cudagraphs" if name.endswith("autotune") else None)
            _, timing = timed(name, function)
            row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
        except Exception as error:  # whatever a peer throws, it does not serve this case
            row["unavailable"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def ratio(row: dict) -> float | None:
    """The fastest peer's time over ours: above 1 we win. None without a time on either side."""
    if not row["ours_ms"] or not row["peers"]:
        return None
    return min(row["peers"].values()) / row["ours_ms"]


# --- whole models ---------------------------------------------------------------------------------------------------------


def _models() -> Iterator[tuple[str, Callable[[], torch.nn.Module], list[int]]]:
    with contextlib.suppress(ImportError):
        import timm

        for name, label, batch in (
            ("vit_base_patch16_224", "timm ViT-B/16 224", 64),
            ("vit_large_patch16_224", "timm ViT-L/16 224", 32),
        ):
            yield label, functools.partial(timm.create_model, name), [batch, 3, 224, 224]
    with contextlib.suppress(ImportError):
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14)
        yield "Hugging Face DINOv2-B 518", lambda: Dinov2Model(config), [8, 3, 518, 518]


def _last_tensor(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def run_model(label: str, build: Callable, shape: list[int], ceilings: dict[str, float], device: str, late: bool) -> dict:
    """Inference of a whole bf16 model: ours is accelerated in place, the peers are what it was before."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = build().eval().to(device)
    x = torch.randn(shape, device=device)
    with torch.no_grad():
        exact = _last_tensor(model(x)).float().cpu()  # float32: whole models in float64 do not fit beside the rest
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            model(x)
    flops = counter.get_total_flops()
    row: dict[str, Any] = {
        "case": label,
        "op": "model",
        "pass": "forward",
        "dtype": "bf16",
        "shape": shape,
        "ours_ms": None,
        "ours_spread": None,
        "peers": {},
        "floor_ms": flops / (ceilings["gemm_tflop_s"] * 1e9),
        "peak_mb": None,
        "peers_peak_mb": {},
        "max_error": None,
        "unavailable": {},
    }

    def timed(name: str, run: Callable) -> tuple[float, measure.Timing]:
        def call():
            with torch.no_grad():
                return run(x)

        error = measure.relative_error([_last_tensor(call()).float().cpu()], [exact])
        if not error <= 0.05:  # bf16 through some fifty layers; eager's own is about 0.01
            raise measure.WrongResult(f"{name} errs by {error:.2g} of float32's result")
        return error, measure.measure([call], device, budget_s=1.0 if device == "cuda" else 0.0)

    modes: dict[str, Callable[[], Callable]] = {
        "eager": lambda: model,
        "compile": lambda: _compiled(model),
        "compile_max_autotune": lambda: _compiled(model, "max-autotune-no-cudagraphs"),
    }
    for name, make in modes.items():
        if name != "eager" and (late or device == "cpu"):
            row["unavailable"][name] = "left out: no time"
            continue
        try:
            _, timing = timed(name, make())
            row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
        except Exception as error:
            row["unavailable"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    try:
        accelerated = fastvit.accelerate(model)
        timed("accelerated", accelerated)
        served = fastvit.report(accelerated)
        if not served.replaced or served.fallbacks:
            raise RuntimeError(f"not served: {served.fallbacks or served.skipped or 'no block of a known layout'}")
        row["served_blocks"] = len(served.replaced)
        candidates = {"accelerated": lambda: accelerated, "accelerated, compiled": lambda: _compiled(accelerated)}
        for name, make in candidates.items():
            if device == "cpu" and name != "accelerated":
                continue
            error, timing = timed(name, make())
            if row["ours_ms"] is None or timing.ms < row["ours_ms"]:
                row |= {"ours_ms": timing.ms, "ours_spread": timing.spread, "peak_mb": timing.peak_mb, "max_error": error}
                row["ours"] = name
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


# --- the run --------------------------------------------------------------------------------------------------------------


def ceilings_of(device: str) -> dict[str, float]:
    """The two rates everything is held against: a large copy (bytes read plus written) and a large bf16 matrix product."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 22, 256)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure.measure([lambda: target.copy_(source)], device)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = measure.measure([lambda: a @ b], device)
    return {"copy_gb_s": 2 * size / copy.ms / 1e6, "gemm_tflop_s": 2 * side**3 / product.ms / 1e9}


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastvit": fastvit.__version__,
    }
    if device != "cuda":
        return {"gpu": "none", "driver": "none", "commit": _commit(), "versions": versions}
    versions["cuda"] = str(torch.version.cuda or torch.version.hip)
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit", "--format=csv,noheader")
    driver, *state = (part.strip() for part in _output_of(*query).partition("\n")[0].split(","))
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "clocks": state,
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str:
    return os.environ.get("FASTVIT_COMMIT") or _output_of("git", "rev-parse", "HEAD")


def result_path(out: Path, about: dict[str, Any], day: datetime.date) -> Path:
    folder = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    return out / folder / f"{day.isoformat()}-{about['commit'][:7]}.json"


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The new file with the rows of an older run of the same commit that were not measured again."""
    if old is None or old.get("commit") != new["commit"]:
        return new

    def key(row):
        return row["case"], row["op"], row["pass"], row["dtype"]

    measured = {key(row) for row in new["rows"]}
    return new | {"rows": [row for row in old["rows"] if key(row) not in measured] + new["rows"]}


def print_rows(rows: list[dict]) -> None:
    """A table, losses first."""
    order = sorted(rows, key=lambda row: ratio(row) or 0.0)
    print(f"{'case':34} {'op':15} {'pass':8} {'ours ms':>9} {'peer ms':>9} {'ratio':>6} {'of floor':>8}  fastest peer")
    for row in order:
        name = f"{row['case'][:34]:34} {row['op']:15} {row['pass']:8}"
        if row.get("error"):
            print(f"{name} {row['error']}")
            continue
        best = min(row["peers"], key=row["peers"].get) if row["peers"] else "none"
        peer = f"{row['peers'][best]:9.4f} {ratio(row):6.2f}" if row["peers"] else f"{'-':>9} {'-':>6}"
        print(f"{name} {row['ours_ms']:9.4f} {peer} {row['floor_ms'] / row['ours_ms']:8.0%}  {best}")


def run_tests(out: Path) -> int:
    """The test suite on the GPU, its log beside the results; what only concerns compiling for absent GPUs is left out."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "not aot and not full", str(ROOT / "tests")]
    command += [f"--junitxml={out / 'gpu-tests.xml'}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling, which the processes share out
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=120"]
    return subprocess.run(command, cwd=ROOT).returncode


class _Broken(Exception):
    """A kernel has left the device unusable for this process."""


def _row_or_error(label: dict[str, Any], measure_row: Callable[[], dict]) -> dict:
    """A row; whatever is raised around its measurement is in it."""
    try:
        row = measure_row()
    except Exception as error:
        row = label | {"ours_ms": None, "peers": {}, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row


def _is_sticky(row: dict) -> bool:
    return any(word in row.get("error", "") for word in ("CUDA error", "AcceleratorError", "HIP error"))


def run(
    parts: tuple[str, ...], device: str, out: Path, deadline_s: float, save: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], int]:
    """(the result file's content, the test suite's exit status); ``save`` is handed the content after every row."""
    start = time.monotonic()
    status = run_tests(out) if "tests" in parts and device == "cuda" else 0
    torch._functorch.config.donated_buffer = False  # backward is timed alone, on one recorded graph
    result = environment(device) | ceilings_of(device) | {"rows": [], "not_begun": []}
    ceilings = {name: result[name] for name in ("copy_gb_s", "gemm_tflop_s")}

    def add(name: str, label: dict[str, Any], measure_row: Callable[[], dict]) -> None:
        if time.monotonic() - start > deadline_s:
            result["not_begun"].append(name)
            return
        row = _row_or_error(label, measure_row)
        result["rows"].append(row)
        save(result)
        if _is_sticky(row):
            raise _Broken(f"{name}: {row['error']}")
        if device == "cuda":
            torch.cuda.empty_cache()

    timed_parts = [part for part in parts if part != "tests"]
    try:
        for index, part in enumerate(timed_parts):
            begun = time.monotonic()
            share = max(deadline_s - (begun - start), 0) / (len(timed_parts) - index) * COMPILING_SHARE

            def late(begun: float = begun, share: float = share) -> bool:
                return time.monotonic() - begun > share

            for case in cases.ALL.get(part, ()):
                subject = case if device == "cuda" else case.small()
                for direction in ("forward", "backward"):
                    label = {"case": case.name, "op": case.op, "pass": direction, "dtype": "bf16", "shape": subject.shape}
                    arguments = (subject, "bf16", direction, ceilings, device)
                    name = f"{case.op} {case.name} {direction}"
                    add(name, label, lambda a=arguments, late=late: run_case(*a, late()))
            if part == "models" and device == "cuda":
                for title, build, shape in _models():
                    label = {"case": title, "op": "model", "pass": "forward", "dtype": "bf16", "shape": shape}
                    model = (title, build, shape, ceilings, device)
                    add(title, label, lambda m=model, late=late: run_model(*m, late()))
    except _Broken as error:
        print(f"benchmarks.gpu: the device is unusable after {error}; stopped there", file=sys.stderr)
    if result["not_begun"]:
        print(f"benchmarks.gpu: no time left for {len(result['not_begun'])} rows; run them with --part", file=sys.stderr)
    return result, status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.gpu")
    parser.add_argument("--part", choices=PARTS, help="one part instead of all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds, tests included (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run that writes nothing")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu: PyTorch {torch.__version__} sees no GPU here; nothing was run", file=sys.stderr)
        return 2

    older: dict[Path, dict[str, Any] | None] = {}

    def save(result: dict[str, Any]) -> None:
        if options.device == "cpu":
            return
        path = result_path(options.out, result, datetime.date.today())
        if path not in older:
            older[path] = json.loads(path.read_text()) if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(merge(older[path], result), indent=1) + "\n")

    parts = (options.part,) if options.part else PARTS
    result, status = run(parts, options.device, options.out, options.deadline, save)
    print_rows(result["rows"])
    print(f"ceilings: {result['copy_gb_s']:.0f} GB/s copy, {result['gemm_tflop_s']:.0f} TFLOP/s bf16 matrix product")
    if options.device == "cpu":
        print("a dry run on the CPU: these are no measurements, and nothing was written")
        return 0
    if result["rows"]:
        print(f"wrote {result_path(options.out, result, datetime.date.today())}")
    wrong = [row for row in result["rows"] if row.get("error")]
    return 1 if wrong or status else 0


if __name__ == "__main__":
    sys.exit(main())
