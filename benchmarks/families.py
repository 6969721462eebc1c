"""The model families that ``accelerate`` serves, one table for the tests (tiny) and for docs/compatibility.md (full width).

Weights are random and no parameter is left at a trivial value, so that a forgotten bias, norm or LayerScale shows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit._torchvision import ensure_importable

ensure_importable()


class Size(NamedTuple):
    dim: int
    depth: int
    heads: int
    mlp: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2


TINY = Size(48, 3, 3, 96, 24, 8)
BASE = Size(768, 12, 12, 3072, 224, 16)


class Family(NamedTuple):
    """``build(size, **options)`` gives the model, ``inputs(size, batch)`` the keyword arguments of a call."""

    title: str
    build: Callable[..., nn.Module]
    inputs: Callable[[Size, int], dict[str, Any]]


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Moves every parameter off zeros and ones, by amounts that keep activations at their scale whatever the width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            width = 0.3 if parameter.dim() == 1 else min(0.05, 0.5 * parameter.shape[-1] ** -0.5)
            parameter.add_(noise * width)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _images(name: str) -> Callable[[Size, int], dict[str, Any]]:
    return lambda size, batch: {name: noise(batch, 3, size.image, size.image)}


# --- transformers -------------------------------------------------------------------------------------------------------


def _transformers(model_name: str, config_name: str, mlp_option: str = "intermediate_size", **fixed) -> Callable:
    def build(size: Size, **options) -> nn.Module:
        import transformers

        given = {
            "hidden_size": size.dim,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads,
            "image_size": size.image,
            "patch_size": size.patch,
            mlp_option: size.mlp // size.dim if mlp_option == "mlp_ratio" else size.mlp,
        }
        config = getattr(transformers, config_name)(**{**given, **fixed, **options})
        return perturb(getattr(transformers, model_name)(config))

    return build


def _clip_text(size: Size, **options) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": size.dim, "num_hidden_layers": size.depth, "num_attention_heads": size.heads}
    config = CLIPTextConfig(**sizes, intermediate_size=size.mlp, vocab_size=99, bos_token_id=0, eos_token_id=98, **options)
    return perturb(CLIPTextModel(config))


def _sentences(size: Size, batch: int) -> dict[str, Any]:
    ids = torch.randint(1, 90, (batch, 21 if size.dim < 100 else 77), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 98
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- timm ---------------------------------------------------------------------------------------------------------------


def _timm_vit(size: Size, **options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads, "mlp_ratio": size.mlp / size.dim}
    return perturb(VisionTransformer(img_size=size.image, patch_size=size.patch, num_classes=5, **{**sizes, **options}))


def _timm(**fixed) -> Callable:
    return lambda size, **options: _timm_vit(size, **{**fixed, **options})


def _timm_head_dim_80(size: Size, **options) -> nn.Module:
    heads = max(1, size.dim // 160)
    return _timm_vit(size, embed_dim=80 * heads, num_heads=heads, mlp_ratio=4, **options)


def _timm_eva(**fixed) -> Callable:
    def build(size: Size, **options) -> nn.Module:
        from timm.models.eva import Eva

        sizes = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads, "mlp_ratio": size.mlp / size.dim}
        given = {**sizes, **fixed, **options}
        return perturb(Eva(img_size=size.image, patch_size=size.patch, num_classes=5, **given))

    return build


# --- Segment Anything: image encoders of windows that do not divide the image, and one block of it all -------------------


def _windows(size: Size) -> dict[str, Any]:
    return {"window_size": size.image // size.patch // 2 + 1, "global_attn_indexes": (1,)}


def _sam_sizes(size: Size) -> dict[str, Any]:
    given = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads, "mlp_ratio": size.mlp / size.dim}
    return {**given, **_windows(size), "img_size": size.image, "patch_size": size.patch, "use_rel_pos": True}


def _sam_meta(size: Size, **options) -> nn.Module:
    from segment_anything.modeling import ImageEncoderViT

    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return perturb(ImageEncoderViT(**_sam_sizes(size), out_chans=8, norm_layer=norm, **options))


def _sam_transformers(size: Size, **options) -> nn.Module:
    drawn = {"initializer_range": 0.02}  # the default, 1e-10, leaves all weights at what perturb adds
    build = _transformers("SamVisionModel", "SamVisionConfig", "mlp_dim", output_channels=8, **_windows(size), **drawn)
    return build(size, **options)


def _sam_timm(size: Size, **options) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return perturb(VisionTransformerSAM(**_sam_sizes(size), neck_chans=8, num_classes=5, **options))


# --- torchvision and torch ----------------------------------------------------------------------------------------------


def _torchvision_vit(size: Size, **options) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    given = {"image_size": size.image, "patch_size": size.patch, "num_layers": size.depth, "num_heads": size.heads}
    return perturb(VisionTransformer(**given, hidden_dim=size.dim, mlp_dim=size.mlp, num_classes=5, **options))


def _torch_encoder(**fixed) -> Callable:
    def build(size: Size, **options) -> nn.Module:
        given = {"dropout": 0.0, "batch_first": True, **fixed, **options}
        heads = size.heads + size.heads % 2  # with an odd number torch makes no nested tensors of padded batches
        layer = nn.TransformerEncoderLayer(size.dim, heads, size.mlp, **given)
        nested = given["batch_first"] and not given.get("norm_first", False)  # torch warns where they cannot be made
        return perturb(nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=nested))

    return build


def _padded_tokens(size: Size, batch: int) -> dict[str, Any]:
    count = size.tokens + 1
    lengths = torch.arange(count, count - batch, -1).clamp(min=1)
    return {"src": noise(batch, count, size.dim), "src_key_padding_mask": torch.arange(count)[None] >= lengths[:, None]}


def _tokens_first(size: Size, batch: int) -> dict[str, Any]:
    return {"src": noise(size.tokens + 1, batch, size.dim)}


def _tokens(size: Size, batch: int) -> dict[str, Any]:
    return {"src": noise(batch, size.tokens + 1, size.dim)}


def _multihead(size: Size, **options) -> nn.Module:
    return perturb(nn.MultiheadAttention(size.dim, size.heads, **{"batch_first": True, **options}))


def _self_attention(size: Size, batch: int) -> dict[str, Any]:
    x = noise(batch, size.tokens + 1, size.dim)
    return {"query": x, "key": x, "value": x, "need_weights": False}


def _cross_attention(size: Size, batch: int) -> dict[str, Any]:
    context = noise(batch, size.tokens, size.dim, seed=1)
    return {"query": noise(batch, 7, size.dim), "key": context, "value": context, "need_weights": False}


_dinov3 = {"query_bias": True, "key_bias": False, "value_bias": True, "layerscale_value": 0.5, "num_register_tokens": 4}
_eva02 = {
    "use_abs_pos_emb": True,
    "use_rot_pos_emb": True,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "qkv_fused": False,
    "scale_attn_inner": True,
    "init_values": 0.5,
}
_pixels, _image = _images("pixel_values"), _images("x")

FAMILIES: dict[str, Family] = {
    "hf_vit": Family("transformers ViT", _transformers("ViTModel", "ViTConfig"), _pixels),
    "hf_deit": Family("transformers DeiT", _transformers("DeiTModel", "DeiTConfig"), _pixels),
    "hf_dinov2": Family(
        "transformers DINOv2", _transformers("Dinov2Model", "Dinov2Config", "mlp_ratio", layerscale_value=0.5), _pixels
    ),
    "hf_dinov2_swiglu": Family(
        "transformers DINOv2, SwiGLU",
        _transformers("Dinov2Model", "Dinov2Config", "mlp_ratio", layerscale_value=0.5, use_swiglu_ffn=True),
        _pixels,
    ),
    "hf_dinov2_registers": Family(
        "transformers DINOv2 with registers",
        _transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "mlp_ratio", layerscale_value=0.5),
        _pixels,
    ),
    "hf_dinov3": Family("transformers DINOv3", _transformers("DINOv3ViTModel", "DINOv3ViTConfig", **_dinov3), _pixels),
    "hf_dinov3_gated": Family(
        "transformers DINOv3, SwiGLU",
        _transformers("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu", **_dinov3),
        _pixels,
    ),
    "hf_siglip": Family(
        "transformers SigLIP vision",
        _transformers("SiglipVisionModel", "SiglipVisionConfig"),
        _pixels,
    ),
    "hf_clip": Family("transformers CLIP vision", _transformers("CLIPVisionModel", "CLIPVisionConfig"), _pixels),
    "hf_clip_text": Family("transformers CLIP text (causal)", _clip_text, _sentences),
    "timm_vit": Family("timm ViT", _timm(), _image),
    "timm_layer_scale": Family("timm ViT, LayerScale, drop path", _timm(init_values=0.5, drop_path_rate=0.2), _image),
    "timm_qk_norm": Family("timm ViT, q/k norm", _timm(qk_norm=True), _image),
    "timm_registers": Family("timm ViT, registers", _timm(reg_tokens=4, no_embed_class=True, init_values=0.5), _image),
    "timm_no_qkv_bias": Family("timm ViT without qkv bias", _timm(qkv_bias=False), _image),
    "timm_head_dim_80": Family("timm ViT, head dim 80", _timm_head_dim_80, _image),
    "timm_eva": Family("timm EVA", _timm_eva(init_values=0.5), _image),
    "timm_eva02": Family("timm EVA-02 (rotary, SwiGLU)", _timm_eva(**_eva02), _image),
    "timm_eva02_packed": Family(
        "timm EVA-02, packed SwiGLU",
        _timm_eva(**{**_eva02, "qkv_fused": True, "scale_mlp": False, "scale_attn_inner": False}),
        _image,
    ),
    "timm_dinov3": Family(
        "timm DINOv3",
        _timm_eva(
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_rotate_half=True,
            rope_type="dinov3",
            num_reg_tokens=4,
            init_values=0.5,
            qkv_bias=True,
        ),
        _image,
    ),
    "timm_rope": Family(
        "timm ViT, rotary, q/k norm", _timm_eva(attn_type="rope", use_rot_pos_emb=True, qk_norm=True, qkv_fused=True), _image
    ),
    "timm_rope_mixed": Family(
        "timm ViT, learned rotary (mixed)",
        _timm_eva(attn_type="rope", use_rot_pos_emb=True, rope_type="mixed"),
        _image,
    ),
    "sam_transformers": Family("transformers SAM image encoder", _sam_transformers, _pixels),
    "sam_meta": Family("segment_anything image encoder", _sam_meta, _image),
    "sam_timm": Family("timm SAM image encoder", _sam_timm, _image),
    "torchvision_vit": Family("torchvision ViT", _torchvision_vit, _image),
    "torch_pre_norm": Family("torch TransformerEncoder, pre-norm", _torch_encoder(norm_first=True, activation="gelu"), _tokens),
    "torch_post_norm": Family("torch TransformerEncoder, post-norm, padding", _torch_encoder(), _padded_tokens),
    "torch_tokens_first": Family(
        "torch TransformerEncoder, tokens first", _torch_encoder(batch_first=False, norm_first=True), _tokens_first
    ),
    "torch_attention": Family("torch MultiheadAttention, self", _multihead, _self_attention),
    "torch_cross_attention": Family("torch MultiheadAttention, cross", _multihead, _cross_attention),
}


def output_of(found: Any) -> Tensor:
    """The one tensor to compare: logits, tokens or the attention's output."""
    if isinstance(found, Tensor):
        return found
    return found[0] if isinstance(found, tuple) else found.last_hidden_state
