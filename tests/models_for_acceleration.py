"""Small models of the libraries that ``accelerate`` serves, with no parameter left at a trivial value."""

import torch
from torch import nn

TOKENS, DIM, HIDDEN, DEPTH = 10, 48, 96, 3  # of timm_vit and torchvision_vit


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Moves every parameter off zeros and ones, so that a forgotten bias, norm or LayerScale shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.3 if parameter.dim() == 1 else 0.05))
    return model.eval()


def hf_vit(**options):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return perturb(ViTModel(ViTConfig(image_size=24, patch_size=8, **{**sizes, **options})))


def hf_dinov2(**options):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "layerscale_value": 0.5}
    return perturb(Dinov2Model(Dinov2Config(image_size=24, patch_size=8, **{**sizes, **options})))


def hf_dinov2_swiglu(**options):
    return hf_dinov2(use_swiglu_ffn=True, **options)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return perturb(VisionTransformer(24, 8, DEPTH, 3, DIM, HIDDEN, num_classes=5))


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5, "init_values": 0.5}
    return perturb(VisionTransformer(img_size=24, patch_size=8, **{**sizes, **options}))


def block_flops(batch: int, tokens: int = TOKENS, dim: int = DIM, hidden: int = HIDDEN) -> int:
    """Two a multiply-add: four projections, scores and values, two linears."""
    return 2 * batch * tokens * (4 * dim * dim + 2 * tokens * dim + 2 * dim * hidden)


def timm_normed_gated(**options):
    """Norms of queries and keys, of the attention output and of the MLP's hidden values, and no LayerScale."""
    extras = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": None}
    return timm_vit(**extras, **options)


MODELS = {
    "hf_vit": hf_vit,
    "hf_dinov2": hf_dinov2,
    "hf_dinov2_swiglu": hf_dinov2_swiglu,
    "timm_vit": timm_vit,
    "timm_normed_gated": timm_normed_gated,
}


def image(batch: int = 2, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tensor_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


# --- the class layout of transformers before 5.12, re-created -----------------------------------------------------------


class OldSelfAttention(nn.Module):
    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, dim // heads
        self.dropout_prob, self.scaling, self.is_causal = dropout, (dim // heads) ** -0.5, False
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.attention_head_size)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(2, 3) * self.scaling, dim=-1)
        weights = nn.functional.dropout(weights, self.dropout_prob, self.training)
        return (weights @ value).transpose(1, 2).reshape(x.shape), weights


class OldSelfOutput(nn.Module):
    def __init__(self, dim_in, dim, dropout=0.0):
        super().__init__()
        self.dense, self.dropout = nn.Linear(dim_in, dim), nn.Dropout(dropout)

    def forward(self, x, input_tensor):
        return self.dropout(self.dense(x))


class OldOutput(OldSelfOutput):
    def forward(self, x, input_tensor):
        return self.dropout(self.dense(x)) + input_tensor


class OldAttention(nn.Module):
    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.attention, self.output = OldSelfAttention(dim, heads), OldSelfOutput(dim, dim, dropout)

    def forward(self, x, head_mask=None):
        return self.output(self.attention(x)[0], x)


class OldIntermediate(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(dim, hidden), nn.GELU()

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class OldViTLayer(nn.Module):
    def __init__(self, dim=48, heads=3, hidden=96, dropout=0.0):
        super().__init__()
        self.attention = OldAttention(dim, heads, dropout)
        self.intermediate, self.output = OldIntermediate(dim, hidden), OldOutput(hidden, dim, dropout)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden_states, head_mask=None):
        hidden_states = self.attention(self.layernorm_before(hidden_states), head_mask) + hidden_states
        return self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)


class OldLayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.lambda1


class OldDinov2MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class OldDinov2Layer(nn.Module):
    def __init__(self, dim=48, heads=3, hidden=96):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention, self.mlp = OldAttention(dim, heads), OldDinov2MLP(dim, hidden)
        self.layer_scale1, self.layer_scale2, self.drop_path = OldLayerScale(dim), OldLayerScale(dim), nn.Identity()

    def forward(self, hidden_states, head_mask=None):
        hidden_states = self.drop_path(self.layer_scale1(self.attention(self.norm1(hidden_states)))) + hidden_states
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class PostNormLayer(OldDinov2Layer):
    """The same children, another computation."""

    def forward(self, hidden_states, head_mask=None):
        hidden_states = hidden_states + self.layer_scale1(self.norm1(self.attention(hidden_states)))
        return hidden_states + self.layer_scale2(self.norm2(self.mlp(hidden_states)))


class Encoder(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


def old_vit(**options):
    return perturb(Encoder(*(OldViTLayer(**options) for _ in range(3))))


def old_dinov2():
    return perturb(Encoder(*(OldDinov2Layer() for _ in range(3))))


def tokens(batch: int = 2, count: int = 7, dim: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


def timm_subclass(body, **options):
    """A timm model whose blocks have ``body(block, x)`` for a forward."""
    from timm.models.vision_transformer import Block

    class OwnBlock(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return body(self, x)

    return timm_vit(block_fn=OwnBlock, **options)


class OwnMlp(nn.Module):
    """An MLP of the user's: counts its calls and keeps, shares or expands what it returns."""

    def __init__(self, keep: str = "list", dim: int = 48):
        super().__init__()
        self.fc, self.keep, self.kept = nn.Linear(dim, dim), keep, []
        self.constant = nn.Parameter(torch.full((dim,), 0.3))
        self.register_buffer("calls", torch.zeros(()))
        self.memory = None

    def forward(self, x):
        self.calls += 1
        if self.keep == "expand":
            return self.constant.expand_as(x)
        if self.keep == "memory":
            self.memory = self.fc(x) if self.memory is None else self.memory
            return self.memory
        self.kept.append(self.fc(x))
        return self.kept[-1]


def timm_own_mlp(keep: str = "list"):
    model = timm_vit(init_values=None)
    for block in model.blocks:
        block.mlp = OwnMlp(keep)
    return model


class Repeated(nn.Module):
    """Runs one block as often as it is told, writing over what the block returned in between."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.block, self.idle = times, perturb(OldViTLayer()), perturb(OldViTLayer())

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
            x += 1
        return x
