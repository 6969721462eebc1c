"""SAM at full depth beside segment_anything and transformers: B at 1024 px down to its masks, L and H with a grid of 32×32.

The weights are those of ``benchmarks.sam_parity``, which does all three at 1024 px.
"""

import gc
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("segment_anything")
pytest.importorskip("skimage")
pytest.importorskip("transformers")

from benchmarks import sam_parity
from benchmarks.sam_parity import PROMPTS, ious, masks, photograph
from fastvit import SamPredictor
from fastvit.models import sam_vit_h, sam_vit_l
from fastvit.pipelines.embeddings import scale
from tests.model_errors import relative

pytestmark = [pytest.mark.full, pytest.mark.slow]

ENCODER = 1e-5  # relative to the largest value, in float32: sums in another order, through up to 32 blocks


def test_sam_b_at_1024_pixels_gives_the_same_embeddings_and_masks():
    from segment_anything import SamPredictor as Original

    theirs, ours = sam_parity.pair("b")
    original, predictor = Original(theirs), SamPredictor(ours)
    original.set_image(photograph())
    predictor.set_image(photograph())
    assert relative(predictor.features, original.features) <= ENCODER
    expected = masks(original)
    assert len(expected) == 3 * len(PROMPTS)
    shares = expected.mean((1, 2))
    assert 0.1 < shares.min() <= shares.max() < 0.9, "masks that are neither empty nor full"
    assert min(ious(masks(predictor), expected)) >= 0.999
    with torch.no_grad():
        pixels = theirs.preprocess(scale(photograph(), "RGB", ours, predictor.transform)[0])
        huggingface = sam_parity.huggingface_encoder(ours)(pixels).last_hidden_state
    assert relative(predictor.features, huggingface) <= ENCODER
    ours.image_encoder.bfloat16()
    predictor.set_image(photograph())
    assert min(ious(masks(predictor), expected)) >= 0.99
    ours.bfloat16()
    # The mean: of random weights' masks, whose logits crowd around the cutoff, single ones are a little below.
    assert np.mean(ious(masks(predictor), expected)) >= 0.99


@pytest.mark.parametrize("build", [sam_vit_l, sam_vit_h])
def test_encoders_of_full_depth_give_the_same_embeddings(build):
    """At 512 pixels: global blocks, windows of 14 of which the last are cut off, and the published indices of either."""
    from segment_anything.modeling import ImageEncoderViT

    ours = build(image_size=512, device="meta").image_encoder
    torch.manual_seed(0)
    theirs = ImageEncoderViT(
        img_size=512,
        embed_dim=ours.pos_embed.shape[3],
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=[index for index, block in enumerate(ours.blocks) if not block.attn.window_size],
    )
    sam_parity.with_tables(theirs)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    picture = torch.from_numpy(photograph()).permute(2, 0, 1)[None] / 64 - 2
    with torch.no_grad():
        assert relative(ours(picture), theirs(picture)) <= ENCODER
    del theirs, ours
    gc.collect()
