"""Whose memory a repeated launch is given, and when what was saved for backward is let go."""

import weakref

import torch

from fastvit import functional as F
from tests.launch_scenarios.harness import (
    addresses,
    block_of_a_vit,
    fresh,
    made,
    norm_inputs,
    refused,
    repeated,
    scenario,
    wanted,
)


@scenario
def a_block_lets_go_of_what_it_saved():
    block, _ = block_of_a_vit()
    own = {parameter.data_ptr() for parameter in block.parameters()}
    kept: list = []

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    for count in (1, 2, 3):
        x = fresh(1, 4, 32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block(x)
        keep(out)
        assert sum(ref() is not None for ref in kept) == len(kept) // count > 10
        out.sum().backward()
        del x, out
        assert [ref() for ref in kept] == [None] * len(kept)


@scenario
def backward_is_given_what_forward_saved():
    x, w, b = wanted(*norm_inputs())
    for _ in range(3):
        out, noted, _ = made(lambda: F.layer_norm(x, w, b))
        _, after, _ = made(lambda out=out: torch.autograd.grad(out, (x, w, b), torch.ones_like(out)))
        mean, rstd = addresses(noted[0])[-2:]
        assert {x.data_ptr(), w.data_ptr(), mean, rstd} <= set(addresses(after[0]))
        assert out.data_ptr() not in addresses(after[0])


@scenario
def what_is_saved_is_let_go():
    recalled, (w, b) = [], wanted(fresh(32), fresh(32))
    for _ in range(3):
        x = fresh(2, 4, 32).requires_grad_()
        out = F.layer_norm(x, w, b)
        recalled += [weakref.ref(x.untyped_storage()), weakref.ref(out.untyped_storage())]
        assert all(ref() is not None for ref in recalled[-2:])
        out.sum().backward()
        refused(lambda out=out: out.sum().backward(), "a second time")
        del x, out
        assert [ref() for ref in recalled] == [None] * len(recalled)


@scenario
def parameters_given_other_memory():
    x, w, b = norm_inputs()
    weight = torch.nn.Parameter(w)
    with torch.no_grad():
        repeated(lambda: F.layer_norm(x, weight, b))
        weight.data = fresh(32)
        _, noted, ordinary = made(lambda: F.layer_norm(x, weight, b))
    assert ordinary == 0
    assert weight.data_ptr() in noted[0][4]
    assert w.data_ptr() not in noted[0][4]
