"""Handoff: a block takes the norm that the one before computed, and only where nothing came in between."""

import copy
import threading

import pytest
import torch

import fastvit
from fastvit.integrations import block, handoff, swap
from tests.model_errors import relative
from tests.models_for_acceleration import (
    Encoder,
    OldDinov2Layer,
    old_vit,
    perturb,
    tokens,
)


@pytest.fixture
def handed(monkeypatch):
    """Lets the torch backend hand norms over, as Triton does, and counts the norms that were taken."""
    monkeypatch.setattr(handoff, "BACKENDS", ("triton", "torch"))
    taken = []
    real = handoff.collect

    def counting(x, norm):
        found = real(x, norm)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(block.handoff, "collect", counting)
    return taken


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [old_vit, lambda: perturb(Encoder(*(OldDinov2Layer() for _ in range(3))))])
def test_a_block_takes_the_norm_that_the_one_before_computed(handed, build, mode):
    model, x = build(), tokens()
    with mode():
        expected = model(x)
        actual = fastvit.accelerate(model)(x)
    assert relative(actual, expected) <= 1e-5
    assert handed[-3:] == [False, True, True]


def _changed_in_place(module, inputs, output):
    output.add_(1.0)


def _changed_through_a_view(module, inputs, output):
    output[:, 0].mul_(3.0)


def _another_tensor(module, inputs, output):
    return output + 1.0


def _equal_copy(module, inputs, output):
    return output.clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("between", [_changed_in_place, _changed_through_a_view, _another_tensor, _equal_copy])
def test_anything_in_between_is_seen(handed, between, mode):
    model, x = old_vit(), tokens()
    model.layer[0].register_forward_hook(between)
    with mode():
        expected = model(x)
        actual = fastvit.accelerate(model)(x)
    assert relative(actual, expected) <= 1e-5
    assert handed[-3:] == [False, False, True]


def test_a_norm_changed_or_replaced_in_between_is_seen(handed):
    model, x = old_vit(), tokens()
    fastvit.accelerate(model)

    def doubled(module, inputs, output):
        model.layer[1].layernorm_before.weight.mul_(2.0)

    handle = model.layer[0].register_forward_hook(doubled)
    with torch.no_grad():
        actual = model(x)
        handle.remove()
        assert handed[-3:] == [False, False, True]
        assert relative(actual, fastvit.restore(model)(x)) <= 1e-5
        fastvit.accelerate(model)
        model.layer[2].layernorm_before = copy.deepcopy(model.layer[0].layernorm_before)
        actual = model(x)
        assert handed[-3:] == [False, True, False]
        assert relative(actual, fastvit.restore(model)(x)) <= 1e-5


def test_nothing_is_handed_over_where_gradients_are_wanted(handed):
    model = fastvit.accelerate(old_vit())
    model(tokens()).sum().backward()
    assert not any(handed)


def test_the_torch_backend_hands_nothing_over():
    model = fastvit.accelerate(old_vit())
    with torch.no_grad():
        model(tokens())
    assert "offer" not in handoff._slot.__dict__


def test_an_offer_does_not_outlive_its_tensor(handed):
    model = fastvit.accelerate(old_vit())
    with torch.no_grad():
        out = model.layer[0](tokens())
    offer = handoff._slot.offer
    assert offer.normalized is not None
    del out
    assert offer.normalized is None


def test_copies_hand_over_among_themselves(handed):
    twin = copy.deepcopy(fastvit.accelerate(old_vit()))
    norm = twin.layer[1].layernorm_before
    assert twin.layer[0].__dict__[swap.ATTRIBUTE].next_norm is norm
    with torch.no_grad():
        twin(tokens())
    assert handed[-3:] == [False, True, True]


def test_threads_do_not_take_each_others_norms(handed):
    model = old_vit()
    inputs = [tokens(seed=number) for number in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    fastvit.accelerate(model)
    failures = []

    def work(number):
        with torch.no_grad():
            for _ in range(20):
                if relative(model(inputs[number]), expected[number]) > 1e-5:
                    failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert any(handed)
