"""Imports go downward only: a kernel knows no model, a model knows no library. Read from the source, not by importing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"reference", "reference_quantized", "backend", "_checks", "_torchvision"},
    {"kernels"},
    {"ops"},
    {"functional"},
    {"nn"},
    {"models"},
    {"integrations"},
    {
        "acceleration",
        "planning",
        "walk",
        "graphs",
        "quantization",
        "simulation",
        "agreement",
        "verification",
        "reporting",
        "maps",
    },
    {"checkpoints", "images", "loading", "pipelines", "demo", "benchmarks"},
    {"cli", "web"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FACADE = "__init__"  # fastvit itself: `import fastvit` is for the layers above acceleration


def sources() -> list[tuple[str, Path]]:
    """(dotted name below fastvit, file) of every module."""
    found = []
    for path in sorted((ROOT / "fastvit").rglob("*.py")):
        parts = path.relative_to(ROOT / "fastvit").with_suffix("").parts
        found.append((".".join(parts), path))
    found += [(f"kernels.{path.stem}", path) for path in sorted((ROOT / "kernels").glob("*.py"))]
    return [(name, path) for name, path in found if name != FACADE]


def imported(name: str, path: Path) -> set[str]:
    """The parts of fastvit (first component; ``__init__`` for the package itself) that a module imports, anywhere in it."""
    package = ["fastvit", *name.split(".")][:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{full}.{alias.name}" for alias in node.names] if full == "fastvit" else [full]
        for target in names:
            parts = target.split(".")
            if parts[0] == "fastvit":
                targets.add(parts[1] if len(parts) > 1 and parts[1] in LEVEL else FACADE)
    return targets


def test_every_part_has_a_layer():
    unknown = {name.split(".")[0] for name, _ in sources()} - set(LEVEL)
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS of {Path(__file__).name}"


@pytest.mark.parametrize(("name", "path"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_downward(name, path):
    own = name.split(".")[0]
    for target in imported(name, path) - {own}:
        if target == FACADE:
            assert LEVEL[own] > LEVEL["acceleration"], f"{name} imports fastvit itself, which imports {own}"
        else:
            assert LEVEL[target] <= LEVEL[own], f"{name} imports {target}, which is above it"


@pytest.mark.parametrize(("name", "path"), [source for source in sources() if source[0].startswith("kernels.")])
def test_a_kernel_needs_triton_and_torch_alone(name, path):
    assert imported(name, path) <= {"kernels"}


def test_the_folder_kernels_is_no_package():
    """With an ``__init__.py`` it would shadow Hugging Face's package of that name for everyone started from here."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
