"""How far two runs of a model agree: cosines of its features, what their mean is among more pictures, and the classes they say.

Features are (B, ..., C), B pictures; a batch after the other in a list.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # Student's t, 95 %, one side, 1 to 9 degrees of freedom
NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO takes them


def features(output: Any, chosen: Callable[[Any], Tensor] | None) -> Tensor:
    """What ``chosen`` takes of a model's output, or its first floating-point tensor, channels last."""
    if chosen is not None:
        return chosen(output)
    tensors = [t for t in _pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
    if not tensors:
        raise ValueError("the model's output holds no floating-point tensor; say with features= where its features are")
    return tensors[0].movedim(1, -1) if tensors[0].dim() == 4 else tensors[0]


def cosine(actual: Tensor, exact: Tensor) -> Tensor:
    found = F.cosine_similarity(actual.double(), exact.double(), dim=-1)
    return found.masked_fill((actual == exact).all(-1), 1.0)  # of two zeros as well


def losses(actual: list[Tensor], exact: list[Tensor]) -> Tensor:
    """1 − mean cosine of every picture."""
    cosines = [cosine(a, b) for a, b in zip(actual, exact, strict=True)]
    return torch.cat([1 - (c.flatten(1).mean(1) if c.dim() > 1 else c.view(-1)) for c in cosines])


def upper(found: Tensor) -> float:
    """What the mean of losses like these is below with 95 % confidence, by Student's t; of one, itself."""
    count = len(found)
    if count == 1:
        return found.item()
    t = T_95[count - 2] if count <= len(T_95) + 1 else 1.645 + 1.65 / (count - 1)
    return (found.mean() + t * found.std() / count**0.5).item()


def classes(found: list[Tensor], exact: list[Tensor], labels: Tensor | None) -> Tensor | None:
    """The class of every picture: of logits (B, classes) the largest; of other features, with ``labels``, by ``nearest``."""
    if all(tensor.dim() == 2 for tensor in exact):
        return torch.cat([tensor.argmax(1) for tensor in found])
    return None if labels is None else nearest(_of_pictures(found), _of_pictures(exact), labels)


def nearest(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """The classes (B,) of queries (B, C) by their nearest neighbours in the bank (B, C) with ``labels`` (B,), but for themselves.

    20 neighbours vote, each exp(cosine / 0.07) (Wu et al. 2018; Caron et al. 2021, DINO).
    """
    similarity = F.normalize(queries.double(), dim=-1) @ F.normalize(bank.double(), dim=-1).t()
    similarity.fill_diagonal_(-torch.inf)
    cosines, indices = similarity.topk(min(NEIGHBOURS, len(bank) - 1))
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    return votes.scatter_add_(1, labels[indices], (cosines / TEMPERATURE).exp()).argmax(1)


def _of_pictures(found: list[Tensor]) -> Tensor:
    """(B, C): the mean over the places of a picture."""
    return torch.cat([tensor.flatten(1, -2).mean(1) for tensor in found])
