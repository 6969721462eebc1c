"""Modules of a pre-norm Vision Transformer on the fused operators (Dosovitskiy et al. 2021, eqs. 2 and 3).

Parameters are named as in timm and Segment Anything, so their state dicts load. Every module takes ``device`` and ``dtype``,
is differentiable on either backend and refuses sizes that do not fit with ``TypeError`` or ``ValueError``. Children stay
modules: an adapter in the place of a linear, or a hook on a norm, takes effect; that step is then computed by itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, functional
from .backend import resolve
from .ops import block as one_block

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

__all__ = ["MLP", "Attention", "DropPath", "EncoderBlock", "LayerNorm", "LayerScale", "Linear"]

_ACTIVATE: dict[str | None, Any] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
}


class LayerNorm(nn.LayerNorm):
    """(x − mean) / sqrt(var + eps) · weight + bias with statistics in float32 (Ba et al. 2016).

    Args:
        dim: channels C of the input (..., C); ``weight`` and ``bias`` are (C,).
        eps: added to the variance.
        statistics: "token" over the channels of each token, "image" over all tokens and channels of an image,
            input (B, ..., C).
    """

    def __init__(self, dim: int, eps: float = 1e-6, statistics: str = "token", *, device: Any = None, dtype: Any = None):
        check_count("dim", dim)
        _checks.check_eps(eps)
        if statistics not in ("token", "image"):
            raise ValueError(f"statistics is {statistics!r}; expected 'token' or 'image'")
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.statistics = statistics

    def forward(self, input: Tensor) -> Tensor:
        if self.statistics == "token" or input.dim() < 4:
            return functional.layer_norm(input, self.weight, self.bias, self.eps, statistics=self.statistics)
        tokens = input.flatten(1, -2)
        return functional.layer_norm(tokens, self.weight, self.bias, self.eps, statistics="image").view(input.shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}" + (", statistics='image'" if self.statistics == "image" else "")


class Linear(nn.Linear):
    """x·Wᵀ + b, input (..., in_features) → (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class MLP(nn.Module):
    """activation(x·W1ᵀ + b1)·W2ᵀ + b2, (..., dim) → (..., dim) (Dosovitskiy et al. 2021, eq. 3).

    Args:
        dim: channels of input and output.
        hidden_dim: channels between ``fc1`` and ``fc2``.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu" or None.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str | None = "gelu", *, device: Any = None, dtype: Any = None):
        super().__init__()
        check_count("dim", dim)
        check_count("hidden_dim", hidden_dim)
        _checks.check_activation(activation)
        self.activation = activation
        self.fc1 = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if _is_plain(fc1, Linear) and _is_plain(fc2, Linear):
            return functional.mlp(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=self.activation)
        return fc2(_ACTIVATE[self.activation](fc1(input)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Attention(nn.Module):
    """Multi-head self-attention softmax(QKᵀ / √D)·V, projected (Vaswani et al. 2017, sec. 3.2.2).

    Without ``rel_pos_size`` and ``window_size`` the input is a sequence (B, N, C) and a mask may be given. With either it is
    a grid (B, H, W, C), attended to as in Segment Anything's encoder (Kirillov et al. 2023, appendix A): globally or in
    windows, with decomposed relative positions. The output has the input's shape.

    Args:
        dim: channels C, ``num_heads`` · D.
        num_heads: heads; D is at most 256.
        qkv_bias: whether the query, key and value projection has a bias. It is also what padded tokens of windows hold.
        rel_pos_size: side S, or sides (h, w), of the grid that ``rel_pos_h`` and ``rel_pos_w`` (2·S − 1, D) are for; they
            begin at zero, and on grids or windows of another side they are interpolated. None: no relative positions.
        window_size: side of the square windows; 0 attends globally.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        rel_pos_size: int | tuple[int, int] | None = None,
        window_size: int = 0,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_count("dim", dim)
        check_count("num_heads", num_heads)
        check_count("window_size", window_size, minimum=0)
        if dim % num_heads:
            raise ValueError(f"dim is {dim} and num_heads {num_heads}; expected num_heads to divide dim")
        if dim // num_heads > _checks.MAX_HEAD_DIM:
            raise ValueError(f"dim / num_heads is {dim // num_heads}; expected a head_dim from 1 to {_checks.MAX_HEAD_DIM}")
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.window_size = window_size
        self.on_grid = rel_pos_size is not None or window_size > 0
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if rel_pos_size is not None:
            height, width = pair("rel_pos_size", rel_pos_size)
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, self.head_dim, device=device, dtype=dtype))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, self.head_dim, device=device, dtype=dtype))

    def forward(self, input: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``attn_mask``, broadcastable to (B, H, N, N), and ``is_causal`` as in ``functional.attention``; sequences only."""
        if self.on_grid:
            return self._attend_on_grid(input, attn_mask, is_causal)
        query, key, value = self._heads(input)
        out = functional.attention(query, key, value, attn_mask, is_causal=is_causal, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _attend_on_grid(self, input: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask or is_causal was given to an Attention with rel_pos_size or window_size; expected neither on a grid"
            )
        _checks.check_rank("input", input, 4, "(batch, height, width, channels)")
        out = functional.image_attention(
            self.qkv(input),
            num_heads=self.num_heads,
            rel_pos_h=self.rel_pos_h,
            rel_pos_w=self.rel_pos_w,
            window_size=self.window_size,
            pad_qkv=self.qkv.bias if self.window_size else None,
            scale=self.scale,
        )
        return self.proj(out)

    def _heads(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _checks.check_rank("input", input, 3, "(batch, tokens, channels)")
        packed = self.qkv(input).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def queries_and_keys(self, input: Tensor) -> tuple[Tensor, Tensor, float]:
        """(query, key, scale) of a sequence (B, N, C), query and key (B, H, N, D): softmax(scale·QKᵀ) is what is attended to."""
        if self.on_grid:
            raise ValueError("rel_pos_size or window_size is set: its scores are not scale·QKᵀ; expected an Attention without")
        query, key, _ = self._heads(input)
        return query, key, self.scale

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}" + (f", window_size={self.window_size}" if self.window_size else "")


class LayerScale(nn.Module):
    """gamma · x, one learned factor a channel (Touvron et al. 2021, CaiT, eq. 4)."""

    def __init__(self, dim: int, value: float = 1e-5, *, device: Any = None, dtype: Any = None):
        super().__init__()
        check_count("dim", dim)
        _checks.check_number("value", value)
        self.gamma = nn.Parameter(torch.full((dim,), float(value), device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a sample's branch is dropped with ``rate`` and otherwise divided by
    1 − ``rate``, which keeps its expectation."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        _checks.check_number("drop_path", rate)
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path is {rate!r}; expected a rate of at least 0 and below 1")
        self.rate = rate

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        kept = input.new_empty(input.shape[0], *[1] * (input.dim() - 1)).bernoulli_(1 - self.rate)
        return input * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class EncoderBlock(nn.Module):
    """z' = MHA(LN(z)) + z and z'' = MLP(LN(z')) + z' (Dosovitskiy et al. 2021, eqs. 2 and 3).

    On the kernels a block is one autograd Function in training, and a small one of sequences a recipe in inference
    (``ops.block``); elsewhere the first sum, its LayerScale and the second norm are one operator. Input and output (B, N, C);
    with ``rel_pos_size`` or ``window_size`` (B, H, W, C).

    Args:
        dim, num_heads, rel_pos_size, window_size: as in ``Attention``.
        mlp_ratio: hidden channels of the MLP in multiples of ``dim``, rounded to the nearest number.
        activation: as in ``MLP``.
        norm_eps: added to the variance in both norms.
        layer_scale: first value of a factor a channel on either branch (``LayerScale``); None leaves it out.
        drop_path: rate of stochastic depth, per sample and branch (``DropPath``).
        qkv_bias: as in ``Attention``.
        norm_statistics: as in ``LayerNorm``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        activation: str | None = "gelu",
        norm_eps: float = 1e-6,
        rel_pos_size: int | tuple[int, int] | None = None,
        window_size: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        qkv_bias: bool = True,
        norm_statistics: str = "token",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        _checks.check_number("mlp_ratio", mlp_ratio)
        if not mlp_ratio > 0:
            raise ValueError(f"mlp_ratio is {mlp_ratio!r}; expected a number above 0")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, norm_eps, norm_statistics, **factory)
        self.attn = Attention(dim, num_heads, qkv_bias, rel_pos_size, window_size, **factory)
        self.ls1: Any = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.norm2 = LayerNorm(dim, norm_eps, norm_statistics, **factory)
        self.mlp = MLP(dim, max(1, round(dim * mlp_ratio)), activation, **factory)
        self.ls2: Any = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, input: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        out = None if attn_mask is not None or is_causal or torch.compiler.is_compiling() else self._at_once(input)
        if out is not None:
            return out
        branch = self.drop_path(self.attn(self.norm1(input), attn_mask, is_causal))
        norm, scale = self.norm2, self.ls1
        scaled = _is_plain(scale, LayerScale)
        if _is_plain(norm, LayerNorm) and norm.statistics == "token" and (scaled or _is_plain(scale, nn.Identity)):
            gamma = scale.gamma if scaled else None
            normed, total = functional.add_layer_norm(input, branch, norm.weight, norm.bias, norm.eps, layer_scale=gamma)
        else:
            total = input + scale(branch)
            normed = norm(total)
        return total + self.ls2(self.drop_path(self.mlp(normed)))

    def _at_once(self, input: Tensor) -> Tensor | None:
        """The output by one Function or one recipe; None where it has none now."""
        attn, mlp, norms, scales = self.attn, self.mlp, (self.norm1, self.norm2), (self.ls1, self.ls2)
        if not (_is_plain(attn, Attention) and _is_plain(mlp, MLP) and _is_plain(self.drop_path, DropPath)):
            return None
        linears = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        if not all(_is_plain(linear, Linear) for linear in linears) or not all(_is_plain(norm, LayerNorm) for norm in norms):
            return None
        if not all(_is_plain(scale, LayerScale, nn.Identity) for scale in scales) or not isinstance(input, Tensor):
            return None
        if mlp.activation is None or any(norm.statistics != "token" for norm in norms) or resolve(input) != "triton":
            return None
        gamma1, gamma2 = (scale.gamma if isinstance(scale, LayerScale) else None for scale in scales)
        norm1, norm2, qkv, proj, fc1, fc2 = ((m.weight, m.bias) for m in (*norms, *linears))
        tensors = [input, *norm1, *proj, gamma1, *norm2, *fc1, *fc2, gamma2, attn.rel_pos_h, attn.rel_pos_w, *qkv]
        window = attn.window_size if attn.on_grid else None
        options = one_block.Options(attn.num_heads, norms[0].eps, norms[1].eps, attn.scale, mlp.activation, window)
        drops = self.drop_path if self.drop_path.training and self.drop_path.rate else None
        if torch.is_grad_enabled():
            return one_block.block(tensors, options, (drops, drops))
        return None if attn.on_grid or drops is not None else one_block.infer(tensors, options, None, None)


def _is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a child is what it was made as and no hook looks at it, so that its parameters say all that it does."""
    if type(module) not in kinds or "forward" in module.__dict__:
        return False
    if any(getattr(nn.modules.module, name) for name in GLOBAL_HOOKS):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raises ``TypeError`` for what is no int and ``ValueError`` for one below ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}; expected at least {minimum}")


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number. Raises ``TypeError`` and ``ValueError`` by ``name``."""
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"{name} is {value!r}; expected an int or two of them (height, width)")
    for side in sides:
        check_count(name, side)
    return sides[0], sides[1]
