"""Masks ranked by words: similarities are CLIP's own, of what is cut out, and nothing but the cut decides."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("segment_anything")
pytest.importorskip("skimage")
pytest.importorskip("transformers")

import transformers

import fastvit
from fastvit import loading
from fastvit.pipelines import rank_by_text, rle, text
from tests.small_clip import save_clip
from tests.small_sam import photograph

WORDS = "a photo of a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return transformers.CLIPModel.from_pretrained(folder).eval(), text.clip_processor(str(folder))


def regions() -> np.ndarray:
    """Left eye, nose, a strip of background, nothing, all."""
    masks = np.zeros((5, 300, 451), bool)
    masks[0, 80:150, 130:220] = True
    masks[1, 220:290, 215:290] = True
    masks[2, 100:290, 400:] = True
    masks[4] = True
    return masks


@pytest.mark.parametrize("background", text.BACKGROUNDS)
def test_similarities_are_those_of_clip_with_each_cut(background, clip):
    model, processor = clip
    found = rank_by_text(photograph(), regions(), WORDS, model, processor, background=background)
    expected = []
    for mask in regions():
        if not mask.any():
            expected.append(-1.0)
            continue
        inputs = processor(text=[WORDS], images=text.cut_out(photograph(), mask, background), return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        expected.append((output.logits_per_image / model.logit_scale.exp()).item())
    assert [match.mask for match in found] == sorted(range(5), key=lambda row: -expected[row])
    assert [match.similarity for match in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert found[-1] == (3, -1.0), "an empty mask resembles nothing"
    assert found[0].similarity - found[-2].similarity > 1e-3


def test_words_decide(clip):
    orders = {tuple(rank_by_text(photograph(), regions(), words, *clip)) for words in ("cat", "the moon over a lake", "dog")}
    assert len(orders) == 3


def test_masks_come_as_arrays_tensors_and_records(clip):
    expected = rank_by_text(photograph(), regions(), WORDS, *clip)
    plain = rle.encode_rle(torch.from_numpy(regions()))
    forms = [
        torch.from_numpy(regions()),
        list(regions()),
        [{"segmentation": mask, "area": 1} for mask in regions()],
        [{"segmentation": encoded} for encoded in plain],
        [{"segmentation": rle.compress_rle(encoded)} for encoded in plain],
    ]
    for masks in forms:
        assert rank_by_text(Image.fromarray(photograph()), masks, WORDS, *clip) == expected


def test_small_batches_and_acceleration_change_nothing(clip, folder):
    expected = rank_by_text(photograph(), regions(), WORDS, *clip)
    accelerated = loading.load(str(folder))
    assert fastvit.report(accelerated).replaced
    for model in (clip[0], accelerated):
        found = rank_by_text(photograph(), regions(), WORDS, model, clip[1], batch_size=2)
        assert [match.mask for match in found] == [match.mask for match in expected]
        assert [match.similarity for match in found] == pytest.approx([match.similarity for match in expected], abs=1e-5)


def test_half_precision_is_taken(clip, folder):
    model = transformers.CLIPModel.from_pretrained(folder).eval().bfloat16()
    found = {match.mask: match.similarity for match in rank_by_text(photograph(), regions(), WORDS, model, clip[1])}
    for match in rank_by_text(photograph(), regions(), WORDS, *clip):
        assert found[match.mask] == pytest.approx(match.similarity, abs=0.05)


class Letters:
    """A tokenizer and image processor for a SigLIP without files: letters are numbers, pictures are scaled."""

    def __call__(self, text, images, return_tensors, truncation, padding, max_length=None):
        ids = [*[ord(letter) % 40 + 2 for letter in text[0]][:max_length], 1]
        if padding == "max_length":
            ids = [*ids, *[1] * max_length][:max_length]
        pixels = np.stack(
            [np.asarray(image.resize((32, 32)), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1 for image in images]
        )
        return {"input_ids": torch.tensor([ids]), "pixel_values": torch.from_numpy(pixels)}


def test_a_siglip_gets_its_text_padded_to_the_length_it_was_trained_with():
    """As its documentation says: padding="max_length"."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = sizes | {"vocab_size": 50, "max_position_embeddings": 24, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=words, vision_config=sizes | {"image_size": 32, "patch_size": 8})
    model = transformers.SiglipModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = []
    for mask in regions()[:3]:
        cut = text.cut_out(photograph(), mask)
        inputs = Letters()([WORDS], [cut], "pt", True, padding="max_length", max_length=24)
        with torch.no_grad():
            output = model(**inputs)
        expected.append(((output.logits_per_image - model.logit_bias) / model.logit_scale.exp()).item())
    found = {match.mask: match.similarity for match in rank_by_text(photograph(), regions()[:3], WORDS, model, Letters())}
    assert [found[row] for row in range(3)] == pytest.approx(expected, abs=1e-5)


def test_no_masks_rank_as_none(clip):
    assert rank_by_text(photograph(), [], WORDS, *clip) == []
    assert rank_by_text(photograph(), regions()[3:4], WORDS, *clip) == [(0, -1.0)]


def test_what_is_cut_out():
    picture, mask = photograph(), np.zeros((300, 451), bool)
    mask[100:120, 200:240] = True
    mask[110, 210] = False
    box = (slice(96, 124), slice(196, 244))  # a tenth of 40 beyond the mask on every side
    inside = mask[box]
    whole = np.asarray(text.cut_out(picture, mask, "keep"))
    np.testing.assert_array_equal(whole, picture[box])
    for background in ("blur", "blank"):
        cut = np.asarray(text.cut_out(picture, mask, background))
        np.testing.assert_array_equal(cut[inside], whole[inside])
        assert (cut[~inside] != whole[~inside]).any(-1).mean() > 0.9
    assert (cut[~inside] == text.GREY).all()
    np.testing.assert_array_equal(np.asarray(text.cut_out(picture, mask, "keep", margin=0)), picture[100:120, 200:240])


def test_a_pixel_in_the_corner_is_cut_out():
    mask = np.zeros((300, 451), bool)
    mask[299, 450] = True
    assert text.cut_out(photograph(), mask).size == (1, 1)
    assert text.cut_out(photograph(), ~mask).size == (451, 300)


BAD = [
    ({"text": " "}, ValueError, "text is ' '; expected words"),
    ({"text": ["cat"]}, ValueError, "expected words"),
    ({"background": "white"}, ValueError, "background is 'white'; expected one of blur, blank, keep"),
    ({"masks": regions()[:, :10]}, ValueError, r"one of shape \(10, 451\); expected the image's, \(300, 451\)"),
    ({"masks": regions().astype(np.float32)}, TypeError, "masks hold float32; expected booleans"),
    ({"batch_size": -1}, ValueError, "batch_size is -1; expected at least 1"),
    ({"margin": -0.6}, ValueError, "margin is -0.6; expected at least 0"),
    ({"image": photograph() > 9}, TypeError, "image has dtype bool"),
]


@pytest.mark.parametrize(("given", "error", "says"), BAD, ids=[case[2] for case in BAD])
def test_arguments_that_do_not_fit_are_refused(given, error, says, clip):
    arguments = {"image": photograph(), "masks": regions(), "text": WORDS, "clip_model": clip[0], "clip_processor": clip[1]}
    with pytest.raises(error, match=says):
        rank_by_text(**arguments | given)


def test_a_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(loading.LoadError, match=str(tmp_path)):
        text.clip_processor(str(tmp_path))
