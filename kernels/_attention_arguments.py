"""What the launches of the attention kernels have in common: arguments from tensors, and the row of the tuning table."""

import math
from typing import Any

import torch
import triton

from ._attention import MIN_DOT, split_head_dim
from ._launch import input_precision, target_of
from ._tuning import config


def mask_kind(mask: torch.Tensor | None) -> str:
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.uint8 else "additive"


def mask_arguments(mask: torch.Tensor | None) -> dict:
    """Pointer and broadcast strides of a four-dimensional mask, a boolean one seen as bytes."""
    names = ("stride_mask_batch", "stride_mask_head", "stride_mask_row", "stride_mask_column")
    if mask is None:
        return {"mask_ptr": None, "WIDE_MASK": False, **dict.fromkeys(names, 0)}
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    span = sum(size * stride for size, stride in zip(mask.shape[2:], strides[2:], strict=True))
    return {"mask_ptr": mask, "WIDE_MASK": span >= 2**31, **dict(zip(names, strides, strict=True))}


def all_eights(*tensors: torch.Tensor) -> bool:
    """Whether the strides of these, the last one left out, are multiples of 8, not all of 16: see ``_attention.eights``."""
    return math.gcd(*(stride for tensor in tensors for stride in tensor.stride()[:3]), 16) == 8


def common_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rel_h: torch.Tensor | None, scale: float
) -> dict:
    """The arguments that every attention kernel takes alike."""
    names = ("batch", "head", "row")
    strides = {
        f"stride_{letter}_{name}": tensor.stride(dim)
        for letter, tensor in (("q", q), ("k", k), ("v", v))
        for dim, name in enumerate(names)
    }
    main, tail = split_head_dim(q.shape[3], q.element_size())
    value_main, value_tail = split_head_dim(v.shape[3], v.element_size())
    key_rows = 0 if rel_h is None else rel_h.shape[3]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "heads": q.shape[1],
        "groups": q.shape[1] // k.shape[1],
        "queries": q.shape[2],
        "keys": k.shape[2],
        "key_rows": key_rows,
        "key_columns": k.shape[2] // key_rows if key_rows else 0,
        "scale": scale,
        "MASK": mask_kind(mask),
        "HAS_REL": rel_h is not None,
        "DIM": q.shape[3],
        "MAIN": main,
        "TAIL": tail,
        "VALUE_DIM": v.shape[3],
        "VALUE_MAIN": value_main,
        "VALUE_TAIL": value_tail,
        "INPUT_PRECISION": input_precision(q.dtype),
        **strides,
        **mask_arguments(mask),
    }


def forward_arguments(
    kernel: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    scale: float,
) -> dict:
    """The arguments of a forward ``kernel`` among these, masks told apart by whether queries differ in them."""
    rows = mask is not None and mask.shape[2] > 1 and mask.stride(2) != 0
    arguments = common_arguments(q, k, v, mask, rel_h, scale)
    arguments |= {"MASK_ROWS": rows, "NEGATIVE_SCALE": scale < 0, "EIGHTS": all_eights(q, k, v)}
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def row_for(
    op: str,
    q: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    one_key_row_a_step: bool = True,
    causal: bool = False,
) -> dict[str, int]:
    """The tuning-table row; its key block is no wider than a row of keys where one row of keys is a step."""
    row = config(
        op,
        target_of(q),
        element_size=q.element_size(),
        head_dim=max(q.shape[3], v.shape[3]),
        queries=q.shape[2],
        bias={"none": 0, "bool": 1, "additive": 2}[mask_kind(mask)] if rel_w is None else 2,
        causal=int(causal),
    )
    if rel_w is None or not one_key_row_a_step:
        return row
    block = min(row["BLOCK_N"], max(MIN_DOT, triton.next_power_of_2(rel_w.shape[3])))
    parts = {"PARTS": min(row["PARTS"], block)} if "PARTS" in row else {}
    return row | parts | {"BLOCK_N": block}
