"""The names under which libraries keep the parts of a pre-norm transformer block.

Tables only. A block is served when it has one entry of each table and no child beside them; which class it is does not
matter, because libraries rename those. Paths are relative to the block.
"""

from typing import NamedTuple


class Norms(NamedTuple):
    before: str
    after: str


class Attention(NamedTuple):
    """``qkv``: one packed linear or three; ``owner``: the module that knows the number of heads; ``drop``: dropout modules
    of the branch; ``weights_drop``: where the dropout of the attention weights is, a module or a float."""

    owner: str
    qkv: tuple[str, ...]
    out: str
    drop: tuple[str, ...] = ()
    weights_drop: tuple[str, ...] = ("attention_dropout", "dropout_prob")
    query_norm: str | None = None
    key_norm: str | None = None
    out_norm: str | None = None
    gate: str | None = None


class Mlp(NamedTuple):
    """``hidden_norm``: between the activation (and its dropout) and fc2."""

    fc1: str
    activation: str
    fc2: str
    hidden_drop: str | None = None
    hidden_norm: str | None = None
    drop: tuple[str, ...] = ()


class Residual(NamedTuple):
    """What stands between a branch and the sum, in order: dropout, LayerScale, stochastic depth; missing ones are skipped."""

    drop: str | None
    scale: str | None
    drop_path: str | None


NORMS = (
    Norms("norm1", "norm2"),  # timm, DINOv2
    Norms("layernorm_before", "layernorm_after"),  # transformers ViT, DeiT
)

ATTENTIONS = (
    Attention("attention", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj"),  # transformers
    Attention(  # transformers, the older layout
        "attention.attention",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        drop=("attention.output.dropout",),
    ),
    Attention(  # timm
        "attn",
        ("attn.qkv",),
        "attn.proj",
        drop=("attn.proj_drop",),
        weights_drop=("attn_drop",),
        query_norm="attn.q_norm",
        key_norm="attn.k_norm",
        out_norm="attn.norm",
        gate="attn.gate",
    ),
)

MLPS = (
    Mlp("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),  # transformers
    Mlp("mlp.fc1", "mlp.activation", "mlp.fc2"),  # transformers, older DINOv2
    Mlp("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", drop=("output.dropout",)),  # older ViT
    Mlp("mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop1", "mlp.norm", drop=("mlp.drop2",)),  # timm
)

OPAQUE_MLP = "mlp"  # an MLP of another kind (SwiGLU) is called as the module it is

RESIDUALS = (
    (Residual("dropout", "layer_scale1", "drop_path"), Residual("dropout", "layer_scale2", "drop_path")),  # transformers
    (Residual(None, "ls1", "drop_path1"), Residual(None, "ls2", "drop_path2")),  # timm
)

SCALE_PARAMETERS = ("lambda1", "gamma")
HEAD_COUNTS = ("num_attention_heads", "num_heads")

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

# What the arguments of a block's forward mean. The first is the hidden states; others must be None or False.
MASKS = ("attention_mask", "attn_mask")
CAUSAL = "is_causal"
HARMLESS = frozenset({"output_hidden_states", "return_dict", "use_cache"})
