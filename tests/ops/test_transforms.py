"""The ops under torch.func, forward mode and the FLOP counter."""

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from stmae import ops, reference
from tests.support.small_models import error

B, N, D, F = 2, 6, 16, 24
PATCH = (2, 2, 4)
VIDEO = (3, 4, 4, 8)  # C, T, H, W: a grid of 2 x 2 x 2
P = math.prod(PATCH) * VIDEO[0]


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


KEEP = torch.tensor([[0, 3, 5], [1, 2, 6]])
PIXELS = (rand(B, *VIDEO) * 40 + 128).clamp(0, 255).to(torch.uint8)

# name -> (the op as a function of stmae.ops or stmae.reference and of the inputs that have a gradient, these inputs).
OPS = {
    "add_layer_norm": (
        lambda m, x, b, w, c: torch.cat(m.add_layer_norm(x, b, w, c)),
        (rand(B, N, D), rand(B, N, D), rand(D), rand(D)),
    ),
    "attention": (lambda m, q, k, v: m.attention(q, k, v), tuple(rand(B, n, 2, 8) for n in (5, 6, 6))),
    "attention_qkvpacked": (lambda m, qkv: m.attention_qkvpacked(qkv), (rand(B, N, 3, 2, 8),)),
    "gather_tokens": (lambda m, x: m.gather_tokens(x, KEEP[: len(x)] % N), (rand(B, N, D),)),
    "linear": (lambda m, x, w, b: m.linear(x, w, b), (rand(B, N, D), rand(F, D), rand(F))),
    "mlp": (
        lambda m, x, w, b, v, c: m.mlp(x, w, b, v, c),
        (rand(B, N, D), rand(F, D), rand(F), rand(D, F), rand(D)),
    ),
    "masked_patchify": (
        lambda m, w, b, p: m.masked_patchify(PIXELS, KEEP, w, b, p),
        (rand(D, VIDEO[0], *PATCH), rand(D), rand(8, D)),
    ),
    "patch_loss": (
        lambda m, pred: m.patch_loss(pred, PIXELS[: len(pred)], KEEP[: len(pred)], patch_size=PATCH),
        (rand(B, 3, P),),
    ),
    "restore_tokens": (
        lambda m, x, token, position: m.restore_tokens(x, KEEP[: len(x)], token, position),
        (rand(B, 3, D), rand(D), rand(8, D)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused_by_name(name):
    call, inputs = OPS[name]
    for index in range(len(inputs)):
        tangents = [torch.zeros_like(x) for x in inputs]
        tangents[index] = torch.ones_like(inputs[index])

        def one(x, index=index):
            return call(ops, *inputs[:index], x, *inputs[index + 1 :])

        with pytest.raises(RuntimeError, match=rf"^{name}: forward mode .* not supported; use stmae.reference.{name}"):
            jvp(one, (inputs[index],), (tangents[index],))
        for differentiable in (False, True):
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{name}: forward mode"):
                one(forward_ad.make_dual(inputs[index].clone().requires_grad_(differentiable), tangents[index]))

        def other(x, index=index):
            return call(reference, *inputs[:index], x, *inputs[index + 1 :])

        assert jvp(other, (inputs[index],), (tangents[index],))[1].isfinite().all()  # what the message names works


def test_a_layer_norm_without_a_branch_has_forward_mode():
    x, weight, bias = rand(B, N, D), rand(D), rand(D)
    ours, expected = (jvp(lambda x, m=m: m.add_layer_norm(x, None, weight, bias)[1], (x,), (x,))[1] for m in (ops, reference))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", OPS)
def test_functional_gradients_are_those_of_the_reference(name):
    call, inputs = OPS[name]
    every = tuple(range(len(inputs)))

    def total(module):
        def f(*inputs):
            out = call(module, *inputs)
            return (out * torch.arange(1, 1 + out.numel()).view(out.shape).sin()).sum()

        return f

    ours, expected = grad(total(ops), every)(*inputs), grad(total(reference), every)(*inputs)
    for got, want in zip(ours, expected):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("name", OPS)
def test_gradients_of_each_sample(name):
    """vmap(grad) over all inputs, stacked from three variants of each."""
    call, inputs = OPS[name]
    every = tuple(range(len(inputs)))
    batches = tuple(torch.stack([x, 0.5 * x, x.flip(0)]) for x in inputs)

    def total(module):
        def f(*inputs):
            out = call(module, *inputs)
            return (out * torch.arange(1, 1 + out.numel()).view(out.shape).sin()).sum()

        return f

    got = vmap(grad(total(ops), every))(*batches)
    for index in range(3):
        expected = grad(total(reference), every)(*(x[index] for x in batches))
        for a, b in zip(got, expected):
            assert error(a[index], b) < 1e-5
    one, rest = batches[0], inputs[1:]  # batched in one argument only, along its last dimension
    got = vmap(grad(total(ops)), in_dims=(-1, *(None,) * len(rest)))(one.movedim(0, -1), *rest)
    expected = torch.stack([grad(total(reference))(x, *rest) for x in one])
    assert error(got, expected) < 1e-5


def test_second_derivatives_are_refused_by_name():
    call, inputs = OPS["linear"]
    with pytest.raises(RuntimeError, match=r"^linear: double backward is not supported; use stmae.reference.linear"):
        grad(lambda x: grad(lambda x: call(ops, x, *inputs[1:]).square().sum())(x).square().sum())(inputs[0])


def test_an_op_of_the_dispatcher_names_what_to_call_instead():
    with pytest.raises(RuntimeError, match=r"torch.ops.stmae.gather_tokens: .* call stmae.ops.gather_tokens or stmae.reference"):
        grad(lambda x: torch.ops.stmae.gather_tokens(x, KEEP).sum())(rand(B, 8, D))


# --- the FLOP counter ---


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("frozen", ["none", "first", "all but the first"])
def test_flops_are_those_of_the_reference(name, frozen):
    call, inputs = OPS[name]
    if frozen != "none" and name in ("attention", "masked_patchify"):
        pytest.skip("its backward computes all products, whatever is frozen")
    counts = {}
    for module in (ops, reference):
        leaves = [x.clone() for x in inputs]
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(frozen == "none" or (index == 0) == (frozen == "all but the first"))
        with FlopCounterMode(display=False) as counter:
            out = call(module, *leaves).sum()
            forward = counter.get_total_flops()
            if out.requires_grad:
                out.backward()
        counts[module] = forward, counter.get_total_flops() - forward
    if name == "masked_patchify":  # the reference projects all 8 patches of each clip, of which 3 are kept
        counts[reference] = tuple(count * 3 / 8 for count in counts[reference])
    assert counts[ops] == counts[reference]
    assert (counts[ops][0] > 0) == (name in ("attention", "attention_qkvpacked", "linear", "mlp", "masked_patchify"))


@pytest.mark.parametrize("first", ["stmae", "torch.utils.flop_counter"])
def test_formulas_are_registered_whatever_is_imported_first(first):
    program = f"""
import sys, {first}
import stmae
assert {first == "stmae"} == ("torch.utils.flop_counter" not in sys.modules)
finders = len(sys.meta_path)
from torch.utils.flop_counter import FlopCounterMode
assert len(sys.meta_path) == finders - {first == "stmae"}
import torch
with FlopCounterMode(display=False) as counter:
    stmae.ops.linear(torch.ones(2, 3), torch.ones(5, 3))
assert counter.get_total_flops() == 60, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
