"""What a block draws random numbers for in training: dropout, and stochastic depth (Huang et al. 2016)."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .parts import Layout, Parts

DROP_PATH_PACKAGES = ("timm", "transformers", "fastvit")


def draws(parts: Parts, layout: Layout) -> bool:
    """Whether a block draws now, or might: it has a fused MLP."""
    if any(active(*map(parts.child, dropouts(layout)))):
        return True
    return any(training(parts.part(residual.drop_path)) is not None for residual in layout.residuals)


def dropouts(layout: Any) -> tuple[str | None, ...]:
    """Paths of the dropouts of a block with a fused MLP."""
    first, second = layout.residuals
    return *layout.attention.drop, first.drop, layout.mlp.hidden_drop, *layout.mlp.drop, second.drop


def active(*dropouts: Any) -> Iterator[nn.Module]:
    """The dropouts that drop something now."""
    return (module for module in dropouts if module is not None and module.training and getattr(module, "p", 0))


def training(drop_path: Any) -> Any:
    """The stochastic depth that is in training mode, or None."""
    return drop_path if drop_path is not None and drop_path.training else None


def by_sample(drop_path: nn.Module) -> bool:
    """Whether all it does is to multiply each sample by a number that does not depend on the branch: the libraries' own, which
    no one watches or changed."""
    kind = type(drop_path)
    if kind.__module__.partition(".")[0] not in DROP_PATH_PACKAGES or not kind.__name__.endswith("DropPath"):
        return False
    return getattr(vars(kind).get("forward"), "__module__", None) == kind.__module__ and not _watched(drop_path)


def _watched(module: nn.Module) -> bool:
    """Whether somebody has to see what the module itself is given."""
    own = module.__dict__
    return bool("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
