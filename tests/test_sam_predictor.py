"""``SamPredictor`` beside segment_anything's, on photographs: the same masks, scores and low-resolution logits."""

import copy
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("segment_anything")
pytest.importorskip("skimage")

import segment_anything
from segment_anything import SamPredictor as Original
from segment_anything.utils.transforms import ResizeLongestSide as OriginalResize

import fastvit
from fastvit import SamPredictor, pipelines
from fastvit.pipelines import ResizeLongestSide
from tests.small_sam import GRID, SIDE, iou, own_sam, photograph, small_sam, with_text

PROMPTS = {
    "a point": {"point_coords": [[225, 120]], "point_labels": [1]},
    "points, one for the background": {"point_coords": [[225, 120], [10, 290]], "point_labels": [1, 0]},
    "a point and one that is none": {"point_coords": [[225, 120], [0, 0]], "point_labels": [1, -1]},
    "a point in the corner": {"point_coords": [[450, 299]], "point_labels": [1]},
    "points beyond the picture": {"point_coords": [[-20.5, 400], [451, 300]], "point_labels": [1, 0]},
    "a box": {"box": [120, 40, 330, 280]},
    "the whole picture as a box": {"box": [0, 0, 451, 300]},
    "a box and points": {"box": [120, 40, 330, 280], "point_coords": [[225, 120]], "point_labels": [0]},
    "nothing": {},
}


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.fixture
def predictor(sam):
    predictor = SamPredictor(sam)
    predictor.set_image(photograph())
    return predictor


@pytest.fixture
def original(sam):
    predictor = Original(sam)
    predictor.set_image(photograph())
    return predictor


def arrays(prompt: dict) -> dict:
    return {name: np.array(value) for name, value in prompt.items()}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_and_scores_are_the_originals(prompt, multimask, predictor, original):
    for logits in (False, True):
        options = {**arrays(prompt), "multimask_output": multimask, "return_logits": logits}
        expected, actual = original.predict(**options), predictor.predict(**options)
        for left, right in zip(expected, actual, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    assert expected[0].shape == (3 if multimask else 1, 300, 451)
    assert expected[0].std() > 0.1, "the masks differ from a constant"


def test_a_mask_is_a_prompt_for_the_next_call(predictor, original):
    low_res = original.predict(**arrays(PROMPTS["a point"]))[2][1:2]
    assert low_res.shape == (1, 4 * GRID, 4 * GRID)
    for prompt in ({}, PROMPTS["a box"]):
        expected = original.predict(**arrays(prompt), mask_input=low_res)
        actual = predictor.predict(**arrays(prompt), mask_input=low_res)
        np.testing.assert_array_equal(expected[0], actual[0])
        np.testing.assert_array_equal(expected[1], actual[1])
    assert not np.array_equal(actual[2], predictor.predict(**arrays(prompt))[2]), "the mask is seen"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_fastvits_own_sam_gives_the_same_masks(prompt, sam, original):
    predictor = SamPredictor(own_sam(sam))
    predictor.set_image(photograph())
    expected, actual = original.predict(**arrays(prompt)), predictor.predict(**prompt)
    assert min(iou(left, right) for left, right in zip(expected[0], actual[0], strict=True)) >= 0.999
    for left, right in zip(expected[1:], actual[1:], strict=True):
        np.testing.assert_allclose(right, left, rtol=0, atol=1e-5 * np.abs(left).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype, sam, original):
    """Prompts come in and masks go out in float32; the numbers are those of half precision."""
    predictor = SamPredictor(own_sam(sam).to(dtype))
    predictor.set_image(photograph())
    assert predictor.get_image_embedding().dtype == dtype
    low_res = original.predict(**arrays(PROMPTS["a point"]))[2][:1]
    for prompt in (PROMPTS["a box and points"], {"mask_input": low_res}):
        expected, actual = original.predict(**arrays(prompt), return_logits=True), predictor.predict(**prompt, return_logits=True)
        for left, right in zip(expected, actual, strict=True):
            assert right.dtype == np.float32
            assert np.abs(right - left).max() < 0.1 * np.abs(left).max()


@pytest.mark.parametrize("whose", ["fastvit's", "segment_anything's"])
def test_the_image_encoder_alone_in_bfloat16(whose, sam, original):
    mixed = copy.deepcopy(sam) if whose == "segment_anything's" else own_sam(sam)
    mixed.image_encoder.bfloat16()
    predictor = SamPredictor(mixed)
    predictor.set_image(photograph())
    low_res = original.predict(**arrays(PROMPTS["a point"]))[2][:1]
    for prompt in (arrays(PROMPTS["a box and points"]), {"mask_input": low_res}):
        expected, actual = original.predict(**prompt, return_logits=True), predictor.predict(**prompt, return_logits=True)
        assert 0 < np.abs(actual[0] - expected[0]).max() < 0.1 * np.abs(expected[0]).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_originals_models_in_other_dtypes(dtype, original):
    """Its prompt encoder knows float32 alone."""
    predictor = SamPredictor(small_sam().to(dtype))
    predictor.set_image(photograph())
    assert predictor.get_image_embedding().dtype == dtype
    low_res = original.predict(**arrays(PROMPTS["a point"]))[2][:1]
    for prompt in (PROMPTS["a box and points"], {"mask_input": low_res}, {}):
        expected, actual = original.predict(**arrays(prompt), return_logits=True), predictor.predict(**prompt, return_logits=True)
        for left, right in zip(expected, actual, strict=True):
            assert np.abs(right - left).max() < (1e-5 if dtype == torch.float64 else 0.1) * np.abs(left).max()
    fastvit.accelerate(predictor.model)
    np.testing.assert_allclose(predictor.predict()[2], actual[2], atol=0.05 * np.abs(actual[2]).max())
    assert {parameter.dtype for parameter in predictor.model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["coffee", "astronaut"])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_channel_orders_and_other_photographs(name, image_format, sam):
    picture = photograph(name)[:, :400]
    results = []
    for predictor in (Original(sam), SamPredictor(sam)):
        predictor.set_image(picture, image_format)
        results.append(predictor.predict(np.array([[200, 100]]), np.array([1]), return_logits=True))
        assert predictor.original_size == picture.shape[:2]
        assert max(predictor.input_size) == SIDE
    np.testing.assert_array_equal(results[0][0], results[1][0])


def test_a_model_that_wants_bgr_gets_it(sam, monkeypatch):
    monkeypatch.setattr(sam, "image_format", "BGR", raising=False)
    embeddings = []
    for predictor in (Original(sam), SamPredictor(sam)):
        predictor.set_image(photograph())
        embeddings.append(predictor.get_image_embedding())
    assert torch.equal(*embeddings)


def test_pillow_pictures_are_taken_in_any_mode(sam, predictor):
    expected = predictor.get_image_embedding()
    for picture in (Image.fromarray(photograph()), Image.fromarray(photograph()).convert("RGBA")):
        other = SamPredictor(sam)
        other.set_image(picture, "BGR")  # the order of an array's channels: a Pillow picture says its own
        assert torch.equal(other.get_image_embedding(), expected)
    grey = SamPredictor(sam)
    grey.set_image(Image.fromarray(photograph()).convert("L"))
    assert grey.get_image_embedding().shape == expected.shape


def test_batches_of_prompts_give_what_each_gives_alone(predictor, original):
    points = torch.tensor([[[225.0, 120.0]], [[40.0, 30.0]], [[450.0, 299.0]]])
    scaled = predictor.transform.apply_coords_torch(points, (300, 451))
    labels = torch.ones(3, 1, dtype=torch.int)
    masks, quality, low_res = predictor.predict_torch(scaled, labels)
    for left, right in zip(original.predict_torch(scaled, labels), (masks, quality, low_res), strict=True):
        assert torch.equal(left, right)
    for row in range(3):
        single = predictor.predict(points[row].numpy(), np.array([1]))
        assert min(iou(a, b) for a, b in zip(single[0], masks[row].numpy(), strict=True)) >= 0.999
        np.testing.assert_allclose(single[1], quality[row].numpy(), rtol=1e-4, atol=1e-5)


def both(sam, call):
    """What a call gives with fastvit's Sam and with segment_anything's, each in its own predictor."""
    results = []
    for predictor in (SamPredictor(own_sam(sam)), Original(sam)):
        predictor.set_image(photograph())
        results.append(call(predictor))
    for actual, expected in zip(*results, strict=True):
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


SHAPES = {
    "labels of no kind": lambda p: p.predict(np.array([[30, 40], [60, 70]]), np.array([2, 3]), return_logits=True),
    "labels alone": lambda p: p.predict(point_labels=np.array([1]), return_logits=True),
    "labels alone, in tensors": lambda p: p.predict_torch(None, torch.ones(1, 1), return_logits=True),
    "corners": lambda p: p.predict_torch(None, None, torch.tensor([[[3.0, 4], [50, 60]]] * 2), return_logits=True),
    "rows": lambda p: p.predict_torch(None, None, torch.tensor([[[3.0, 4, 50, 60]]] * 2), return_logits=True),
    "one mask for three points": lambda p: p.predict_torch(
        torch.tensor([[[3.0, 4]], [[30, 9]], [[8, 50]]]), torch.ones(3, 1), None, torch.ones(1, 1, 32, 32), return_logits=True
    ),
}


@pytest.mark.parametrize("call", SHAPES.values(), ids=SHAPES)
def test_prompts_that_the_original_takes(call, sam):
    both(sam, call)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_picture_of_floats_from_0_to_1(dtype, sam):
    pixels = photograph().astype(dtype) / dtype(255)

    def embed(predictor):
        predictor.set_image(pixels, "BGR")
        return [predictor.get_image_embedding()]

    both(sam, embed)


def test_several_scaled_pictures_share_a_prompt(sam):
    pixels = torch.rand(2, 3, 40, SIDE, generator=torch.Generator().manual_seed(0)) * 255

    def masks(predictor):
        predictor.set_torch_image(pixels, (80, 128))
        return [predictor.get_image_embedding(), *predictor.predict_torch(torch.ones(1, 1, 2), torch.ones(1, 1), None, None)[1:]]

    both(sam, masks)


def test_a_text_is_a_prompt():
    sam = with_text(own_sam(small_sam()), 6)
    words = torch.randn(6, generator=torch.Generator().manual_seed(0))
    predictor = SamPredictor(sam)
    predictor.set_image(photograph())
    sparse, dense = sam.prompt_encoder(text=words[None])
    expected = sam.mask_decoder(predictor.features, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)[0][0]
    assert torch.equal(torch.as_tensor(predictor.predict(text_embedding=words)[2]), expected)
    assert not torch.equal(torch.as_tensor(predictor.predict(text_embedding=-words.numpy())[2]), expected)


def test_a_picture_is_encoded_once(sam):
    calls = []
    handle = sam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    predictor = SamPredictor(sam)
    predictor.set_image(photograph())
    for prompt in PROMPTS.values():
        predictor.predict(**prompt)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["SamPredictor", "SamAutomaticMaskGenerator", "ResizeLongestSide"])
def test_calls_are_the_originals(name):
    """Same arguments in the same order with the same defaults; what is ours alone is given by name."""
    import segment_anything.utils.transforms as transforms

    theirs = getattr(transforms if name == "ResizeLongestSide" else segment_anything, name)
    for method, function in inspect.getmembers(theirs, inspect.isfunction):
        if (method.startswith("_") and method != "__init__") or method == "postprocess_small_regions":  # of its own records
            continue
        ours = inspect.signature(getattr(getattr(pipelines, name), method)).parameters.values()
        expected = inspect.signature(function).parameters.values()
        ours = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
        assert ours == [(p.name, p.default) for p in expected], method


# Several pictures


def pictures():
    """Of different sizes and shapes; Pillow's and arrays."""
    return [photograph(), photograph("coffee")[:300, :200], Image.fromarray(photograph("astronaut")[:90, :90])]


@pytest.mark.parametrize("whose", ["fastvit's", "fastvit's in bfloat16", "segment_anything's"])
def test_several_pictures_give_what_each_gives_alone(whose):
    sam = small_sam() if whose == "segment_anything's" else own_sam(small_sam())
    dtype = torch.bfloat16 if "bfloat16" in whose else torch.float32
    sam.to(dtype)
    together, alone = SamPredictor(sam), SamPredictor(sam)
    shapes = []
    sam.image_encoder.register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape)))
    together.set_images(pictures(), batch_size=2)
    assert shapes == [(2, 3, SIDE, SIDE), (1, 3, SIDE, SIDE)]
    assert together.get_image_embedding().shape == (3, 32, GRID, GRID)
    low_res = None
    for index in (2, 0, 1):
        alone.set_image(pictures()[index])
        assert together.original_size[index] == alone.original_size
        assert together.input_size[index] == alone.input_size
        for prompt in ({}, {"point_coords": [[60, 40]], "point_labels": [1]}, {"box": [5, 6, 70, 80], "mask_input": low_res}):
            expected = alone.predict(**prompt, return_logits=True)
            actual = together.predict(**prompt, return_logits=True, image_index=index)
            for left, right in zip(expected, actual, strict=True):
                assert left.shape == right.shape
                # Sums over a batch may be in another order, and bfloat16 rounds them in every layer.
                assert np.abs(left - right).max() <= (1e-5 if dtype == torch.float32 else 0.05) * np.abs(left).max()
            low_res = expected[2][:1]
    with pytest.raises(ValueError, match="image_index is 3; expected the place of one of 3 images"):
        together.predict(image_index=3)
    np.testing.assert_array_equal(together.predict(image_index=np.argmax([0, 1]))[0], together.predict(image_index=1)[0])
    together.set_image(pictures()[1])
    assert together.original_size == alone.original_size, "and one picture is one again"
    np.testing.assert_array_equal(together.predict()[0], alone.predict()[0])


BAD_LISTS = [
    (photograph(), TypeError, "images is ndarray; expected a list"),
    (Image.fromarray(photograph()), TypeError, "images is Image; expected a list"),
    ([], ValueError, "images holds no picture"),
    ([photograph(), photograph()[..., 0]], ValueError, r"images\[1\]: image has shape \(300, 451\); expected"),
    ([photograph(), "cat.jpg"], TypeError, r"images\[1\]: image is str"),
]


@pytest.mark.parametrize(("images", "error", "says"), BAD_LISTS, ids=[case[2] for case in BAD_LISTS])
def test_lists_that_are_none_are_refused(images, error, says, predictor):
    with pytest.raises(error, match=says):
        predictor.set_images(images)
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        predictor.set_images([photograph()], batch_size=0)


def test_a_list_with_a_picture_that_is_none_leaves_nothing_set(predictor):
    with pytest.raises(TypeError):
        predictor.set_images([photograph(), None], batch_size=1)
    with pytest.raises(RuntimeError, match="call set_image"):
        predictor.predict()


def test_embeddings_that_were_kept_can_be_set_again(sam, predictor):
    """As users of segment_anything's predictor do: its attributes are plain."""
    expected = predictor.predict(**PROMPTS["a box"])
    kept = {name: getattr(predictor, name) for name in ("features", "original_size", "input_size", "is_image_set")}
    other = SamPredictor(sam)
    vars(other).update(kept)
    np.testing.assert_array_equal(other.predict(**PROMPTS["a box"])[0], expected[0])


def test_nothing_is_left_of_a_picture_that_is_reset(predictor):
    predictor.reset_image()
    assert predictor.features is None
    for call in (predictor.predict, predictor.get_image_embedding, lambda: predictor.predict_torch(None, None)):
        with pytest.raises(RuntimeError, match="call set_image"):
            call()


def test_no_gradient_is_recorded():
    sam = small_sam().requires_grad_(True)
    predictor = SamPredictor(sam)
    predictor.set_image(photograph())
    assert not predictor.get_image_embedding().requires_grad
    assert not predictor.predict_torch(None, None, torch.tensor([[1.0, 2.0, 30.0, 40.0]]), return_logits=True)[0].requires_grad


# Scaling


SIZES = [(300, 451), (451, 300), (64, 64), (10, 7), (1, 60), (1000, 16), (63, 64), (65, 64), (129, 200)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_coordinates_are_scaled_as_the_original_does(size):
    ours, theirs = ResizeLongestSide(SIDE), OriginalResize(SIDE)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ours.apply_image(picture), theirs.apply_image(picture))
    points = np.random.default_rng(1).uniform(-5, 500, (6, 2))
    for given in (points, points.round().astype(int), points.astype(np.float32)):
        np.testing.assert_array_equal(ours.apply_coords(given, size), theirs.apply_coords(given, size))
    np.testing.assert_array_equal(ours.apply_boxes(points.reshape(3, 4), size), theirs.apply_boxes(points.reshape(3, 4), size))
    tensor = torch.from_numpy(points)
    assert torch.equal(ours.apply_coords_torch(tensor, size), theirs.apply_coords_torch(tensor, size))
    boxes = tensor.view(3, 4)
    assert torch.equal(ours.apply_boxes_torch(boxes, size), theirs.apply_boxes_torch(boxes, size))
    assert torch.equal(tensor, torch.from_numpy(points)), "the points given are not written to"


def test_pictures_in_tensors_are_scaled_to_the_same_size():
    pixels = torch.from_numpy(photograph()).permute(2, 0, 1)[None].float()
    scaled = ResizeLongestSide(SIDE).apply_image_torch(pixels)
    expected = torch.from_numpy(ResizeLongestSide(SIDE).apply_image(photograph())).permute(2, 0, 1)[None].float()
    assert scaled.shape == expected.shape == (1, 3, 43, 64)
    assert (scaled - expected).abs().max() < 1, "less than one of 255 levels"


# Tensors and arrays of other kinds


def test_prompts_in_bfloat16_and_backwards(predictor):
    """NumPy has no bfloat16, and PyTorch no array that is read backwards."""
    box, labels = torch.tensor([120.0, 40, 330, 280]), torch.tensor([1])
    mask = torch.randn(1, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = predictor.predict([[225, 120]], labels.numpy(), box.numpy(), mask.float().numpy())
    halved = predictor.predict(torch.tensor([[225.0, 120]]).bfloat16(), labels, box.bfloat16(), mask)
    reversed_twice = mask.float().numpy()[:, ::-1].copy()[:, ::-1]
    backwards = predictor.predict([[225, 120]], [1], box, reversed_twice)
    for one in (halved, backwards):
        np.testing.assert_array_equal(one[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_originals_model_takes_a_mask_in_its_own_dtype(dtype):
    predictor = SamPredictor(small_sam().to(dtype))
    predictor.set_image(photograph())
    mask = torch.randn(1, 1, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = predictor.predict(mask_input=mask[0].float())[2]
    np.testing.assert_array_equal(predictor.predict_torch(None, None, mask_input=mask)[2][0].numpy(), expected)


# What is refused


BAD_CALLS = [
    ({"point_coords": [[1, 2]]}, ValueError, "point_labels is None"),
    ({"point_coords": [1, 2], "point_labels": [1]}, ValueError, r"point_coords has shape \(2,\); expected \(N, 2\)"),
    ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1]}, ValueError, r"point_labels has shape \(1,\); expected \(2,\)"),
    ({"point_coords": [[1, float("nan")]], "point_labels": [1]}, ValueError, "point_coords holds numbers that are not finite"),
    ({"point_coords": [["a", "b"]], "point_labels": [1]}, TypeError, "point_coords has dtype"),
    ({"box": [1, 2, 3]}, ValueError, r"box has shape \(3,\); expected \(4,\)"),
    ({"box": [[1, 2, 3, 4], [1, 2, 3, 4]]}, ValueError, r"box has shape \(2, 4\); expected \(4,\)"),
    ({"text_embedding": [1.0, 2.0]}, ValueError, "text_embeddings: the model takes none; expected a Sam"),
    ({"mask_input": np.zeros((1, 8, 8))}, ValueError, r"mask_input has shape \(1, 8, 8\); expected \(1, 32, 32\)"),
]


@pytest.mark.parametrize(("prompt", "error", "says"), BAD_CALLS)
def test_prompts_that_do_not_fit_are_refused(prompt, error, says, predictor):
    with pytest.raises(error, match=says):
        predictor.predict(**prompt)


BAD_IMAGES = [
    (photograph().astype(np.int16), TypeError, "image has dtype int16; expected uint8"),
    (photograph().astype(np.float32), ValueError, "image has floats from 0 to 231; expected them from 0 to 1, or uint8"),
    (np.full((3, 3, 3), np.nan), ValueError, "image has floats from nan to nan"),
    (photograph()[..., 0], ValueError, r"image has shape \(300, 451\); expected \(H, W, 3\)"),
    (np.zeros((0, 5, 3), np.uint8), ValueError, "at least one pixel"),
    (np.zeros((1, 500, 3), np.uint8), ValueError, "image is 1×500 pixels"),
    ("cat.jpg", TypeError, "image is str"),
]


@pytest.mark.parametrize(("image", "error", "says"), BAD_IMAGES, ids=[case[2] for case in BAD_IMAGES])
def test_pictures_that_are_none_are_refused(image, error, says, sam):
    with pytest.raises(error, match=says):
        SamPredictor(sam).set_image(image)


def test_other_mistakes_are_named(sam, predictor):
    with pytest.raises(ValueError, match="image_format is 'HSV'"):
        predictor.set_image(photograph(), "HSV")
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) with a longest side of 64"):
        predictor.set_torch_image(torch.zeros(1, 3, 60, 60), (60, 60))
    with pytest.raises(ValueError, match=r"original_image_size is \(60, 64, 3\); expected \(H, W\)"):
        predictor.set_torch_image(torch.zeros(1, 3, 60, 64), (60, 64, 3))
    with pytest.raises(TypeError, match="transformed_image is ndarray; expected"):
        predictor.set_torch_image(np.zeros((1, 3, 60, 64)), (60, 64))
    with pytest.raises(ValueError, match="point_labels is None"):
        predictor.predict_torch(torch.zeros(1, 1, 2), None)
    with pytest.raises(TypeError, match="sam_model is Linear, without image_encoder"):
        SamPredictor(torch.nn.Linear(2, 2))
    assert predictor.device == torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_a_box_may_be_a_row_or_two_corners(shape, predictor, original):
    box = np.array([120, 40, 330, 280])
    expected = predictor.predict(box=box)[0]
    for one in (predictor, original):
        np.testing.assert_array_equal(one.predict(box=box.reshape(shape))[0], expected)


def test_it_is_reached_from_the_package():
    assert fastvit.SamPredictor is SamPredictor
    assert "SamPredictor" in dir(fastvit)
