"""``SamAutomaticMaskGenerator`` beside segment_anything's, and the parts that it is made of against plain definitions."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("segment_anything")
pytest.importorskip("skimage")

from segment_anything import SamAutomaticMaskGenerator as Original
from segment_anything import automatic_mask_generator as original_module
from segment_anything.utils import amg
from skimage import measure

from fastvit import SamAutomaticMaskGenerator
from fastvit.pipelines import automatic, boxes, regions, rle, sampling
from tests.small_sam import face, iou, own_sam, small_sam, spotting

OPTIONS = {"points_per_side": 5, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.3, "stability_score_offset": 0.1}


def plain_nms(found: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Box by box as the definition says, every number a float32, the comparison in double precision."""
    rows = [[np.float32(number) for number in box] for box in found.tolist()]
    order = sorted(range(len(rows)), key=lambda index: -float(scores[index]))
    kept: list[int] = []
    zero = np.float32(0)
    for index in order:
        a = rows[index]
        for other in kept:
            b = rows[other]
            width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            if union > 0 and float(width * height / union) > threshold:
                break
        else:
            kept.append(index)
    return kept


def components(picture: np.ndarray, connectivity: int):
    """What OpenCV's function of that name returns, of which segment_anything uses the areas."""
    assert connectivity == 8
    labels = measure.label(picture, connectivity=2)
    areas = np.bincount(labels.ravel())
    return len(areas), labels, areas[:, None], None


@pytest.fixture(autouse=True)
def whole_original(monkeypatch):
    """segment_anything lacks two libraries' operators here: torchvision's compiled NMS, and OpenCV."""

    def batched_nms(found, scores, categories, iou_threshold):
        assert not categories.any()
        return torch.tensor(plain_nms(found, scores, iou_threshold), dtype=torch.int64)

    monkeypatch.setattr(original_module, "batched_nms", batched_nms)
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=components))


@pytest.fixture(scope="module")
def sam():
    return spotting(small_sam())


def assert_same(expected: list[dict], actual: list[dict]) -> None:
    assert len(expected) == len(actual)
    for left, right in zip(expected, actual, strict=True):
        assert list(left) == list(right)
        assert iou(left["segmentation"], right["segmentation"]) >= 0.999
        assert {**left, "segmentation": 0} == {**right, "segmentation": 0}
        assert json.dumps(left["crop_box"]) == json.dumps(right["crop_box"]), "whole numbers or floats"


CASES = {
    "a grid": {},
    "batches that do not divide the grid": {"points_per_batch": 7},
    "nothing filtered": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0},
    "few survive": {"stability_score_thresh": 0.55, "pred_iou_thresh": 0.45, "box_nms_thresh": 0.1},
    "crops": {"crop_n_layers": 1, "points_per_side": 4},
    "two layers of crops with fewer points": {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "points_per_side": 4},
    "crops that do not overlap": {"crop_n_layers": 1, "crop_overlap_ratio": 0.0, "points_per_side": 4, "crop_nms_thresh": 0.3},
    "a crop that finds nothing": {"crop_n_layers": 1, "points_per_side": 2, "pred_iou_thresh": 0.7},
    "without small regions": {"min_mask_region_area": 40},
    "crops without small regions": {"min_mask_region_area": 60, "crop_n_layers": 1, "points_per_side": 4},
    "regions all below the area": {"min_mask_region_area": 5000},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_records_are_the_originals_in_the_same_order(options, sam):
    options = OPTIONS | options
    expected = Original(sam, **options).generate(face())
    assert len(expected) >= 5
    assert_same(expected, SamAutomaticMaskGenerator(sam, **options).generate(face()))


def test_the_cases_reach_what_they_are_for(sam):
    """Crops, and regions removed, are in the records that the test above compares."""
    crops = SamAutomaticMaskGenerator(sam, **OPTIONS | CASES["crops"]).generate(face())
    assert len({tuple(record["crop_box"]) for record in crops}) == 5
    plain = SamAutomaticMaskGenerator(sam, **OPTIONS).generate(face())
    cleaned = SamAutomaticMaskGenerator(sam, **OPTIONS | CASES["without small regions"]).generate(face())
    assert {record["area"] for record in plain} != {record["area"] for record in cleaned}
    assert 0 < sum(record["area"] for record in plain) / len(plain) < 0.5 * face()[..., 0].size


def test_own_grids_of_points(sam):
    """On the border, in the corners, and twice at the same place."""
    grid = np.array([[0, 0], [1, 1], [0.5, 0], [0.5, 0.5], [0.5, 0.5], [1, 0.25]])
    options = {**OPTIONS, "points_per_side": None, "point_grids": [grid]}
    expected = Original(sam, **options).generate(face())
    assert len(expected) >= 3
    assert_same(expected, SamAutomaticMaskGenerator(sam, **options).generate(face()))


def test_a_sam_of_random_weights_alone():
    sam = small_sam(seed=1)
    options = {**OPTIONS, "pred_iou_thresh": -10.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    expected = Original(sam, **options).generate(face())
    assert len(expected) >= 5
    assert_same(expected, SamAutomaticMaskGenerator(sam, **options).generate(face()))


def test_fastvits_own_sam_finds_the_same(sam):
    """Rounding differs, so scores are close and masks equal up to single pixels; two scores would have to be closer than that
    for the order to change, and here none are."""
    options = OPTIONS | {"crop_n_layers": 1, "points_per_side": 4}
    expected = Original(sam, **options).generate(face())
    actual = SamAutomaticMaskGenerator(spotting(own_sam(small_sam())), **options).generate(face())
    assert len(expected) == len(actual) >= 20
    for left, right in zip(expected, actual, strict=True):
        assert iou(left["segmentation"], right["segmentation"]) >= 0.999
        assert (left["bbox"], left["crop_box"], left["point_coords"]) == (right["bbox"], right["crop_box"], right["point_coords"])
        assert left["predicted_iou"] == pytest.approx(right["predicted_iou"], abs=1e-5)
        assert left["stability_score"] == pytest.approx(right["stability_score"], abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    found = SamAutomaticMaskGenerator(spotting(own_sam(small_sam())).to(dtype), **OPTIONS).generate(face())
    assert len(found) > 10
    assert all(record["segmentation"].any() for record in found)


def test_encodings_are_the_originals_and_coco_says_the_same(sam):
    plain = SamAutomaticMaskGenerator(sam, **OPTIONS).generate(face())
    expected = Original(sam, **OPTIONS, output_mode="uncompressed_rle").generate(face())
    actual = SamAutomaticMaskGenerator(sam, **OPTIONS, output_mode="uncompressed_rle").generate(face())
    assert expected == actual
    for record, other in zip(
        plain, SamAutomaticMaskGenerator(sam, **OPTIONS, output_mode="coco_rle").generate(face()), strict=True
    ):
        assert isinstance(other["segmentation"]["counts"], str)
        np.testing.assert_array_equal(rle.decode_rle(other["segmentation"]), record["segmentation"])
        assert record["segmentation"].sum() == record["area"] == other["area"]


@pytest.mark.parametrize("options", [{"pred_iou_thresh": 2.0}, {"stability_score_thresh": 2.0}])
@pytest.mark.parametrize("more", [{}, {"crop_n_layers": 1}, {"min_mask_region_area": 9}])
def test_nothing_found_is_an_empty_list(options, more, sam):
    assert SamAutomaticMaskGenerator(sam, **OPTIONS | options | more).generate(face()) == []


def test_no_points_find_nothing(sam):
    generator = SamAutomaticMaskGenerator(sam, points_per_side=None, point_grids=[np.empty((0, 2))])
    assert generator.generate(face()) == []


def test_a_picture_too_small_for_its_crops(sam):
    """segment_anything would ask for a crop without pixels."""
    options = OPTIONS | {"crop_n_layers": 3, "points_per_side": 8}
    SamAutomaticMaskGenerator(sam, **options).generate(face()[:5, :5])
    assert sampling.crop_boxes(1, 3, 1, 0.3) == [((0, 0, 3, 1), 0), ((0, 0, 2, 1), 1), ((2, 0, 3, 1), 1)]


def test_masks_go_up_in_small_numbers_and_only_those_that_may_stay(sam, monkeypatch):
    expected = SamAutomaticMaskGenerator(sam, **OPTIONS).generate(face())
    upscaled = []
    real = automatic.SamPredictor.upscale
    monkeypatch.setattr(automatic.SamPredictor, "upscale", lambda self, low: upscaled.append(len(low)) or real(self, low))
    monkeypatch.setattr(automatic, "LOGITS_AT_ONCE", 3 * face()[..., 0].size)
    assert_same(expected, SamAutomaticMaskGenerator(sam, **OPTIONS).generate(face()))
    assert max(upscaled) == 3
    counts = []
    for threshold in (0.0, 0.3, 0.7, 2.0):
        upscaled.clear()
        SamAutomaticMaskGenerator(sam, **OPTIONS | {"pred_iou_thresh": threshold}).generate(face())
        counts.append(sum(upscaled))
    assert counts[0] == 3 * OPTIONS["points_per_side"] ** 2, "three masks a point"
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0


def test_the_picture_is_let_go(sam, monkeypatch):
    generator = SamAutomaticMaskGenerator(sam, **OPTIONS)
    generator.generate(face())
    assert generator.predictor.features is None
    monkeypatch.setattr(automatic, "nms", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.generate(face())
    assert generator.predictor.features is None


BAD_OPTIONS = [
    ({"points_per_side": None}, ValueError, "neither is given"),
    ({"point_grids": [np.zeros((1, 2))]}, ValueError, "both are given"),
    ({"output_mode": "png"}, ValueError, "output_mode is 'png'; expected one of binary_mask, uncompressed_rle, coco_rle"),
    ({"points_per_batch": 0}, ValueError, "points_per_batch is 0; expected at least 1"),
    ({"crop_n_layers": -1}, ValueError, "crop_n_layers is -1"),
    ({"points_per_side": 0}, ValueError, "points_per_side is 0"),
    (
        {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        ValueError,
        "each of 3 layers, not 3, 1, 0",
    ),
    ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, ValueError, "holds 1 grids; expected 2"),
    ({"points_per_side": None, "point_grids": [np.zeros(2)]}, ValueError, r"array of shape \(2,\); expected \(N, 2\)"),
]


@pytest.mark.parametrize(("options", "error", "says"), BAD_OPTIONS, ids=[case[2] for case in BAD_OPTIONS])
def test_arguments_that_do_not_fit_are_refused(options, error, says, sam):
    with pytest.raises(error, match=says):
        SamAutomaticMaskGenerator(sam, **options)


def test_a_missing_scipy_is_named(sam, monkeypatch):
    monkeypatch.setattr(automatic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"SciPy: pip install 'fastvit\[pictures\]'"):
        SamAutomaticMaskGenerator(sam, min_mask_region_area=1)
    SamAutomaticMaskGenerator(sam)


# Boxes


def test_boxes_of_masks():
    masks = torch.zeros(5, 6, 9, dtype=torch.bool)
    masks[1, 2, 3] = True  # one pixel
    masks[2] = True
    masks[3, 5, 8] = masks[3, 0, 4] = True
    masks[4, 0, 0] = True
    expected = [[0, 0, 0, 0], [3, 2, 3, 2], [0, 0, 8, 5], [4, 0, 8, 5], [0, 0, 0, 0]]
    assert boxes.boxes_of_masks(masks).tolist() == expected == amg.batched_mask_to_box(masks).tolist()
    assert boxes.boxes_of_masks(masks[3]).tolist() == expected[3]
    assert boxes.boxes_of_masks(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_nms_keeps_what_the_definition_keeps(threshold):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 30, (80, 4), generator=generator)
    found = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], dim=1)
    found[7] = found[3]  # a duplicate
    found[9, 2:] = found[9, :2]  # a box without area
    scores = torch.randint(0, 20, (80,), generator=generator) / 20  # with ties, which go by index
    kept = boxes.nms(found, scores, threshold).tolist()
    assert kept == plain_nms(found, scores, threshold)
    assert 5 < len(kept) <= 80


def test_nms_keeps_a_box_at_the_threshold():
    """IoU 1/10 is above 0.1 as a float32 among doubles, which is what torchvision compares."""
    found = torch.tensor([[0, 0, 10, 1], [0, 0, 1, 1], [20, 0, 30, 1], [20, 0, 25, 1]])
    scores = torch.tensor([1.0, 0.9, 0.8, 0.7])
    assert boxes.nms(found, scores, 0.1).tolist() == plain_nms(found, scores, 0.1) == [0, 2]
    assert boxes.nms(found, scores, 0.5).tolist() == [0, 1, 2, 3]
    assert boxes.nms(found[:0], scores[:0], 0.5).tolist() == []


def test_boxes_near_the_edge_of_a_crop():
    crop, size = [100, 0, 300, 200], (400, 300)
    found = torch.tensor([[100, 0, 300, 100], [121, 0, 300, 179], [120, 50, 200, 100], [150, 20, 279, 180], [150, 21, 200, 179]])
    expected = amg.is_box_near_crop_edge(found - torch.tensor([100, 0, 100, 0]), crop, [0, 0, 300, 400])
    assert boxes.near_crop_edge(found, crop, size).tolist() == expected.tolist() == [True, False, True, True, False]


# Where it looks


@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_grids_of_points(side):
    grid = sampling.point_grid(side)
    np.testing.assert_array_equal(grid, amg.build_point_grid(side))
    assert grid.shape == (side**2, 2)


@pytest.mark.parametrize("size", [(480, 640), (101, 57), (1000, 3), (64, 64)])
@pytest.mark.parametrize(("layers", "ratio"), [(0, 0.3), (1, 512 / 1500), (3, 0.2), (2, 0.0), (1, 1.0)])
def test_crops(size, layers, ratio):
    expected = zip(*amg.generate_crop_boxes(size, layers, ratio), strict=True)
    expected = [(tuple(box), layer) for box, layer in expected if box[0] < box[2] and box[1] < box[3]]
    assert sampling.crop_boxes(*size, layers, ratio) == expected


# Masks


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_stability(threshold):
    logits = torch.randn(4, 20, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 10, 0]).view(4, 1, 1)
    expected = amg.calculate_stability_score(logits, threshold, 1.0)
    actual = regions.stability_score(logits, threshold, 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    inner, outer = (logits[1] > threshold + 1).numpy(), (logits[1] > threshold - 1).numpy()
    assert actual[1].item() == pytest.approx(iou(inner, outer))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("area", [1, 3, 12, 10_000])
def test_small_regions(seed, area):
    """Islands and holes of all sizes; neighbours across a corner belong together."""
    mask = np.random.default_rng(seed).random((18, 23)) < (0.2, 0.4, 0.6, 0.8, 0.0, 1.0)[seed]
    for ours, mode in ((regions.fill_small_holes, "holes"), (regions.remove_small_islands, "islands")):
        expected, changed = amg.remove_small_regions(mask, area, mode)
        actual, ours_changed = ours(mask, area)
        assert changed == ours_changed
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == bool


def test_of_small_islands_alone_the_largest_stays():
    mask = np.zeros((9, 9), bool)
    mask[0, :2] = mask[4, :5] = mask[8, :3] = True
    kept, changed = regions.remove_small_islands(mask, 100)
    assert changed
    assert kept.sum() == kept[4].sum() == 5


# Encodings. The strings are pycocotools 2.0's.


def ellipse() -> np.ndarray:
    y, x = np.mgrid[:40, :30]
    return (y - 18) ** 2 / 225 + (x - 14) ** 2 / 100 < 1


def patch(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


PUBLISHED = [
    (patch(9, 9, slice(4, 5), slice(4, 5)), "X11X1"),
    (patch(5, 7, slice(1, 4), slice(2, 6)), ";32000004"),
    (np.zeros((3, 4), bool), "<"),
    (np.ones((40, 100), bool), "0Pm3"),
    (ellipse(), "d6=i04L4M2N2N2N2O000000000001N2N2N2N3L4LV7"),
]


@pytest.mark.parametrize(("mask", "counts"), PUBLISHED, ids=[counts for _, counts in PUBLISHED])
def test_compressed_counts_are_those_of_cocos_tools(mask, counts):
    plain = rle.encode_rle(torch.from_numpy(mask)[None])[0]
    compressed = rle.compress_rle(plain)
    assert compressed == {"size": list(mask.shape), "counts": counts}
    assert rle.decompress_counts(counts) == plain["counts"]
    np.testing.assert_array_equal(rle.decode_rle(compressed), mask)
    assert rle.area_of_rle(plain) == mask.sum()


def test_masks_survive_both_encodings():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, 13, 17, generator=generator) < torch.linspace(0, 1, 6).view(6, 1, 1)
    coarse = (torch.rand(4, 3, 2, generator=generator) < 0.5).repeat_interleave(700, 1).repeat_interleave(90, 2)
    for masks in (noise, coarse, noise[:, :1], noise[:, :, :1], noise[:, :1, :1]):
        plain = rle.encode_rle(masks)
        assert plain == amg.mask_to_rle_pytorch(masks)
        for mask, encoded in zip(masks.numpy(), plain, strict=True):
            np.testing.assert_array_equal(rle.decode_rle(encoded), mask)
            np.testing.assert_array_equal(amg.rle_to_mask(encoded), mask)
            np.testing.assert_array_equal(rle.decode_rle(rle.compress_rle(encoded)), mask)
    assert rle.encode_rle(noise[:0]) == []


def test_counts_of_any_size_survive_compression():
    counts = [0, 5, 31, 32, 0, 2**20, 15, 16, 17, 2**40, 1, 1, 0, 7]
    assert rle.decompress_counts(rle.compress_counts(counts)) == counts


@pytest.mark.parametrize(
    ("counts", "says"),
    [([3, 3], "runs of 6 pixels in all; expected 2×4 = 8"), ([-1, 9], "expected"), ("0P", "end within a number"), ("0~", "'~'")],
)
def test_damaged_encodings_are_refused(counts, says):
    with pytest.raises(ValueError, match=says):
        rle.decode_rle({"size": [2, 4], "counts": counts})
