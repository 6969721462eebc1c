"""oneDNN's products as operators of ours, for compiled graphs on a CPU: Inductor refuses oneDNN's own linear where weights are no
constants, and PyTorch's goes to MKL when it is compiled. ``onednn`` says when they serve; they have no gradient."""

from torch import Tensor

from . import onednn, onednn_attention
from ._common import define


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, rel_h: Tensor | None, rel_w: Tensor | None
) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


define(
    "onednn_linear(Tensor input, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    onednn.linear,
    _fake_linear,
    ("CPU",),
)
define(
    "onednn_attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? rel_h, Tensor? rel_w) -> Tensor",
    onednn_attention.attention,
    _fake_attention,
    ("CPU",),
)
