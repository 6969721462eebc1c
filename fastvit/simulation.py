"""8-bit linears simulated in a model, on any device: what is rounded in it, and what its weights are best rounded to.

Inputs and weights are rounded to e4m3 or int8 exactly as the kernels round them and multiplied in float32, or, far slower, with
sums like those of Hopper's tensor cores (``fastvit.reference_quantized``). A block has two parts, "qkv" and "mlp".
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import reference_quantized
from .integrations import quantized, swap
from .integrations.matching import PLAIN_LINEARS, find_layout
from .integrations.parts import Layout
from .integrations.quantized import CalibratedWeight
from .verification import observed

MOMENTS = 2**30  # bytes of inputs' covariances that are held at once
Part = tuple[str, str]  # (block name, "qkv" or "mlp")


@dataclass
class Rounding:
    """What can be in 8 bits of a model.

    ``paths``: part → the names of its linears. ``skipped``: block → why it has none. ``norms``: a linear after an activation
    without a gate → the norm before its MLP. ``calibrated``: linear → what its weight is rounded to, if not to the nearest.
    """

    model: nn.Module
    dtype: torch.dtype
    paths: dict[Part, tuple[str, ...]]
    skipped: dict[str, str]
    norms: dict[str, str]
    calibrated: dict[str, CalibratedWeight] = field(default_factory=dict)

    def share(self, parts: Iterable[Part]) -> float:
        """How many of the multiplications of all linears, in blocks that have parts, are in ``parts``."""
        modules = dict(self.model.named_modules())
        blocks = [modules[name] for name in dict.fromkeys(name for name, _ in self.paths)]
        total = sum(m.weight.numel() for block in blocks for m in block.modules() if type(m) in PLAIN_LINEARS)
        return sum(map(self.size, parts)) / total

    def size(self, part: Part) -> int:
        return sum(self._linear(path).weight.numel() for path in self.paths[part])

    def _linear(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def scales(self, path: str) -> tuple[int | None, Tensor | None]:
        """(columns that share a scale, or None for a token; the scale of all, if that is known) of a linear's input."""
        first = next((names[0] for (_, part), names in self.paths.items() if part == "mlp" and names[-1] == path), None)
        if first is None:
            return None, None
        given = None
        if path in self.norms and self.dtype == reference_quantized.E4M3:
            fc1, norm = self._linear(first), cast(Any, self.model.get_submodule(self.norms[path]))
            known = self.calibrated.get(first)
            given = quantized.bound_of_hidden(known, fc1.weight, fc1.bias, norm.weight, norm.bias)
        return reference_quantized.BLOCK if given is None else None, given

    @contextmanager
    def applied(
        self, parts: Iterable[Part], promote: int | None = None, errors: dict[str, float] | None = None
    ) -> Iterator[None]:
        """Within it the linears of ``parts`` compute in simulated 8 bits; ``errors`` takes their outputs' relative errors."""
        linears = {path: self._linear(path) for part in parts for path in self.paths[part]}
        scales = {path: self.scales(path) for path in linears}
        weights = {path: self._rounded(path, linear.weight) for path, linear in linears.items()}

        def rounded(name: str, module: Any, forward: Callable, args: tuple, kwargs: dict) -> Any:
            (block, given), known = scales[name], self.calibrated.get(name)
            out = reference_quantized.linear(
                args[0],
                module.weight,
                module.bias if known is None else known.bias(module.bias, module.weight.device),
                dtype=self.dtype,
                block=block,
                given=given,
                promote=promote,
                rounded=weights[name],
            ).to(module.weight.dtype)
            if errors is not None:
                exact = forward(*args, **kwargs).float()
                error = ((out - exact).norm() / exact.norm().clamp(min=1e-30)).item()
                errors[name] = max(error, errors.get(name, 0.0))
            return out

        with observed(self.model, linears, rounded):
            yield

    def _rounded(self, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        known = self.calibrated.get(path)
        return reference_quantized.quantize(weight, self.dtype) if known is None else known.on(weight.device)

    def calibrate(self, run: Callable[[], Any]) -> None:
        """Rounds weights for the inputs that their linears get while ``run`` calls the model, once or a few times over.

        Raises ``ValueError`` where those are infinite or NaN.
        """
        alike = []  # linears of one input
        for (_, part), names in self.paths.items():
            alike += [names[:-1], names[-1:]] if part == "mlp" else [names]
        while alike:
            held = [alike.pop()]
            while alike and sum(map(self._bytes, [*held, alike[-1]])) <= MOMENTS:
                held.append(alike.pop())
            found = self._inputs([paths[0] for paths in held], run)
            for first, path in ((paths[0], path) for paths in held for path in paths):
                if first in found:  # it was called
                    self.calibrated[path] = self._fitted(path, found[first])

    def _fitted(self, path: str, moments: tuple[Tensor, Tensor, Tensor]) -> CalibratedWeight:
        linear = self._linear(path)
        return CalibratedWeight.of(linear.weight, self.dtype, *moments, linear.bias)

    def _bytes(self, paths: tuple[str, ...]) -> int:
        return 4 * self._linear(paths[0]).in_features ** 2

    def _inputs(self, paths: Iterable[str], run: Callable[[], Any]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Of linears' inputs: the covariance (K, K) as they are rounded, the mean (K,), and the mean as they are rounded."""
        scales = {path: self.scales(path) for path in paths}
        sums: dict[str, list[Tensor]] = {}
        counts = dict.fromkeys(scales, 0)

        def summed(name: str, module: Any, forward: Callable, args: tuple, kwargs: dict) -> Any:
            x, (block, given) = args[0].float().flatten(0, -2), scales[name]
            rounded = reference_quantized.dequantize(*reference_quantized.quantize(x, self.dtype, block, given), block)
            parts = (rounded.t() @ rounded, x.sum(0), rounded.sum(0))
            counts[name] += len(x)
            sums[name] = [a.add_(b) for a, b in zip(sums[name], parts, strict=True)] if name in sums else list(parts)
            return forward(*args, **kwargs)

        with observed(self.model, {path: self._linear(path) for path in scales}, summed):
            run()
        found = {}
        for name, (moment, mean, rounded_mean) in sums.items():
            if not moment.isfinite().all():
                raise ValueError(f"calibration gives {name} an input that is infinite or NaN; expected finite ones")
            moment, mean, rounded_mean = (t / max(counts[name], 1) for t in (moment, mean, rounded_mean))
            found[name] = moment - torch.outer(rounded_mean, rounded_mean), mean, rounded_mean
        return found


def find(model: nn.Module, dtype: torch.dtype) -> Rounding:
    """The parts of ``model`` that can be in 8 bits."""
    found = Rounding(model, dtype, {}, {}, {})
    for name, module, layout in _layouts(model):
        reason = layout if isinstance(layout, str) else quantized.why_not(module, layout)
        if reason is not None or isinstance(layout, str):
            found.skipped[name] = str(reason)
            continue
        for part in quantized.PARTS:
            found.paths[name, part] = tuple(f"{name}.{path}" if name else path for path in quantized.linears(layout, part))
        if layout.gating is None:
            found.norms[found.paths[name, "mlp"][-1]] = f"{name}.{layout.norms.after}" if name else layout.norms.after
    return found


def _layouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout | str]]:
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        layout: Any = find_layout(module, own_blocks=True)
        if layout is not None:
            done.append(name)
            yield name, module, layout


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Within it served blocks of ``model`` run their own forwards; those that are restored within it stay so."""
    served = [module for module in model.modules() if swap.is_served(module) and swap.ATTRIBUTE in module.__dict__]
    try:
        for module in served:
            swap.pause(module)
        yield
    finally:
        for module in served:
            swap.resume(module)


def outputs(model: nn.Module, batches: list) -> Iterator[Any]:
    """What ``model`` gives for tensors, tuples of arguments or mappings of keywords."""
    for batch in batches:
        arguments = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
        yield model(*arguments, **(batch if isinstance(batch, Mapping) else {}))
