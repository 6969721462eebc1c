"""Batches that the CPU path computes a few samples at a time: the same outputs, and whole where that would show."""

import pytest
import torch

import fastvit
from fastvit.integrations import block, pieces
from tests import sams_for_acceleration as sams
from tests.models_for_acceleration import hf_dinov2, image, tensor_of, timm_vit, tokens


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """Samples in each computation of a block, pieces being of two of ``hf_dinov2``'s samples (10 tokens, 144 features)."""
    seen, right = [], block._pre_norm

    def spy(parts, layout, ops, chosen, x, *rest):
        seen.append(x.shape[0])
        return right(parts, layout, ops, chosen, x, *rest)

    monkeypatch.setattr(block, "_pre_norm", spy)
    monkeypatch.setattr(pieces, "BYTES", 2 * 10 * 144 * 4)
    return seen


@pytest.fixture(autouse=True)
def _on_the_torch_backend():
    with fastvit.use_backend("torch"):
        yield


@torch.no_grad()
@pytest.mark.parametrize(("batch", "expected"), [(1, [1]), (4, [4]), (5, [2, 2, 1]), (6, [2, 2, 2])])
def test_a_large_batch_is_computed_a_few_samples_at_a_time(batches, batch, expected):
    model = hf_dinov2(num_hidden_layers=2)
    right = tensor_of(model(image(batch)))
    fastvit.accelerate(model)
    batches.clear()
    out = tensor_of(model(image(batch)))
    assert batches == expected * 2
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_single_sample_larger_than_a_piece_is_whole(batches, monkeypatch):
    model = fastvit.accelerate(hf_dinov2(num_hidden_layers=1))
    monkeypatch.setattr(pieces, "BYTES", 8)
    for batch in (1, 3):
        batches.clear()
        model(image(batch))
        assert batches == [1] * batch


def assert_the_same_in_pieces(batches, one, x, **options):
    """Of five samples."""
    right = one(x, **options)
    fastvit.accelerate(one)
    batches.clear()
    out = one(x, **options)
    assert batches == [2, 2, 1]
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masks", [1, 5])
@pytest.mark.parametrize("of", ["bool", "bias"])
def test_every_sample_meets_its_own_mask(batches, masks, of):
    one = timm_vit(init_values=None).blocks[0]
    x, mask = tokens(5, 10), torch.rand(masks, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    mask = (mask < 0.6) | torch.eye(10, dtype=torch.bool) if of == "bool" else 3 * mask
    assert_the_same_in_pieces(batches, one, x, attn_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True], ids=["one table", "a table a sample"])
def test_every_sample_is_rotated_by_its_own_angles(batches, own):
    from timm.models.eva import EvaBlock

    one, x = EvaBlock(48, 3, mlp_ratio=2, num_prefix_tokens=1).eval(), tokens(5, 10)
    rope = torch.randn(*((5, 1) if own else ()), 9, 32, generator=torch.Generator().manual_seed(0))
    assert_the_same_in_pieces(batches, one, x, rope=rope)


@torch.no_grad()
@pytest.mark.parametrize("key", ["segment_anything", "transformers"])
def test_images_of_segment_anything(batches, key):
    model = sams.encoder(key)
    right = sams.run(model, sams.image(5))
    fastvit.accelerate(model)
    batches.clear()
    out = sams.run(model, sams.image(5))
    assert len(batches) > 2
    assert max(batches) < 5
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)


def test_with_gradients_the_batch_is_whole(batches):
    """A graph of pieces would be larger than one of the whole."""
    model = fastvit.accelerate(hf_dinov2(num_hidden_layers=1))
    batches.clear()
    tensor_of(model(image(6))).sum().backward()
    assert batches == [6]


@torch.no_grad()
@pytest.mark.parametrize("option", ["proj_drop_rate", "drop_path_rate"])
def test_with_random_numbers_the_batch_is_whole(batches, option):
    """They are drawn for the batch, in its order."""
    model, drawn = timm_vit(depth=2, **{option: 0.5}).train(), []
    for prepare in (lambda model: None, fastvit.accelerate):
        prepare(model)
        batches.clear()
        torch.manual_seed(3)
        drawn.append(tensor_of(model(image(6))))
    assert batches[-1] == 6
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_output_under_autocast_keeps_its_dtype(batches):
    model, x = timm_vit(depth=1), image(5)
    with torch.autocast("cpu", torch.bfloat16):
        right = model.blocks(tokens(5, 10))
        fastvit.accelerate(model)
        batches.clear()
        out = model.blocks(tokens(5, 10))
    assert batches == [2, 2, 1]
    assert out.dtype == right.dtype
    torch.testing.assert_close(out, right, rtol=2e-2, atol=2e-2)
    assert not model(x).requires_grad


@torch.no_grad()
def test_a_graph_is_of_the_whole_batch_whatever_its_size(batches):
    """Where the size decided what is traced, a dynamic batch could not be exported, and would be compiled twice."""
    one, x = fastvit.accelerate(timm_vit(depth=1)).blocks[0], tokens(3, 10)
    batch = torch.export.Dim("batch", max=2**20)
    batches.clear()
    exported = torch.export.export(one, (x,), dynamic_shapes=({0: batch},)).module()
    assert len(batches) == 1
    torch.testing.assert_close(exported(tokens(6, 10)), one(tokens(6, 10)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_module_that_is_called_sees_the_whole_batch(batches):
    model, seen = timm_vit(scale_attn_norm=True, scale_mlp_norm=True, depth=1), []
    fastvit.accelerate(model)
    for norm in (model.blocks[0].attn.norm, model.blocks[0].mlp.norm):
        norm.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model(image(6))
    assert seen == [6, 6]


@torch.no_grad()
@pytest.mark.parametrize("samples", [2, 3])
def test_a_mask_of_another_number_of_samples_is_refused(batches, samples):
    one = fastvit.accelerate(timm_vit(init_values=None).blocks[0])
    with pytest.raises((RuntimeError, ValueError)):
        one(tokens(6, 10), attn_mask=torch.zeros(samples, 1, 10, 10))
