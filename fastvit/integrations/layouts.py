"""The names under which libraries keep the parts of a transformer block.

Tables only. A block is served when it has one entry of each table and no child beside them; which class it is does not
matter, because libraries rename those. Paths are relative to the block.
"""

from typing import Any, NamedTuple


class Norms(NamedTuple):
    before: str
    after: str


class Attention(NamedTuple):
    """``owner``: the module that knows the number of heads; ``qkv``: one packed linear or three, none where the owner is a
    ``torch.nn.MultiheadAttention``; ``drop``: dropout modules of the branch."""

    owner: str
    qkv: tuple[str, ...]
    out: str
    drop: tuple[str, ...] = ()
    query_norm: str | None = None
    key_norm: str | None = None
    out_norm: str | None = None
    gate: str | None = None


class Mlp(NamedTuple):
    """``gate``: a second linear beside fc1, its activation multiplied to fc1's output (SwiGLU); ``hidden_norm``: between the
    activation (and its dropout) and fc2. Without an ``activation`` it is the SiLU of a gated MLP whose module calls a
    function."""

    fc1: str
    activation: str | None
    fc2: str
    hidden_drop: str | None = None
    hidden_norm: str | None = None
    drop: tuple[str, ...] = ()
    gate: str | None = None


class Residual(NamedTuple):
    """What stands between a branch and the sum, in order: dropout, LayerScale (a module or a parameter of the block),
    stochastic depth; missing ones are skipped."""

    drop: str | None = None
    scale: str | None = None
    drop_path: str | None = None


class Residuals(NamedTuple):
    """Those of the two branches; ``mark``: what a block has that this entry is for."""

    mark: str | None
    attention: Residual
    mlp: Residual


NORMS = (
    Norms("norm1", "norm2"),  # timm, DINOv2, torch
    Norms("layernorm_before", "layernorm_after"),  # transformers ViT, DeiT
    Norms("layer_norm1", "layer_norm2"),  # transformers CLIP, SigLIP
    Norms("ln_1", "ln_2"),  # torchvision
)

ATTENTION_NAMES = ("attention", "attn", "self_attn", "self_attention")


def _three(owner: str, out: str, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"), **parts: Any) -> Attention:
    query, key, value = names
    return Attention(owner, (f"{owner}.{query}", f"{owner}.{key}", f"{owner}.{value}"), out, **parts)


_TIMM_PARTS: dict[str, Any] = {
    "drop": ("attn.proj_drop",),
    "query_norm": "attn.q_norm",
    "key_norm": "attn.k_norm",
    "out_norm": "attn.norm",
    "gate": "attn.gate",
}

ATTENTIONS = (
    _three("attention", "attention.o_proj"),  # transformers ViT, DINOv2, DINOv3
    _three(  # transformers, the older layout
        "attention.attention", "attention.output.dense", ("query", "key", "value"), drop=("attention.output.dropout",)
    ),
    _three("self_attn", "self_attn.out_proj"),  # transformers CLIP, SigLIP
    Attention("attn", ("attn.qkv",), "attn.proj", **_TIMM_PARTS),  # timm
    _three("attn", "attn.proj", **_TIMM_PARTS),  # timm EVA
    Attention("self_attention", (), "self_attention.out_proj"),  # torchvision
    Attention("self_attn", (), "self_attn.out_proj"),  # torch
)

MLPS = (
    Mlp("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),  # transformers
    Mlp("mlp.fc1", "mlp.activation", "mlp.fc2"),  # transformers, older DINOv2
    Mlp("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", drop=("output.dropout",)),  # older ViT
    Mlp("mlp.up_proj", "mlp.act_fn", "mlp.down_proj", gate="mlp.gate_proj"),  # transformers DINOv3, SwiGLU
    Mlp("mlp.weights_in", None, "mlp.weights_out"),  # transformers, older SwiGLU
    Mlp("mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop1", "mlp.norm", drop=("mlp.drop2",)),  # timm
    Mlp("mlp.lin1", "mlp.act", "mlp.lin2"),  # segment_anything, transformers SAM
    Mlp("mlp.lin1", "mlp.activation", "mlp.lin2"),  # fastvit's Sam
    Mlp("mlp.fc1_x", "mlp.act", "mlp.fc2", "mlp.drop1", "mlp.norm", drop=("mlp.drop2",), gate="mlp.fc1_g"),  # timm SwiGLU
    Mlp("mlp.0", "mlp.1", "mlp.3", "mlp.2", drop=("mlp.4",)),  # torchvision
    Mlp("linear1", "activation", "linear2", "dropout"),  # torch
)

OPAQUE_MLP = "mlp"  # an MLP of another kind is called as the module it is

RESIDUALS = (
    Residuals("ln_1", Residual("dropout"), Residual()),  # torchvision
    Residuals("linear1", Residual("dropout1"), Residual("dropout2")),  # torch
    Residuals("gamma_1", Residual(None, "gamma_1", "drop_path1"), Residual(None, "gamma_2", "drop_path2")),  # timm EVA
    Residuals("attn", Residual(None, "ls1", "drop_path1"), Residual(None, "ls2", "drop_path2")),  # timm
    Residuals(  # transformers
        None, Residual("dropout", "layer_scale1", "drop_path"), Residual("dropout", "layer_scale2", "drop_path")
    ),
)

OWN_RESIDUALS = Residuals(None, Residual(None, "ls1", "drop_path"), Residual(None, "ls2", "drop_path"))  # fastvit

SCALE_PARAMETERS = ("lambda1", "gamma")
HEAD_COUNTS = ("num_attention_heads", "num_heads")
KEY_HEAD_COUNT = "num_kv_heads"
SCALINGS = ("scaling", "scale")
WEIGHTS_DROPS = ("attention_dropout", "dropout_prob", "attn_drop", "dropout")  # of an owner: a module or a float
SEPARATE_BIASES = ("q_bias", "k_bias", "v_bias")  # of an owner whose packed linear has none: timm EVA
NORM_FIRST = "norm_first"  # of a block that may normalize before its branches or after its sums: torch
WINDOW = "window_size"  # of a block whose hidden states are images: tokens a side of its windows, 0 for no windows
RELATIVE_POSITIONS = ("rel_pos_h", "rel_pos_w")  # of the owner in such a block: tables of rows and columns
USES_POSITIONS = "use_rel_pos"
PREFIX_TOKENS = "num_prefix_tokens"  # of an owner: tokens without a position, the first ones
ROTATES_HALVES = "rotate_half"  # of an owner: pairs channel d with d + D/2, not 2d with 2d + 1
GATE_LAST = "gate_last"  # of an MLP whose fc1 has value and gate in one: the gate is its second half

# Class name → activation, for classes defined in one of these packages.
ACTIVATION_PACKAGES = ("torch", "timm", "transformers")
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
}
GATE_ACTIVATIONS = {**ACTIVATIONS, "SiLU": "silu", "SiLUActivation": "silu", "Sigmoid": "sigmoid"}

# What the arguments of a block's forward mean. The first is the hidden states; others must be None or False.
WHOLE_MASK = "attention_mask"  # transformers': causality, where there is any, is in it
MASKS = (WHOLE_MASK, "attn_mask")  # True: attend
FORBIDDING_MASK, PADDING_MASK = "src_mask", "src_key_padding_mask"  # torch's: True: do not attend
CAUSAL = "is_causal"
COS_SIN = "position_embeddings"  # (cos, sin)
SIN_COS = "rope"  # one tensor, [sin, cos]
HARMLESS = frozenset({"output_hidden_states", "return_dict", "use_cache"})
