"""In which order a GPU's scarce minutes are spent, and how long each row may be expected to take.

    python -m benchmarks.gpu --plan [--part first]

``FIRST`` is the shortest run that shows most: the rows that the goals ask for, with the contestants that they name; the others
are left for a run of the whole part. Seconds are estimates from counts, made without a GPU: of every contestant what checking
and timing take, and compiling by the number of kernels or blocks; ``took_s`` in the rows of a run says what it was.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from . import contest, goals, models, results
from .settings import Settings, Task

PLAIN, FLEX, COMPILE, MAX_AUTOTUNE, FIRST_CALL_PROCESS = 0.7, 8.0, 4.0, 12.0, 10.0  # seconds, an operator's
TURN = 2.5  # seconds, a whole model's contestant: building, checking, timing for one
COMPILE_BLOCK = 0.9  # seconds a transformer block
MAX_AUTOTUNE_MODEL = 30.0  # seconds: the model's few different matrix products
LIBRARIES = {"torchao": "torchao", "onnxruntime": "onnxruntime", "tensorrt": "torch_tensorrt"}  # of contestants
EXPORT = 15.0  # seconds
DEPTHS = {"ViT-B": 12, "ViT-L": 24, "ViT-H": 32, "DINOv2-L": 24, "SAM-B": 12, "SAM-L": 24, "SAM-H": 32}
SET_UP_OF_BLOCK = 0.5  # seconds: random weights, the exact result


@dataclass(frozen=True)
class Pick:
    """Rows of a part whose case is one of ``cases`` and pass ``direction`` (globs), with the contestants of ``only``."""

    part: str
    cases: tuple[str, ...]
    direction: str = "forward"
    only: tuple[str, ...] = ("*",)


FUSED = ("eager", "sdpa*")
WITH_POSITIONS = ("sdpa*", "bias_folded*", "flex")
WITH_POSITIONS_BACKWARD = ("sdpa*", "bias_folded", "bias_folded_flash", "flex")
MOST_ASKED = ("ViT-?/* fc1", "SAM-H fc1", "ViT-?/* fc2", "SAM-H qkv")  # linears
AS_THEY_ARE = ("accelerated", "fastvit")
OURS = (*AS_THEY_ARE, "accelerated_compile", "fastvit_compile")
OF_ONE_IMAGE = (
    "eager",
    "sdpa",
    "compile_graph",
    "compile_max_autotune",
    "accelerated",
    "accelerated_graph",
    "accelerated_cuda_graphs",
)
FIRST = (
    Pick("attention", (*goals.LENGTHS_64, *goals.LENGTHS_80, "SAM-B global, no bias"), only=FUSED),
    Pick("layer_norm", (*goals.MANY_ROWS, *goals.MANY_ROWS_ADDED), "*", ("eager", "compile")),
    Pick("image_attention", ("*",), only=("sdpa_dense_bias", "bias_folded", "bias_folded_flash", "segment_anything")),
    Pick("linear", (*MOST_ASKED, "SAM mask decoder fc1"), only=("eager", "compile")),
    Pick("models", ("ViT-B/16 224, batch 256",), only=("sdpa", *goals.COMPILED, *OURS)),
    Pick("models", ("ViT-[LH]/?? 224, batch 256",), only=("sdpa", "compile_max_autotune", *AS_THEY_ARE)),
    Pick("models", ("ViT-B/16 224, batch 1",), only=(*OF_ONE_IMAGE, "compile", "accelerated_compile")),
    Pick("models", ("ViT-[LH]/?? 224, batch 1",), only=OF_ONE_IMAGE),
    Pick("chains", ("ViT-B/16 blocks*",)),
    Pick("sam", ("SAM-B encoder, batch 8",), only=("segment_anything", "transformers_sdpa", "bias_folded", *OURS)),
    Pick("sam", ("SAM-[LH] encoder, batch 8",), only=("segment_anything", "transformers_sdpa", "bias_folded", *AS_THEY_ARE)),
    Pick("models", ("ViT-L/16 224, batch 64, fp8",), only=("torchao_float8_compile", "accelerated*")),
    Pick("attention", goals.LENGTHS_64, "backward", FUSED),
    Pick("attention", ("SAM mask decoder, *",), only=FUSED),
    Pick("attention", (*goals.GLOBAL, "SAM-B window"), only=WITH_POSITIONS),
    Pick("attention", (*goals.GLOBAL, "SAM-B window"), "backward", WITH_POSITIONS_BACKWARD),
    Pick("linear", ("ViT-B/16 224 * + add + norm, batch 1",), only=("eager", "vendor_add_layer_norm", "compile")),
    Pick("launches", ("*",), "launch"),
    Pick("training", ("ViT-*",), "step", ("sdpa", "compile", *OURS)),
    Pick("first_call", ("ViT-B/16 224*", "SAM-B windows"), "first_call", ("fastvit",)),
    Pick("image_attention", ("SAM-B *", "SAM-H *"), "backward", ("sdpa_dense_bias", "bias_folded")),
    Pick("linear", MOST_ASKED, "backward", ("eager", "compile")),
)


def first(tasks_of: Callable[[str], Iterable[Task]]) -> Iterator[Task]:
    """The tasks of ``FIRST``, ``tasks_of(part)`` being all of a part's."""
    parts = {part: list(tasks_of(part)) for part in dict.fromkeys(pick.part for pick in FIRST)}
    for pick in FIRST:
        asked = [task for task in parts[pick.part] if goals.named(task.row, pick.cases, pick.direction)]
        yield from (replace(task, only=pick.only) for task in sorted(asked, key=lambda task: _place(pick, task)))


def _place(pick: Pick, task: Task) -> int:
    return next(n for n, case in enumerate(pick.cases) if goals.named(task.row, (case,), pick.direction))


def contestants(row: results.Row) -> list[str]:
    """Who has a turn in a row of a whole model, libraries that are missing everywhere included."""
    small = row["shape"][0] <= (1 if row["op"] == "sam" else contest.GRAPHED_UP_TO)

    def variants(name: str, autotuned: bool = False, compiled: str = "") -> list[str]:
        return list(contest.variants(name, lambda: lambda: None, small, autotuned, compiled))  # type: ignore[arg-type,return-value]

    graphs = [f"{'fastvit' if row['op'] == 'sam' else 'accelerated'}_cuda_graphs"] if small else []
    if row["dtype"] in models.TORCHAO:
        theirs = variants(models.TORCHAO[row["dtype"]][0], True)
        return [*theirs, *variants(f"accelerated_{row['dtype']}"), *variants("accelerated")]
    if row["op"] == "model":
        exported = ["onnxruntime", *(["onnxruntime_graph"] if small else []), "tensorrt"]
        return ["eager", *variants("sdpa", True, "compile"), *exported, *variants("accelerated"), *graphs]
    if row["op"] == "training":
        plain = ["eager", "transformers_sdpa"] if row["case"].startswith("SAM") else ["sdpa", "eager"]
        return [*plain, "compile", "compile_max_autotune", "accelerated", "accelerated_compile"]
    if "encoder" in row["case"]:
        ways = [name for way in ("bias_folded", "bias_folded_flash", "flex") for name in variants(way)]
        others = [*variants("segment_anything", True), *variants("transformers_sdpa", True), *ways]
        return [name for name in others if name not in ("flex", "flex_graph")] + [*variants("fastvit"), "accelerated", *graphs]
    autotuned = [] if "everything" in row["case"] else ["segment_anything_compile_max_autotune"]
    graphs = graphs if autotuned else []
    return ["segment_anything", "segment_anything_compile", *autotuned, "fastvit", "fastvit_compile", *graphs]


def _there(name: str) -> bool:
    """Whether that contestant's library can be imported on this machine."""
    needed = [library for start, library in LIBRARIES.items() if name.startswith(start)]
    return all(importlib.util.find_spec(library) is not None for library in needed)


def seconds(task: Task, settings: Settings) -> float:
    """What the row may take on a GPU, compiling included."""
    row, here = task.row, replace(settings, only=task.only)
    if row["pass"] == "launch":
        return 2 * PLAIN
    if row["op"] == "chain":
        return SET_UP_OF_BLOCK * DEPTHS[row["case"].partition("/")[0]] + 2 * TURN
    if row["pass"] == "first_call":
        return FIRST_CALL_PROCESS * (2 if here.why_not("compile") else 4)
    if row["op"] in ("model", "sam", "training"):
        depth = DEPTHS[row["case"].partition("/")[0].partition(" ")[0]]
        named = [name for name in contestants(row) if here.why_not(name) is None and _there(name)]
        compiled = COMPILE_BLOCK * depth * sum("compile" in name for name in named)
        once = MAX_AUTOTUNE_MODEL * sum("max_autotune" in name for name in named)
        exported = EXPORT * sum(name.startswith(("onnxruntime", "tensorrt")) for name in named)
        return SET_UP_OF_BLOCK * depth + TURN * len(named) + compiled + once + exported
    names = [name for name in task.contestants if here.why_not(name) is None]
    twice = 2 if row["pass"] == "backward" else 1
    found = 5 * PLAIN + PLAIN * len(names)
    found += twice * FLEX * sum("flex" in name for name in names)
    found += twice * COMPILE * sum("compile" in name for name in names)
    return found + (MAX_AUTOTUNE if row["pass"] == "forward" and "compile_max_autotune" in names else 0)


def estimated(planned: dict[str, list[Task]], settings: Settings) -> dict[str, list[Task]]:
    """The same rows, each with its seconds."""
    return {part: [replace(task, seconds=seconds(task, settings)) for task in tasks] for part, tasks in planned.items()}


def lines(planned: dict[str, list[Task]]) -> Iterator[str]:
    """Rows with their estimates, parts with their sums."""
    for part, tasks in planned.items():
        yield f"{part}: {len(tasks)} rows, about {sum(task.seconds for task in tasks) / 60:.1f} minutes"
        for task in tasks:
            yield f"  {results.name_of(task.row)[:84]:84} {task.seconds:6.0f} s"
