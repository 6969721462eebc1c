"""Small Sams of ours and segment_anything's with the same seeded weights, and inputs for them."""

from functools import partial

import torch

from fastvit.models.sam import ImageEncoder, build_sam
from tests.models_for_acceleration import perturb

FLOAT32 = 1e-5  # relative to the largest value: sums in another order, through some blocks
ENCODER = {"image_size": 80, "patch_size": 16, "dim": 32, "depth": 3, "num_heads": 2, "out_channels": 16, "window_size": 3}


def theirs_of(ours: ImageEncoder):
    """segment_anything's encoder of the same sizes, with random weights, which ``ours`` takes."""
    from segment_anything.modeling import ImageEncoderViT

    block = ours.blocks[0]
    theirs = ImageEncoderViT(
        img_size=ours.img_size,
        patch_size=ours.patch_size,
        embed_dim=ours.pos_embed.shape[3],
        depth=len(ours.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.lin1.out_features / ours.pos_embed.shape[3],
        out_chans=ours.neck[0].out_channels,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=max(b.attn.window_size for b in ours.blocks),
        global_attn_indexes=[index for index, b in enumerate(ours.blocks) if not b.attn.window_size],
    )
    ours.load_state_dict(perturb(theirs).state_dict())
    return theirs


def images(side=80, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def parts(side=160, dim=32, mask_in=16, decoder_dim=32, mlp_dim=64, **options):
    """segment_anything's Sam and ours, small, with the same weights."""
    from segment_anything import modeling

    grid = side // 16
    encoder = ImageEncoder(
        side, 16, dim=dim, depth=2, num_heads=2, out_channels=decoder_dim, window_size=3, global_attention=(1,)
    )
    theirs = modeling.Sam(
        theirs_of(encoder),
        modeling.PromptEncoder(decoder_dim, (grid, grid), (side, side), mask_in),
        modeling.MaskDecoder(
            transformer_dim=decoder_dim,
            transformer=modeling.TwoWayTransformer(2, decoder_dim, 4, mlp_dim),
            iou_head_hidden_dim=decoder_dim,
        ),
    )
    sizes = {"dim": dim, "depth": 2, "num_heads": 2, "global_attention": (1,), "window_size": 3, "mask_in_channels": mask_in}
    sizes |= {"prompt_dim": decoder_dim, "decoder_heads": 4, "decoder_mlp_dim": mlp_dim, "iou_head_hidden_dim": decoder_dim}
    ours = build_sam(side, **sizes, **options)
    ours.load_state_dict(perturb(theirs).state_dict(), strict="text_dim" not in options)
    return ours, theirs


def points(batch=3, count=2):
    coordinates = random(batch, count, 2).abs() * 60
    labels = torch.tensor([1, 0, -1]).repeat(batch * count)[: batch * count].view(batch, count)
    return coordinates, labels


def theirs_take(prompts):
    return {"points": None, "boxes": None, "masks": None, **prompts}


def decode(model, embeddings, multimask=True, **prompts):
    sparse, dense = model.prompt_encoder(**theirs_take(prompts))
    return model.mask_decoder(
        image_embeddings=embeddings,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


def every_gradient(model):
    """Zeros stand for none."""
    return {name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}
