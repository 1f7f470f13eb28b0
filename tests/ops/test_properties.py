"""Every public op against its reference over drawn shapes, dtypes, memory layouts, ids and extents.

Forward and backward, on every instruction set. Operands touch pages that cannot be read, so that a read beyond one ends the
test run.

The draws are the same in every run (`derandomize`); STMAE_EXAMPLES multiplies their number.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stmae import ops, reference
from tests.support import exact, layouts
from tests.support.tolerance import assert_as_good_as

BF16 = torch.bfloat16
MULTIPLE = int(os.environ.get("STMAE_EXAMPLES", "1"))
FLOATS = st.sampled_from([torch.float32, BF16])


def drawn(strategy, examples=12):
    """Run the test for `examples` draws of `strategy`."""

    def decorate(test):
        bounded = settings(
            max_examples=examples * MULTIPLE,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return bounded(given(case=strategy)(test))

    return decorate


@st.composite
def layout(draw, dense_rows=False):
    """How an operand lies in memory: a function of a tensor."""
    kind = draw(st.sampled_from(["contiguous", "stepped", "permuted", "padded rows", "expanded"]))
    at_end = draw(st.booleans())
    axis = draw(st.integers(0, 4))

    def place(x):
        dims = x.dim()
        if kind == "expanded" and dims > (1 if dense_rows else 0):
            d = axis % (dims - 1 if dense_rows else dims)
            once = x.narrow(d, 0, min(1, x.shape[d]))
            x = once.expand(x.shape)
            strides = list(once.contiguous().stride())
            strides[d] = 0
        elif kind == "permuted" and dims > 1:
            order = list(range(dims - 1 if dense_rows else dims))
            order = order[axis % len(order) :] + order[: axis % len(order)] + ([dims - 1] if dense_rows else [])
            strides = [0] * dims
            step = 1
            for d in reversed(order):
                strides[d] = step
                step *= max(1, x.shape[d])
        elif kind == "padded rows" and dims > 1:
            strides, step = [1] * dims, x.shape[-1] + 3
            for d in reversed(range(dims - 1)):
                strides[d] = step
                step *= max(1, x.shape[d])
        elif kind == "stepped" and not dense_rows:
            strides = [3 * stride for stride in x.contiguous().stride()]
        else:
            strides = x.contiguous().stride()
        return layouts.strided(x, strides, at_end=at_end)

    return place


def normal(seed, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def distinct_ids(seed, batch, count, tokens):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)]).view(batch, count)


def compare(call, tensors, grads=(), factor=2.0, exact_module=reference):
    """call(module, **tensors) for the ops, for the reference in the same dtypes and in float64: results and gradients."""

    def run(module, convert):
        leaves = {name: convert(x) for name, x in tensors.items()}
        for name in grads:
            leaves[name] = leaves[name].detach().requires_grad_()
        results = call(module, **leaves)
        results = results if isinstance(results, tuple) else (results,)
        floating = [x for x in results if x.is_floating_point() and x.requires_grad]
        if floating:
            # An upstream gradient that is expanded: its last stride is 0.
            weights = [torch.ones((), dtype=x.dtype).expand(x.shape) for x in floating]
            torch.autograd.backward(floating, weights)
        return [*results, *(leaves[name].grad for name in grads)]

    truth = run(exact_module, lambda x: x.double() if x.is_floating_point() else x)
    plain = run(reference, lambda x: x)
    ours = run(ops, lambda x: x)
    for index, (a, b, c) in enumerate(zip(plain, truth, ours, strict=True)):
        if c.is_floating_point():
            assert_as_good_as(a, b, c, factor=factor, name=f"result {index}")
        else:
            assert torch.equal(b, c)


@st.composite
def linear_cases(draw):
    M, K, N = draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(0, 20))
    dtype, seed = draw(FLOATS), draw(st.integers(0, 99))
    shape = (M, K) if draw(st.booleans()) else (2, M, K)
    tensors = {
        "x": draw(layout())(normal(seed, *shape, dtype=dtype)),
        "weight": draw(layout())(normal(seed + 1, N, K, dtype=dtype)),
    }
    if draw(st.booleans()):
        tensors["bias"] = draw(layout())(normal(seed + 2, N, dtype=dtype))
    return tensors


@drawn(linear_cases(), 60)
def test_linear(case):
    compare(lambda module, **tensors: module.linear(**tensors), case, list(case), factor=4)


@pytest.mark.parametrize("backend", ["stmae", "onednn", "torch"])
@drawn(linear_cases(), 15)
def test_linear_backends(backend, case):
    ops.set_linear_backend(backend)
    try:
        compare(lambda module, **tensors: module.linear(**tensors), case, list(case), factor=4)
    finally:
        ops.set_linear_backend(os.environ.get("STMAE_LINEAR", "auto"))


@st.composite
def mlp_cases(draw):
    M, D, F, E = draw(st.integers(1, 30)), draw(st.integers(1, 20)), draw(st.integers(1, 30)), draw(st.integers(1, 20))
    dtype, seed = draw(FLOATS), draw(st.integers(0, 99))
    shapes = {"x": (M, D), "fc1_weight": (F, D), "fc1_bias": (F,), "fc2_weight": (E, F), "fc2_bias": (E,)}
    return {name: draw(layout())(normal(seed + i, *shape, dtype=dtype)) for i, (name, shape) in enumerate(shapes.items())}


@drawn(mlp_cases(), 25)
def test_mlp(case):
    compare(lambda module, **tensors: module.mlp(**tensors), case, list(case), factor=4)


@st.composite
def layer_norm_cases(draw):
    shape = (*draw(st.lists(st.integers(0, 5), max_size=3)), draw(st.integers(1, 70)))
    dtype, branch_dtype, seed = draw(FLOATS), draw(FLOATS), draw(st.integers(0, 99))
    return {
        "x": draw(layout())(normal(seed, *shape, dtype=dtype)),
        "branch": draw(layout())(normal(seed + 1, *shape, dtype=branch_dtype)),
        "weight": draw(layout())(normal(seed + 2, shape[-1])),
        "bias": draw(layout())(normal(seed + 3, shape[-1])),
    }


@drawn(layer_norm_cases(), 25)
def test_add_layer_norm(capability, case):
    compare(lambda module, **tensors: module.add_layer_norm(**tensors), case, list(case), factor=4)


@st.composite
def attention_cases(draw):
    B, N, Nk, H = draw(st.integers(0, 3)), draw(st.integers(0, 30)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    D, dtype, seed = 8 * draw(st.integers(1, 16)), draw(FLOATS), draw(st.integers(0, 99))
    scale = draw(st.sampled_from([None, 0.0, -0.3, 0.5]))
    place = [draw(layout(dense_rows=True)) for _ in range(3)]
    shapes = [(B, N, H, D), (B, Nk, H, D), (B, Nk, H, D)]
    return scale, {
        name: where(normal(seed + i, *shape, dtype=dtype)) for i, (name, where, shape) in enumerate(zip("qkv", place, shapes))
    }


@drawn(attention_cases(), 20)
def test_attention(capability, case):
    scale, tensors = case
    compare(lambda module, q, k, v: module.attention(q, k, v, scale=scale), tensors, "qkv", factor=4)


@st.composite
def packed_cases(draw):
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 40)), 3, draw(st.integers(1, 3)), 8 * draw(st.integers(1, 16)))
    return {"qkv": draw(layout(dense_rows=True))(normal(draw(st.integers(0, 99)), *shape, dtype=draw(FLOATS)))}


@drawn(packed_cases(), 12)
def test_attention_qkvpacked(capability, case):
    compare(lambda module, qkv: module.attention_qkvpacked(qkv), case, ["qkv"], factor=4)


@st.composite
def token_cases(draw):
    B, N, D = draw(st.integers(0, 3)), draw(st.integers(1, 60)), draw(st.integers(0, 70))
    K = draw(st.integers(0, N))
    seed = draw(st.integers(0, 99))
    ids = draw(layout())(distinct_ids(seed, B, K, N)) if B else torch.zeros(0, K, dtype=torch.int64)
    if not all(row.unique().numel() == K for row in ids):  # an expanded row of ids repeats one
        ids = distinct_ids(seed, B, K, N)
    return B, N, K, D, seed, ids, draw(layout(dense_rows=True)), draw(layout()), draw(layout()), draw(FLOATS), draw(FLOATS)


@drawn(token_cases(), 25)
def test_gather_tokens(capability, case):
    B, N, _, D, seed, ids, place, _, _, dtype, _ = case
    x = place(normal(seed, B, N, D, dtype=dtype))
    compare(lambda module, x, ids: module.gather_tokens(x, ids), {"x": x, "ids": ids}, ["x"])


@drawn(token_cases(), 25)
def test_restore_tokens(capability, case):
    B, N, K, D, seed, keep, place, place_mask, place_position, dtype, other = case
    tensors = {
        "tokens": place(normal(seed, B, K, D, dtype=dtype)),
        "keep": keep,
        "mask_token": place_mask(normal(seed + 1, D, dtype=other)),
        "position": place_position(normal(seed + 2, N, D, dtype=other)),
    }
    compare(lambda module, **tensors: module.restore_tokens(**tensors), tensors, ["tokens", "mask_token", "position"], factor=4)


@st.composite
def video_cases(draw):
    B, C = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    u, p, q = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 20))
    t, h, w = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype, seed = draw(st.sampled_from([torch.uint8, torch.float32, BF16])), draw(st.integers(0, 99))
    shape = (B, C, t * u, h * p, w * q)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    video = draw(layout())((pixels / 255).to(dtype) if dtype.is_floating_point else pixels.to(dtype))
    N = t * h * w
    return (
        video,
        (u, p, q),
        N,
        distinct_ids(seed, B, draw(st.integers(0, N)), N),
        seed,
        draw(layout()),
        draw(layout(dense_rows=True)),
    )


@drawn(video_cases(), 20)
def test_masked_patchify(capability, case):
    video, patch, N, keep, seed, place, _ = case
    D, weight_dtype = 1 + seed % 40, BF16 if seed % 3 == 0 else torch.float32
    tensors = {
        "video": video,
        "keep": keep,
        "weight": place(normal(seed, D, video.shape[1], *patch, dtype=weight_dtype)),
        "bias": place(normal(seed + 1, D, dtype=weight_dtype)),
        "position": place(normal(seed + 2, N, D, dtype=weight_dtype)),
    }
    compare(lambda module, **tensors: module.masked_patchify(**tensors), tensors, ["weight", "bias", "position"], 4, exact)


@pytest.mark.filterwarnings("ignore:var.. degrees of freedom")  # of no patches
@drawn(video_cases(), 20)
def test_patch_loss(capability, case):
    video, patch, _, masked, seed, _, place = case
    P = patch[0] * patch[1] * patch[2] * video.shape[1]
    pred = place(normal(seed, video.shape[0], masked.shape[1], P, dtype=BF16 if seed % 2 else torch.float32))

    def call(module, pred, video, masked):
        return module.patch_loss(pred, video, masked, patch_size=patch, normalize=P > 1 and seed % 5 > 0, reduction="none")

    compare(call, {"pred": pred, "video": video, "masked": masked}, ["pred"], 4, exact)


@drawn(st.tuples(st.integers(0, 4), st.integers(2, 300), st.integers(1, 299), st.integers(0, 9), layout()), 25)
def test_random_masking(capability, case):
    B, N, K, levels, place = case
    K = min(K, N - 1)
    noise = torch.rand(B, N, generator=torch.Generator().manual_seed(N))
    noise = place((noise * levels).floor() if levels else noise)  # few levels: many ties
    for ours, theirs in zip(ops.random_masking(noise, K), reference.random_masking(noise, K)):
        assert torch.equal(ours, theirs)


def test_a_bias_of_any_stride_beside_an_unreadable_page():
    bias = torch.tensor([7.0, 111, 222, 333, 444, 555, 666])
    assert ops.linear(torch.zeros(1, 8), torch.zeros(4, 8), bias[::2]).tolist() == [[7, 222, 444, 666]]
    expanded = layouts.strided(torch.full((4096,), 3.0), [0])
    assert ops.linear(torch.zeros(600, 8), torch.zeros(4096, 8), expanded).eq(3).all()
    mlp = ops.mlp(torch.zeros(3, 8), torch.zeros(4096, 8), expanded, torch.zeros(8, 4096), bias[:1].expand(8))
    assert mlp.eq(7).all()


@pytest.mark.parametrize("op", ["linear", "gather_tokens", "attention", "masked_patchify", "random_masking"])
def test_misaligned_operands_are_refused_by_name(op):
    rows = layouts.misaligned(torch.rand(1, 4, 2, 8))
    calls = {
        "linear": lambda: ops.linear(rows, torch.rand(3, 8)),
        "gather_tokens": lambda: ops.gather_tokens(rows[:, :, 0], torch.tensor([[1]])),
        "attention": lambda: ops.attention(rows, rows.clone(), rows.clone()),
        "masked_patchify": lambda: ops.masked_patchify(
            rows.view(1, 1, 4, 2, 8), torch.tensor([[1]]), torch.rand(3, 1, 2, 2, 2), None, None
        ),
        "random_masking": lambda: ops.random_masking(rows.view(8, 8), 3),
    }
    with pytest.raises(RuntimeError, match=f"{op}: expected .* aligned to its 4-byte elements"):
        calls[op]()
