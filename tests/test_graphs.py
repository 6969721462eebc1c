"""CUDA graphs of an accelerated model: results, what decides a call, and which graph makes room. On a CPU, on tapes."""

import threading
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fastvit
from fastvit.graphs import ATTRIBUTE, store
from fastvit.graphs.signature import settings
from tests.models_for_acceleration import hf_vit, image, tensor_of, timm_vit
from tests.tapes import Probe, call, counting, graphed, outcome, recorded


@pytest.mark.parametrize("build", [hf_vit, timm_vit])
def test_results_are_the_same_for_any_batch_and_belong_to_the_caller(tapes, build):
    model = fastvit.accelerate(build())
    batches = [image(batch, seed=seed) for seed in range(4) for batch in (1, 3)]
    expected = [call(model, x) for x in batches]
    graphed(model)
    actual = [call(model, x) for x in batches]
    assert recorded(model) == 2
    assert outcome(model) == "2 recorded; its last call was replayed"
    for ours, theirs in zip(actual, expected, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(tensor_of(ours), tensor_of(theirs))
    assert not fastvit.report(model).fallbacks


def test_a_replay_runs_no_python_of_the_model(tapes):
    calls = []
    model = graphed(Probe(lambda self, x: calls.append(1) or self.linear(x)))
    call(model, torch.randn(2, 4), times=4)
    ran = len(calls)
    x = torch.randn(2, 4)
    assert torch.equal(call(model, x), model.linear(x))
    assert len(calls) == ran


def test_what_decides_a_call_is_in_its_signature(tapes):
    model = graphed(Probe(lambda self, x, factor=1.0, names=(): {"out": self.linear(x) * factor, "names": list(names)}))
    x = torch.randn(2, 4)
    for factor, names in ((1.0, ("a",)), (2.0, ("a",)), (1.0, ("b",)), (1, ("a",)), (True, ("a",)), (-0.0, ()), (0.0, ())):
        for _ in range(4):
            out = call(model, x, factor=factor, names=names)
            assert torch.equal(out["out"], model.linear(x) * factor)
            assert torch.equal(out["out"].signbit(), (model.linear(x) * factor).signbit())
            assert out["names"] == list(names)
    assert recorded(model) == 7
    for other in (x.T.contiguous().T, x[:1], x.expand(3, 2, 4)):
        assert torch.equal(call(model, other, times=4)["out"], model.linear(other))
    assert recorded(model) == 10


@pytest.mark.parametrize("name", ["fp32_precision", "allow_fp16_accumulation", "allow_bf16_reduced_precision_reduction"])
def test_settings_of_precision_are_told_apart(name):
    matmul, before = torch.backends.cuda.matmul, settings("cuda")
    value = getattr(matmul, name)
    try:
        setattr(matmul, name, "tf32" if name == "fp32_precision" else not value)
        assert settings("cuda") != before
    finally:
        setattr(matmul, name, value)
    assert settings("cuda") == before


def test_inference_mode_and_no_grad_are_told_apart(tapes):
    model = graphed(timm_vit())
    for mode in (torch.inference_mode, torch.no_grad):
        for _ in range(4):
            with mode():
                out = model(image())
            assert out.is_inference() == (mode is torch.inference_mode)
    assert recorded(model) == 2


def test_autocast_is_part_of_the_signature_and_its_cache_stays_out(tapes):
    model = graphed(timm_vit())
    x = image()
    with torch.no_grad():
        for _ in range(4):
            full = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(4):
                half = model(x)
            model.head.bias.add_(1)  # a cast of it that was cached would be stale
            again = model(x)
    assert recorded(model) == 2
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(again.float(), half.float() + 1, atol=0.05)
    [device] = model.__dict__[ATTRIBUTE].shared._recorders.values()
    assert device.cached == [False, False]


def _within(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)


_around = torch.autocast("cpu", dtype=torch.bfloat16)(lambda self, x: self.linear(x))  # made where casts are cached


@pytest.mark.parametrize(("body", "outer"), [(_within, False), (_around, True)], ids=["within", "decorator"])
def test_casts_by_an_autocast_of_the_models_own_are_made_anew(tapes, body, outer):
    model, x = graphed(Probe(body)), torch.randn(2, 4)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            call(model, x)
    assert recorded(model) == 1
    with torch.no_grad():
        model.linear.weight.add_(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        out = call(model, x)
    assert torch.equal(out, body(model, x))
    assert outcome(model) == "1 recorded; its last call was replayed"


Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    value: torch.Tensor
    name: str


def test_containers_come_back_as_what_they_are(tapes):
    def body(self, batch, *, extra):
        hidden = self.linear(batch["x"][0]) + extra.value
        return Pair(
            [hidden, None], {"same": hidden, "given": extra.value, "weight": self.weight, "row": Result(hidden[0], "row")}
        )

    model = graphed(Probe(body))
    for _ in range(4):
        x, extra = torch.randn(2, 4), Result(torch.randn(2, 4), "extra")
        out = call(model, {"x": (x, 3)}, extra=extra)
        expected = model.linear(x) + extra.value
        assert isinstance(out, Pair)
        assert out.first[1] is None
        assert torch.equal(out.first[0], expected)
        assert out.second["same"] is out.first[0]
        assert out.second["given"] is extra.value
        assert out.second["weight"] is model.weight
        assert isinstance(out.second["row"], Result)
        assert torch.equal(out.second["row"].value, expected[0])
    assert recorded(model) == 1


def test_dicts_of_other_kinds_are_returned_as_they_are_and_sizes_are_numbers(tapes):
    def body(self, x, size):
        out = defaultdict(list, out=self.linear(x))
        return out if size else (out["out"], x.shape, OrderedDict(out))

    model, x = graphed(Probe(body)), torch.randn(2, 4)
    for size in (x.shape[:0], x.shape[1:]):
        for _ in range(4):
            out = call(model, x, size)
            assert torch.equal(out["out"] if size else out[0], model.linear(x))
        if size:
            assert out["other"] == []
            assert "its result is or holds a defaultdict" in outcome(model)
        else:
            assert (type(out[1]), out[1]) == (torch.Size, x.shape)
            assert type(out[2]) is OrderedDict
    assert recorded(model) == 1


def test_one_tensor_given_twice_is_another_signature_than_two(tapes):
    model = graphed(Probe(lambda self, q, k: self.linear(q) + (1 if q is k else 2)))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    for _ in range(4):
        assert torch.equal(call(model, x, x), model.linear(x) + 1)
        assert torch.equal(call(model, x, y), model.linear(x) + 2)
    assert recorded(model) == 2


def test_threads_take_turns(tapes):
    model = graphed(timm_vit())
    inputs = [image(1 + index % 2, seed=index) for index in range(4)]
    expected = [call(model, x) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(4):
            if not torch.equal(call(model, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recorded(model) == 2


# --- places ---------------------------------------------------------------------------------------------------------------


def test_the_recording_replayed_longest_ago_makes_room_but_none_in_use(tapes, monkeypatch):
    monkeypatch.setattr(store, "MAX_RECORDINGS", 2)
    monkeypatch.setattr(store, "PATIENCE", 8)
    model = graphed(Probe(lambda self, x: self.linear(x)))

    def come(*batches):
        for batch in batches:
            x = torch.randn(batch, 4)
            assert torch.equal(call(model, x), model.linear(x))
        return sorted(entry.recording.inputs[0].shape[0] for entry in model.__dict__[ATTRIBUTE].recordings)

    assert come(1, 1, 1, 1, 2, 2, 2, 2) == [1, 2]
    assert come(*[1, 2, 3] * 5) == [1, 2]
    assert "2 other signatures are recorded, and in use" in outcome(model)
    assert come(*[2, 3] * 5) == [2, 3]
    monkeypatch.setattr(store, "MAX_SIGNATURES", 4)
    come(*range(4, 40))
    assert len(model.__dict__[ATTRIBUTE].entries) == 4
    assert recorded(model) == 2


def test_what_is_called_by_itself_has_graphs_of_its_own(tapes):
    model = graphed(timm_vit())
    for _ in range(4):
        with torch.no_grad():
            model.forward_features(image())
    assert fastvit.report(model).graphs == {
        "": "0 recorded; it was not called yet",
        "blocks": "1 recorded; its last call was replayed",
    }
    call(model, image(), times=4)
    assert recorded(model) == recorded(model.blocks) == 1
    outer = graphed(nn.Sequential(Probe(counting), timm_vit()).eval())
    outer[0].linear = nn.Identity().eval()
    call(outer, image(), times=6)  # in the second, looked on at, nothing inside counts
    graphs = fastvit.report(outer).graphs
    assert "it writes over a tensor" in graphs[""]
    assert graphs["1"] == "1 recorded; its last call was replayed"


def test_the_parts_of_sam_that_a_predictor_calls_are_recorded(tapes):
    from tests.small_sam import face, own_sam, small_sam

    sam = own_sam(small_sam()).eval()
    predictor = fastvit.SamPredictor(sam)

    def masks():
        predictor.set_image(face())
        return predictor.predict([[40, 40]], [1])[2]

    expected = masks()
    graphed(sam)
    for _ in range(4):
        actual = masks()
    assert abs(actual - expected).max() <= 1e-4 * abs(expected).max()
    graphs = fastvit.report(sam).graphs
    assert graphs["image_encoder"] == graphs["mask_decoder"] == "1 recorded; its last call was replayed"
