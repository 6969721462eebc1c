"""Steps repeated from recipes: gradients, what is frozen in between, and what autograd refuses."""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvit
from benchmarks.overhead import _vit, autocast, trained
from fastvit import functional as F
from fastvit import nn
from tests.launch_scenarios.harness import (
    SCENARIOS,
    addresses,
    block_of_a_vit,
    fresh,
    made,
    norm_inputs,
    refused,
    scenario,
    wanted,
    without_addresses,
)


def trains_again(forward, leaves):
    """A step, once Triton's own way and then from recipes: the same launches, into other memory."""

    def step():
        out = forward()
        return out, torch.autograd.grad(out, leaves, torch.ones_like(out))

    (out, grads), noted, ordinary = made(step)
    assert ordinary == len(noted) > 1, (ordinary, len(noted), out.grad_fn)
    (again, others), repeats, ordinary = made(step)
    assert ordinary == 0, f"{ordinary} of {len(repeats)} launches went Triton's own way"
    assert without_addresses(noted) == without_addresses(repeats)
    for a, b in zip((out, *grads), (again, *others), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.data_ptr() != b.data_ptr()
    assert type(out.grad_fn).__name__ == type(again.grad_fn).__name__


SCENARIOS.update({f"trains {name}": functools.partial(lambda name: trains_again(*trained()[name]), name) for name in trained()})


@scenario
def a_block_trains():
    block, x = block_of_a_vit()
    trains_again(lambda: block(x), (x, *block.parameters()))
    assert block(x).grad_fn.name() == "BlockBackward"
    with fastvit.use_backend("torch"):
        assert block(x).grad_fn.name() != "BlockBackward"


@scenario
def a_block_trains_under_autocast():
    block, x = block_of_a_vit()
    block.float()
    x = x.detach().float().requires_grad_()
    leaves = (x, *block.parameters())

    def forward():
        with autocast(torch.float16):
            return block(x)

    trains_again(forward, leaves)
    out = forward()
    assert (out.grad_fn.name(), out.dtype) == ("BlockBackward", torch.float32)
    weight = block.mlp.fc1.weight
    for _ in range(3):
        (out, grads), noted, _ = made(lambda: (out := forward(), torch.autograd.grad(out, leaves, torch.ones_like(out))))
        assert all(grad.dtype == torch.float32 for grad in grads)
        given = {address for launch in noted for address in addresses(launch)}
        assert weight.data_ptr() not in given, "a kernel was given a weight as it is stored"
        assert block.norm2.weight.data_ptr() in given
        assert not any(grad.data_ptr() == other.data_ptr() for grad in grads for other in leaves)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(dtype):
            _, noted, ordinary = made(lambda: block(x))
        assert (ordinary == 0) == (dtype == torch.float16), "one recipe served both dtypes"


@scenario
def a_block_trains_with_stochastic_depth():
    model = _vit(depth=2, num_classes=0, drop_path_rate=0.5).train()
    fastvit.accelerate(model)
    block, x = model.blocks[1], fresh(8, 4, 32).requires_grad_()
    trains_again(lambda: block(x), (x, *block.parameters()))
    outs = [block(x) for _ in range(4)]
    assert outs[0].grad_fn.name() == "BlockBackward"
    assert not all(torch.equal(out, outs[0]) for out in outs), "the draw was kept with the recipe"


@scenario
def a_block_of_images_trains():
    block, x = nn.EncoderBlock(32, 2, window_size=2).half(), fresh(1, 3, 4, 32).requires_grad_()
    trains_again(lambda: block(x), (x, *block.parameters()))
    assert block(x).grad_fn.name() == "BlockBackward"


@scenario
def a_blocks_parameters_frozen_and_thawed():
    block, x = block_of_a_vit()
    for frozen in (None, "mlp.fc2.weight", "attn.qkv.weight", "norm1.bias", "attn.proj.bias", None):
        for _ in range(3):
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(name != frozen)
            block.zero_grad()
            block(x).sum().backward()
            without = [name for name, parameter in block.named_parameters() if parameter.grad is None]
            assert without == ([] if frozen is None else [frozen])
    for tensor in (x, *block.parameters()):
        tensor.requires_grad_(False)
    assert block(x).grad_fn is None


@scenario
def a_parameter_frozen_and_thawed():
    x, w, b = wanted(*norm_inputs())
    w1, b1 = wanted(fresh(8, 32), fresh(8))

    def step():
        for tensor in (x, w, b, w1, b1):
            tensor.grad = None
        F.linear(F.layer_norm(x, w, b), w1, b1, activation="gelu").sum().backward()
        return [t.grad is not None for t in (x, w, b, w1, b1)]

    for _ in range(3):
        assert step() == [True] * 5
    for frozen in (w, w1, b1, x):
        for _ in range(3):
            frozen.requires_grad_(False)
            assert step() == [t is not frozen for t in (x, w, b, w1, b1)]
        frozen.requires_grad_(True)
    assert step() == [True] * 5


@scenario
def gradients_add_up_over_steps():
    x, w, b = wanted(*norm_inputs())
    hooked = []
    w.register_post_accumulate_grad_hook(lambda t: hooked.append(t.grad))
    F.layer_norm(x, w, b).sum().backward()
    first = w.grad
    for count in (2, 3):
        _, noted, ordinary = made(lambda: F.layer_norm(x, w, b).sum().backward())
        assert ordinary == 0
        assert w.grad is first, "a gradient replaced another instead of being added to it"
        assert first.data_ptr() not in [address for launch in noted for address in addresses(launch)]
        assert len(hooked) == count


@scenario
def tensors_changed_before_backward_are_refused():
    x, w, b = wanted(*norm_inputs())
    for _ in range(3):
        out = F.layer_norm(x, w, b)
        with torch.no_grad():
            w.mul_(2)
        refused(lambda out=out: out.sum().backward(), "modified by an inplace operation")


@scenario
def a_second_derivative_is_refused():
    x, w, b = wanted(*norm_inputs())
    for _ in range(3):
        (grad,) = torch.autograd.grad(F.layer_norm(x, w, b).sum(), x, create_graph=True)
        refused(lambda grad=grad: grad.sum().backward(), "can be differentiated once")


@scenario
def hooks_on_saved_tensors_see_the_same_in_every_call():
    x, w, b = wanted(*norm_inputs())
    seen = []
    for _ in range(3):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t.shape) or t, lambda t: t):
            F.layer_norm(x, w, b).sum().backward()
        seen.append(packed)
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) >= 5


@scenario
def checkpoints_recompute_from_recipes():
    x, w, b = wanted(*norm_inputs())
    for _ in range(3):
        out = checkpoint(lambda: F.layer_norm(F.layer_norm(x, w, b), w, b), use_reentrant=False)
        out.sum().backward()
    assert x.grad is not None


@scenario
def nothing_is_filled_with_zeros_for_backward():
    """Statistics and values kept for backward have no gradient; PyTorch would make one of zeros, as large as they are."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    cases = [case for name, case in trained().items() if name != "qk_norm_rope"]  # whose second result is not used there
    for forward, leaves in cases:
        out = forward()
        grad = torch.ones_like(out)
        with Names():
            torch.autograd.grad(out, leaves, grad)
    assert len([name for name in names if name.startswith("fastvit")]) == len(cases)
    assert not [name for name in names if "zeros" in name or "fill" in name], names
