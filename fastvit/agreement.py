"""How far two runs of a model agree: cosines of its features, what their mean is among more pictures, and the classes they say.

Features are (B, ..., C), B pictures; a batch after the other in a list.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # Student's t, 95 %, one side, 1 to 9 degrees of freedom
NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO takes them, of the first at most


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


def are_logits(model: Any, output: Any, chosen: Callable[[Any], Tensor] | None) -> bool:
    """Whether ``features`` of ``output`` are a classifier's logits (B, classes): with nothing ``chosen``, and by the model.

    Its output has ``logits`` (Hugging Face), or its ``head``, ``heads``, ``classifier`` or ``fc`` (fastvit, timm, torchvision)
    holds a linear to as many classes. Pooled embeddings, of as many dimensions, have no such head.
    """
    if chosen is not None:
        return False
    found = features(output, None)
    if found.dim() != 2:
        return False
    heads = [head for name in ("head", "heads", "classifier", "fc") if isinstance(head := getattr(model, name, None), nn.Module)]
    linears = (m for head in heads for m in head.modules() if isinstance(m, nn.Linear))
    return getattr(output, "logits", None) is found or any(m.out_features == found.shape[1] for m in linears)


def classes(found: list[Tensor], exact: list[Tensor], labels: Tensor | None, logits: bool) -> Tensor | None:
    """The class of every picture: of ``logits`` the largest; of other features, with ``labels``, by ``nearest``; −1 of NaN."""
    if logits:
        return torch.cat([tensor.argmax(1).masked_fill(tensor.isnan().any(1), -1) for tensor in found])
    return None if labels is None else nearest(_of_pictures(found), _of_pictures(exact), labels)


def share(classes: Tensor | None, others: Tensor | None) -> float | None:
    """How many pictures are of the same class, of all; one of no class agrees with none."""
    if classes is None or others is None:
        return None
    return ((classes == others) & (classes >= 0)).double().mean().item()


def neighbours(labels: Tensor) -> int:
    """How many vote: 20, or as many others as the smallest class has, whose pictures would be outvoted by counts alone.

    Raises ``ValueError`` for one class, or one that has a single picture.
    """
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"labels have {len(counts)} classes, the smallest of {counts.min()} pictures; expected 2 classes or more with 2"
            " pictures or more each, for features that take their class from their nearest neighbours"
        )
    return min(NEIGHBOURS, int(counts.min()) - 1)


def nearest(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """The classes (B,) of queries (B, C) by their nearest ``neighbours`` in the bank (B, C) with ``labels`` (B,), but for
    themselves; −1 for one that is infinite or NaN, which is no neighbour either.

    Each votes with exp(cosine / 0.07) (Wu et al. 2018; Caron et al. 2021, DINO).
    """
    count, (names, given) = neighbours(labels), labels.unique(return_inverse=True)
    similarity = F.normalize(queries.double(), dim=-1) @ F.normalize(bank.double(), dim=-1).t()
    similarity.fill_diagonal_(-torch.inf)
    similarity[:, ~bank.isfinite().all(-1)] = -torch.inf
    cosines, indices = similarity.topk(count)
    votes = torch.zeros(len(queries), len(names), dtype=torch.float64)
    said = votes.scatter_add_(1, given[indices], (cosines / TEMPERATURE).exp()).argmax(1)
    return names[said].masked_fill(~queries.isfinite().all(-1), -1)


def _of_pictures(found: list[Tensor]) -> Tensor:
    """(B, C): the mean over the places of a picture."""
    return torch.cat([tensor.flatten(1, -2).mean(1) if tensor.dim() > 2 else tensor for tensor in found])
