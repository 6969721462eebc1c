"""What acceleration did to a model, to print, to store and to show in a notebook; and what share of its arithmetic that is."""

import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import backend
from .integrations.parts import child
from .ops import dispatch
from .verification import eager_where_compiled, evaluated, observed

STYLE = (
    "table.fastvit{border-collapse:collapse;font:14px/1.5 system-ui,sans-serif}"
    "table.fastvit th,table.fastvit td{text-align:left;padding:2px 14px 2px 0;border-bottom:1px solid #8884}"
    "table.fastvit td.flops{text-align:right;white-space:nowrap}"
    "table.fastvit caption{text-align:left;padding-bottom:6px}"
)


@dataclass
class Report:
    """What ``accelerate`` did, or would do (``planned``).

    ``replaced``: module name → what serves it. ``skipped``: module name → why it was left as it was. ``fallbacks``: module
    name → why a served module last ran its own forward. ``graphs``: module name → how many CUDA graphs it has and what its
    last call did, where they were asked for. ``accelerated``: whether the model is. Where inputs were given to
    ``report``, ``total_flops`` is what the model's matrix products, convolutions and attention take on them (2 a
    multiply-add) and ``flops`` maps a module name to those of its that are fused; ``fused_share`` is their part of the total.
    ``served_by``, where a GPU serves the model on ``auto``: operator and sizes → what served it in inference, and why.

    ``str()`` gives a table, ``to_dict()`` what JSON can hold, ``to_html()`` a page; notebooks show the page's table.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    planned: bool = False
    accelerated: bool = True
    flops: dict[str, int] = field(default_factory=dict)
    total_flops: int | None = None
    served_by: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)

    @property
    def fused_share(self) -> float | None:
        """Fused FLOPs / all FLOPs, 0 to 1; None where they were not counted."""
        if self.total_flops is None:
            return None
        return sum(self.flops.values()) / self.total_flops if self.total_flops else 0.0

    def __str__(self) -> str:
        lines = [f"fastvit: {self._headline()}", *self._facts()]
        names = [*self.replaced, *self.skipped] if self.accelerated or self.planned else []
        width = max(map(len, names), default=0)
        for name in names:
            lines.append(f"  {name or '(the model)':<{width}}  {self._outcome(name)}{self._of(name, ', {}')}")
            if name in self.fallbacks:
                lines.append(f"  {'':<{width}}  ! its last call ran its own forward: {self.fallbacks[name]}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything the report says, in dictionaries, strings and numbers of its own."""
        return {
            "accelerated": self.accelerated,
            "planned": self.planned,
            "backend": self.backend,
            "replaced": dict(self.replaced),
            "skipped": dict(self.skipped),
            "fallbacks": dict(self.fallbacks),
            "graphs": dict(self.graphs),
            "flops": dict(self.flops),
            "total_flops": self.total_flops,
            "fused_share": self.fused_share,
            "served_by": dict(self.served_by),
        }

    def to_html(self) -> str:
        """One page that needs nothing beside it."""
        title = f"fastvit: {html.escape(self._headline())}"
        head = f'<meta charset="utf-8"><title>{title}</title>'
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{self._repr_html_()}\n</body></html>\n'

    def _repr_html_(self) -> str:
        rows = []
        for name in [*self.replaced, *self.skipped] if self.accelerated or self.planned else []:
            status = "left alone" if name in self.skipped else "planned" if self.planned else "replaced"
            if name in self.fallbacks:
                status = "own forward"
            text = self.replaced.get(name) or self.skipped[name]
            if name in self.fallbacks:
                text += f"; its last call ran its own forward: {self.fallbacks[name]}"
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name or "(the model)", status, text))
            count = f'<td class="flops">{html.escape(self._of(name))}</td>' if self.total_flops is not None else ""
            rows.append(f"<tr>{cells}{count}</tr>")
        titles = ["module", "status", "what serves it, or why not", *(["fused"] if self.total_flops is not None else [])]
        header = f"<thead><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr></thead>"
        caption = "<br>".join(html.escape(line) for line in (f"fastvit: {self._headline()}", *self._facts()))
        table = f"{header}<tbody>\n{chr(10).join(rows)}\n</tbody>" if rows else ""
        return f'<style>{STYLE}</style>\n<table class="fastvit"><caption>{caption}</caption>{table}</table>'

    def _headline(self) -> str:
        if not (self.accelerated or self.planned):
            return "not accelerated (call fastvit.accelerate(model) first)"
        if not self.replaced and not self.skipped:
            return "nothing to replace (the model has no transformer block of a known layout)"
        verb = "would be replaced (dry run)" if self.planned else "replaced"
        return f"{len(self.replaced)} blocks {verb}, {len(self.skipped)} left as they were"

    def _facts(self) -> list[str]:
        facts = [f"backend: {self.backend}"] if self.replaced and self.backend else []
        facts += [f"CUDA graphs of {name or 'the model'}: {outcome}" for name, outcome in self.graphs.items()]
        if self.fused_share is not None:
            facts.append(f"fused: {self.fused_share:.1%} of {_readable(self.total_flops or 0)}")
        return facts + [f"{call} → {way}" for call, way in self.served_by.items()]

    def _outcome(self, name: str) -> str:
        return f"left alone: {self.skipped[name]}" if name in self.skipped else self.replaced[name]

    def _of(self, name: str, form: str = "{}") -> str:
        return form.format(_readable(self.flops[name])) if name in self.flops else ""


def _readable(flops: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP" if flops < 1000 * size else f"{flops / size:.0f} {unit}FLOP"
    return f"{flops} FLOP"


def count_flops(
    model: nn.Module,
    inputs: tuple,
    keywords: dict[str, Any],
    blocks: Mapping[str, nn.Module],
    called: Mapping[str, tuple[str, ...]],
    without: Callable[[], AbstractContextManager],
) -> tuple[dict[str, int], int]:
    """FLOPs of each of ``blocks``, and of all the model, in one run ``without()`` acceleration.

    The run is in evaluation mode and without gradients, and consumes no random numbers. ``called``: block name → relative
    paths of descendants that do not count as the block's. Counted is what ``FlopCounterMode`` knows.
    """
    counter = FlopCounterMode(display=False)
    counts = dict.fromkeys(blocks, 0)
    running: list[str | None] = []  # the block around; None within a module that does not count as the block's

    def counted(forward: Callable, args: tuple, kwargs: dict, name: str | None) -> tuple[Any, int]:
        before = counter.get_total_flops()
        running.append(name)
        try:
            return forward(*args, **kwargs), counter.get_total_flops() - before
        finally:
            running.pop()

    def block(name: str, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        nested = bool(running and running[-1])  # served blocks inside a served block: its count has theirs
        output, flops = counted(forward, args, kwargs, name)
        counts[name] += 0 if nested else flops
        return output

    def beside(name: str, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        around = running[-1] if running else None
        output, flops = counted(forward, args, kwargs, None)
        if around is not None:
            counts[around] -= flops
        return output

    inner = {f"{name}.{path}": child(blocks[name], path) for name in blocks for path in called.get(name, ())}
    inner = {name: module for name, module in inner.items() if module is not None}  # None: taken out since
    gpus = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with (
        without(),
        observed(model, blocks, block),
        observed(model, inner, beside),
        evaluated(model),
        eager_where_compiled(model),
        _decomposed(),
        torch.no_grad(),
        torch.random.fork_rng(gpus),
        counter,
    ):
        getattr(model, "_orig_mod", model)(*inputs, **keywords)  # torch.compile's wrapper warns of the counter's hooks
    return counts, counter.get_total_flops()


def served_by(model: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> dict[str, str]:
    """What serves each operator in one run of the accelerated model, in inference, and why; it consumes no random numbers."""
    gpus = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with evaluated(model), eager_where_compiled(model), torch.no_grad(), torch.random.fork_rng(gpus), dispatch.collect() as found:
        getattr(model, "_orig_mod", model)(*inputs, **keywords)
    return found


@contextmanager
def _decomposed() -> Iterator[None]:
    """Attention and linears as the matrix products that the counter sees on every device, fastvit's own operators too."""
    mha, onednn = torch.backends.mha, cast(Any, torch.backends.mkldnn)
    fast, enabled = mha.get_fastpath_enabled(), onednn.enabled
    try:
        mha.set_fastpath_enabled(False)
        onednn.enabled = False
        with sdpa_kernel(SDPBackend.MATH), backend.use_backend_in_thread("torch"):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        onednn.enabled = enabled
