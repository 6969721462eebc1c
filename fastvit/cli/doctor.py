"""What is installed, which backend is in force and why, and whether every operator computes what it should."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastvit

from ..backend import get_backend, why_not_triton
from . import selfcheck

PACKAGES = ("torch", "triton", "timm", "transformers", "torchvision", "numpy")


def run(console: Console, kernels: bool) -> bool:
    """Prints the whole report; True when every self-check passed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print("[bold]Installed[/bold]")
    console.print(_versions())
    console.print("\n[bold]In force[/bold]")
    console.print(_backend(device))
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    with console.status("checking the operators"):
        outcomes = selfcheck.check_all(device, dtypes)
    _print_outcomes(console, f"Self-check on {device.type}: error against float64, forward and backward", outcomes)
    passed = all(outcome.passed for outcome in outcomes)
    if device.type == "cuda":
        return passed
    if kernels:
        return _check_kernels(console) and passed
    console.print(
        "\nThe Triton kernels need a GPU; without one, [bold]fastvit doctor --kernels[/bold] checks them in Triton's interpreter,"
        " and TRITON_INTERPRET=1 FASTVIT_BACKEND=triton runs a program on them (slowly).",
    )
    return passed


def _plain_table() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2))


def _versions() -> Table:
    table = _plain_table()
    table.add_row("fastvit", f"{fastvit.__version__}")
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "[yellow]not installed[/yellow]"
        table.add_row(package, version)
    return table


def _gpu() -> str:
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}")
        return "; ".join(names)
    if torch.version.cuda is None and torch.version.hip is None:
        return f"none: PyTorch {torch.__version__} is built for the CPU only"
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return "none: this machine shows no GPU driver"
    return "none: PyTorch cannot use the GPU's driver (is it older than PyTorch's CUDA?)"


def _backend(device: torch.device) -> Table:
    name, reason = get_backend(), why_not_triton(device)
    if name == "torch":
        serves, why = "torch", "asked for by FASTVIT_BACKEND or use_backend"
    elif name == "triton":
        serves, why = "triton", "asked for by FASTVIT_BACKEND or use_backend" + (f", but {reason}" if reason else "")
    elif device.type == "cuda" and reason is None:
        serves, why = "triton", "auto: a GPU that Triton serves"
    else:
        serves, why = "torch", f"auto: {reason or 'CPU tensors are served by PyTorch, faster than by the interpreter'}"
    table = _plain_table()
    table.add_row("GPU", escape(_gpu()))
    table.add_row("backend", f"[bold]{serves}[/bold] ({escape(why)})")
    if serves == "triton" and device.type == "cuda":
        table.add_row("tuning", escape(_tuning_of(torch.empty(0, device=device))))
    table.add_row("threads", str(torch.get_num_threads()))
    return table


def _tuning_of(tensor: torch.Tensor) -> str:
    """Whose launch configs and dispatch rules are in force on the tensor's device, and what they rest on."""
    from fastvit.kernels import _launch, _tuning

    target = _launch.target_of(tensor)
    return "; ".join(f"{name}: {basis}" for name, basis in _tuning.sources(target).items())


def _print_outcomes(console: Console, title: str, outcomes: list[selfcheck.Outcome]) -> None:
    dtypes = list(dict.fromkeys(outcome.dtype for outcome in outcomes))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("operator")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
        table.add_column("")
    for (operator, detail), group in groupby(outcomes, key=lambda outcome: (outcome.operator, outcome.detail)):
        cells = [f"{operator} [dim]{detail}[/dim]"]
        for outcome in group:
            cells += [f"{outcome.error:.1e}", "[green]ok[/green]" if outcome.passed else "[red]FAIL[/red]"]
        table.add_row(*cells)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)
    for outcome in outcomes:
        if not outcome.passed:
            reason = outcome.problem or f"errs {outcome.error:.1e}, PyTorch's eager operators {outcome.eager_error:.1e}"
            console.print(f"  {outcome.operator} {outcome.detail} {outcome.dtype}: {escape(reason)}", soft_wrap=True)


def _check_kernels(console: Console) -> bool:
    """Runs the self-check on the Triton backend in a process of its own, where the interpreter can be switched on."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTVIT_BACKEND": "triton"}
    root = str(Path(fastvit.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with console.status("checking the Triton kernels in the interpreter"):
        command = [sys.executable, "-m", "fastvit.cli.selfcheck"]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        console.print(f"\n[red]FAIL[/red] the Triton kernels' self-check did not run: {escape(lines[-1])}", soft_wrap=True)
        return False
    outcomes = [selfcheck.Outcome(**outcome) for outcome in json.loads(process.stdout)]
    _print_outcomes(console, "Triton kernels in the interpreter (its bfloat16 rounds wrongly: float32 only)", outcomes)
    return all(outcome.passed for outcome in outcomes)
