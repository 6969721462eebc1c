"""Small Segment Anything models of the libraries that ``accelerate`` serves, no parameter at a trivial value."""

from functools import partial

import torch
from torch import nn

import fastvit
from tests.models_for_acceleration import perturb

ERROR = 1e-5
SIDE, PATCH, WINDOW, DIM = 72, 8, 4, 48  # 9 × 9 tokens: windows of 4 leave a row and a column of one
LAST = "final_attn_token_to_image"


def with_tables(model: nn.Module) -> nn.Module:
    """No parameter at a trivial value, relative positions as strong as the scores."""
    perturb(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def meta_encoder(**options):
    from segment_anything.modeling import ImageEncoderViT

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "out_chans": 32}
    positions = {"use_rel_pos": True, "window_size": WINDOW, "global_attn_indexes": (1,)}
    return with_tables(ImageEncoderViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **{**sizes, **positions, **options}))


def meta_sam(**options):
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = SIDE // PATCH
    prompts = PromptEncoder(embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=32)
    return with_tables(Sam(meta_encoder(**options), prompts, decoder))


def hf_sam(hq: bool = False, attention: str = "sdpa", **options):
    import transformers

    prefix = "SamHQ" if hq else "Sam"
    vision = {"hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_dim": 96, "image_size": SIDE}
    vision |= {"patch_size": PATCH, "window_size": WINDOW, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16}
    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**vision, **options},
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 8},
        mask_decoder_config={**sizes, **({"vit_dim": DIM} if hq else {})},
    )
    config._attn_implementation = attention
    return with_tables(getattr(transformers, f"{prefix}Model")(config))


def timm_encoder(**options):
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sizes = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": DIM,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    positions = {"use_rel_pos": True, "window_size": WINDOW, "global_attn_indexes": (1,), "neck_chans": 32}
    return with_tables(VisionTransformerSAM(**{**sizes, **positions, **options}))


def encoder(key: str, **options) -> nn.Module:
    if key == "segment_anything":
        return meta_encoder(**options)
    if key == "timm":
        return timm_encoder(**options)
    return hf_sam("hq" in key, "eager" if "eager" in key else "sdpa", **options).vision_encoder


def image(batch: int = 2, size: int = SIDE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def embedding(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return embedding(model(x))


def assert_fused(model: nn.Module, count: int) -> None:
    found = fastvit.report(model)
    assert found.fallbacks == {}
    assert found.skipped == {}
    assert len(found.replaced) == count


def prompted(key: str) -> tuple[nn.Module, dict]:
    """A whole model and a call: two images, three prompts of two points each in transformers."""
    generator = torch.Generator().manual_seed(2)
    points = SIDE * torch.rand(2, 3, 2, 2, generator=generator)
    if key != "segment_anything":
        return hf_sam("hq" in key, "eager" if "eager" in key else "sdpa"), {"pixel_values": image(), "input_points": points}
    pictures = [255 * torch.rand(3, SIDE, size, generator=generator) for size in (SIDE, 61)]
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    prompts = [{"point_coords": p, "point_labels": labels, "original_size": (90, 80)} for p in points]
    given = [{**prompt, "image": picture} for prompt, picture in zip(prompts, pictures, strict=True)]
    return meta_sam(), {"batched_input": given, "multimask_output": True}


def masks_of(output) -> torch.Tensor:
    if isinstance(output, list):
        return torch.cat([torch.cat([found["low_res_logits"].flatten(), found["iou_predictions"].flatten()]) for found in output])
    return torch.cat([output.pred_masks.flatten(), output.iou_scores.flatten()])
