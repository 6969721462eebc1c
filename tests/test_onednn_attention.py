"""Attention over many tokens on an x86 CPU: the reference's numbers from oneDNN, and only where it may and should serve."""

import pytest
import torch

import fastvit
from fastvit import functional, reference
from fastvit.ops import onednn, onednn_attention, torch_image_attention

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts what oneDNN attends to, on any CPU, from few tokens on and in tiles of few rows."""
    calls = []
    real = onednn_attention.attention
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    monkeypatch.setattr(onednn_attention, "LEAST_TOKENS", 12)
    monkeypatch.setattr(onednn_attention, "LEAST_ROWS", 5)
    monkeypatch.setattr(onednn_attention, "TILE_SCORES", 64)
    monkeypatch.setattr(onednn_attention, "attention", lambda *arguments: calls.append(1) or real(*arguments))
    with fastvit.use_backend("torch"):
        yield calls


def packed(batch=2, tokens=17, heads=3, dim=8, dtype=torch.float32):
    """(query, key, value): views of what one linear would return."""
    return torch.randn(batch, tokens, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("keys", [12, 30, 200], ids=["tiles of 5", "tiles of the least rows", "longer than a tile"])
@pytest.mark.parametrize("layout", ["packed", "contiguous", "grouped", "other value dim"])
def test_it_gives_the_reference(calls, keys, layout):
    query, key, value = packed()[0], *packed(tokens=keys)[1:]
    if layout == "contiguous":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    elif layout == "grouped":
        key, value = key[:, :1], value[:, :1]
    elif layout == "other value dim":
        value = torch.randn(2, 3, keys, 4)
    kept = [t.clone() for t in (query, key, value)]
    with torch.inference_mode():
        actual = functional.attention(query, key, value, scale=0.7)
    assert calls
    torch.testing.assert_close(actual, reference.attention(query, key, value, scale=0.7), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(now, before) for now, before in zip((query, key, value), kept, strict=True))


def test_relative_positions(calls):
    query, key, value = packed(tokens=24)
    rel_h, rel_w = torch.randn(2, 3, 24, 4), torch.randn(2, 3, 6, 24).transpose(2, 3)
    rel_h[0, 1, 5:7], rel_h[1, 2, :, 1] = -torch.inf, -torch.inf  # rows with nothing to attend to, and keys
    with torch.no_grad():
        actual = functional.attention(query, key, value, rel_h=rel_h, rel_w=rel_w)
    assert calls
    expected = reference.attention(query, key, value, rel_h=rel_h, rel_w=rel_w)
    assert not actual[0, 1, 5:7].any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize(
    ("window", "served"), [(0, True), (4, True), (3, False)], ids=["global", "padded windows", "small windows"]
)
def test_images(calls, monkeypatch, positions, window, served):
    monkeypatch.setattr(torch_image_attention, "ONEDNN_ROWS", 14)
    size, dim = window or 7, 8
    qkv, pad = torch.randn(2, 7, 5, 3 * 2 * dim), torch.randn(3 * 2 * dim)
    options = {"num_heads": 2, "window_size": window, "pad_qkv": pad if window else None}
    if positions:
        options |= {"rel_pos_h": torch.randn(2 * size - 1, dim), "rel_pos_w": torch.randn(2 * (window or 5) - 1, dim)}
    with torch.no_grad():
        actual = functional.image_attention(qkv, **options)
    assert bool(calls) == served
    torch.testing.assert_close(actual, reference.image_attention(qkv, **options), rtol=1e-5, atol=1e-5)


def test_what_it_may_not_serve(calls, monkeypatch):
    query, key, value = packed()
    with torch.no_grad():
        functional.attention(*packed(dtype=torch.bfloat16))
        functional.attention(*packed(dtype=torch.float64))
        functional.attention(query, key, value, is_causal=True)
        functional.attention(query, key, value, torch.ones(17, 17, dtype=torch.bool))
        functional.attention(query[:, :, :11], key, value)
        functional.attention(query, key[:, :, :11], value[:, :, :11])
        torch.func.vmap(lambda q: functional.attention(q[None], key[:1], value[:1]))(query)
        with pytest.raises(NotImplementedError):  # SDPA's own
            torch.func.jvp(lambda q: functional.attention(q, key, value), (query,), (query,))
        torch.jit.trace(lambda q: functional.attention(q, key, value), query, check_trace=False)
        with torch.backends.mkldnn.flags(enabled=False):
            functional.attention(query, key, value)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            functional.attention(query, key, value)
        for vendor in ("intel", "other"):
            monkeypatch.setattr(onednn, "cpu_vendor", lambda name=vendor: name)
            functional.attention(query, key, value)
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    functional.attention(query.contiguous().requires_grad_(), key, value).sum().backward()
    assert not calls
    with torch.no_grad():
        functional.attention(query, key, value)
    assert calls
