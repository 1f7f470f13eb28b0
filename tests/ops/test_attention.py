import pytest
import torch

from stmae import ops, reference
from tests.support.tolerance import assert_as_good_as, largest

OP, BACKWARD = torch.ops.stmae.attention.default, torch.ops.stmae.attention_backward.default
PACKED, PACKED_BACKWARD = torch.ops.stmae.attention_qkvpacked.default, torch.ops.stmae.attention_qkvpacked_backward.default

HEAD_DIMS = [8, 16, 32, 40, 64, 80, 96, 112, 128]
SIZES = [(1, 1), (1, 7), (2, 1), (7, 2), (63, 64), (65, 63), (64, 158), (158, 158), (13, 513), (513, 200)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(B, N, Nk, H, D, dtype=torch.float32, seed=0, size=1.0):
    """q, k, v and the output's gradient, random in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return tuple((size * torch.randn(B, n, H, D, generator=generator)).to(dtype) for n in (N, Nk, Nk, N))


def results(attend, q, k, v, grad_out, **options):
    """The output and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def plain_results(exact, q, k, v, grad_out, **options):
    """Of plain PyTorch's results in four orders of summation, each the one that errs most. In one order that error is luck,
    half or twice as large in another, and the order is the processor's."""
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        sizes = q.shape[1], k.shape[1], q.shape[3]
        rows, keys, columns = (torch.randperm(n, generator=generator) if seed else torch.arange(n) for n in sizes)
        tensors = [x[:, order][..., columns] for x, order in zip((q, k, v, grad_out), (rows, keys, keys, rows))]
        permuted = results(reference.attention, *tensors, **options)
        orders = (rows, rows, keys, keys)
        found.append([x[:, order.argsort()][..., columns.argsort()] for x, order in zip(permuted, orders)])
    return [max(each, key=lambda x: largest(x.double() - e)) for each, e in zip(zip(*found), exact)]


def assert_right(q, k, v, grad_out, *, factor=3.0, **options):
    """Output and gradients are as good as plain PyTorch's. (Not quite twice its error, because the backward takes the
    weights from the saved log-sum-exp, which is rounded to float32, where autograd has the weights themselves.)"""
    exact = results(reference.attention, *(x.double() for x in (q, k, v, grad_out)), **options)
    plain = plain_results(exact, q, k, v, grad_out, **options)
    ours = results(ops.attention, q, k, v, grad_out, **options)
    # grad_q and grad_k come from a difference, P (grad_out v - delta), which is exactly 0 with one key. What can then be
    # resolved is the rounding of its terms, so their size belongs to what is compared.
    terms = 0.0
    if k.shape[1] <= 2:
        scale = abs(options.get("scale") or q.shape[-1] ** -0.5)
        terms = scale * max(largest(q), largest(k)) * largest(grad_out.norm(dim=-1)) * largest(v.norm(dim=-1))
    for name, p, e, o in zip(("out", "grad_q", "grad_k", "grad_v"), plain, exact, ours):
        assert o.isfinite().all(), name
        unit = terms if name in ("grad_q", "grad_k") else 0.0
        assert o.shape == e.shape and o.is_contiguous()
        with_unit = [torch.cat([x.flatten(), torch.tensor([unit]).to(o.dtype).to(x.dtype)]) for x in (p, e, o)]
        assert_as_good_as(*with_unit, factor=factor, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, dtype, capability, nan_filled):
    assert_right(*inputs(2, 37, 41, 3, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, Nk", SIZES)
def test_sizes(N, Nk, dtype, capability, nan_filled):
    assert_right(*inputs(1, N, Nk, 2, 24, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_heads_than_are_divided_by_keys(dtype, capability):
    assert_right(*inputs(3, 35, 200, 12, 16, dtype))


@pytest.mark.parametrize("D", [32, 64, 80])
def test_float32_is_within_1e_6_of_float64(D, capability):
    q, k, v, grad_out = inputs(1, 200, 700, 2, D)
    exact = results(reference.attention, *(x.double() for x in (q, k, v, grad_out)))
    for name, e, o in zip(("out", "grad_q", "grad_k", "grad_v"), exact, results(ops.attention, q, k, v, grad_out)):
        assert (o.double() - e).norm() < 1e-6 * e.norm(), name
        assert largest(o.double() - e) < 4e-6 * largest(e), name


@pytest.mark.parametrize("D", [32, 64, 80])
def test_bfloat16_is_no_worse_than_scaled_dot_product_attention(D, capability):
    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v, grad_out = inputs(1, 300, 600, 2, D, torch.bfloat16)
    exact = results(reference.attention, *(x.double() for x in (q, k, v, grad_out)))
    theirs = results(sdpa, q, k, v, grad_out)
    ours = results(ops.attention, q, k, v, grad_out)
    for name, e, t, o in zip(("out", "grad_q", "grad_k", "grad_v"), exact, theirs, ours):
        root_mean_square = [(x.double() - e).square().mean().sqrt().item() for x in (t, o)]
        assert root_mean_square[1] <= 1.05 * root_mean_square[0], name


@pytest.mark.parametrize("scale", [0.0, -0.2, 0.5, 1])
def test_scale(scale, capability):
    assert_right(*inputs(1, 20, 30, 2, 16), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype, capability):
    """Scores up to thousands: the softmax picks one key, and no exponential is infinite."""
    q, k, v, grad_out = inputs(1, 50, 450, 2, 32, dtype, size=30.0)
    exact = reference.attention(q.double(), k.double(), v.double())
    out, *grads = results(ops.attention, q, k, v, grad_out)
    rounding = 2 * torch.finfo(dtype).eps * largest(exact)
    # Scores of about 5e3 carry float32 errors of about 5e-4, and so do the weights, relatively.
    assert largest(out.double() - exact) < rounding + 2e-3 * largest(exact)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["far-above", "far-below"])
def test_scores_far_from_zero(sign, capability):
    """Every score is near -1000 (or 1000), where exp(score) itself is 0; the padding of the last vector must not count."""
    q, k, v, grad_out = inputs(1, 5, 21, 1, 8)
    assert_right(q * 0.01 - 10 * sign, k * 0.01 + 12.5, v, grad_out, scale=1.0, factor=8.0)


def test_lse(capability):
    q, k, v, _ = inputs(2, 19, 450, 2, 16)
    _, lse = OP(q, k, v, 0.3)
    expected = (0.3 * q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)).logsumexp(-1)
    assert lse.shape == (2, 2, 19) and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype, capability):
    """Every layout gives the bits of the contiguous one: views of a packed projection, [B, H, N, D] transposed, wide rows,
    batches that share memory, and an expanded gradient."""
    B, N, H, D = 2, 67, 3, 40
    q, k, v, grad_out = inputs(B, N, N, H, D, dtype)
    grad_out = grad_out[:, :1, :1].expand(B, N, H, D)
    expected = results(ops.attention, q, k, v, grad_out.contiguous())

    packed = torch.stack([q, k, v], dim=2).unbind(2)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.nn.functional.pad(x, (5, 6), value=float("nan"))[..., 5:-6] for x in (q, k, v)]
    for layout in (packed, transposed, wide):
        for name, e, o in zip(("out", "grad_q", "grad_k", "grad_v"), expected, results(ops.attention, *layout, grad_out)):
            assert torch.equal(e, o), name

    shared = [x[:1].expand(B, N, H, D) for x in (q, k, v)]
    expected = results(ops.attention, *(x.contiguous() for x in shared), grad_out)
    for e, o in zip(expected, results(ops.attention, *shared, grad_out)):
        assert torch.equal(e, o)


def test_gradient_of_a_sum(capability):
    """Its gradient is one number, expanded: last stride 0."""
    q, k, v, _ = inputs(1, 9, 9, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(ops.attention(*leaves).sum(), leaves)
    expected = torch.autograd.grad(reference.attention(*leaves).sum(), leaves)
    for o, e in zip(ours, expected):
        torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_is_the_same_as_separate(scale, dtype, capability, nan_filled):
    q, k, v, grad_out = inputs(2, 70, 70, 3, 24, dtype)
    qkv = torch.stack([q, k, v], dim=2).requires_grad_()
    out = ops.attention_qkvpacked(qkv, scale=scale)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad_out)
    expected, *grads = results(ops.attention, q, k, v, grad_out, scale=scale)
    assert torch.equal(out, expected)
    assert grad_qkv.is_contiguous() and torch.equal(grad_qkv, torch.stack(grads, dim=2))

    wide = torch.nn.functional.pad(qkv.detach(), (0, 8))[..., :-8].requires_grad_()
    assert torch.equal(ops.attention_qkvpacked(wide, scale=scale), expected)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, reference.attention_qkvpacked(qkv, scale=scale), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("B, H, N", [(1, 1, 700), (1, 3, 400), (2, 20, 60)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(B, H, N, dtype, threads):
    q, k, v, grad_out = inputs(B, N, N, H, 32, dtype)
    threads(1)
    expected = results(ops.attention, q, k, v, grad_out)
    for count in (1, 2, 3, 4):
        threads(count)
        for name, e, o in zip(("out", "grad_q", "grad_k", "grad_v"), expected, results(ops.attention, q, k, v, grad_out)):
            assert torch.equal(e, o), f"{name} with {count} threads"


def test_nan_and_infinity_spread_as_in_the_formula(capability):
    q, k, v, grad_out = inputs(1, 30, 40, 2, 16)
    q[0, 3, 0, 5] = float("nan")  # one query: its output, its gradient, and (a sum over queries) all of that head's keys'
    v[0, 7, 1, 2] = float("inf")  # one value: its column of that head
    out, grad_q, grad_k, grad_v = results(ops.attention, q, k, v, grad_out)
    expected = reference.attention(q, k, v)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out[0, 3, 0].isnan().all() and out[0, :, 1, 2].isinf().all() and out.isfinite().sum() == out.numel() - 16 - 30
    assert grad_q[0, 3, 0].isnan().all() and grad_q[0, :3, 0].isfinite().all() and grad_q[0, 4:, 0].isfinite().all()
    assert grad_k[0, :, 0].isnan().all() and grad_v[0, :, 0].isnan().all()


def test_keys_with_weight_zero(capability):
    """A score of -inf is a weight of 0, also when the first 384 keys have nothing else; with nothing else at all it is 0 / 0."""
    q, k, v, _ = inputs(1, 4, 500, 1, 8)
    q[..., 0], q[0, 3, 0, 0] = 1.0, float("nan")
    k[0, :450, 0, 0] = float("-inf")
    q[0, :3], k[0, :450, 0, 1:] = q[0, :3].abs(), 0.0
    out = ops.attention(q, k, v)
    torch.testing.assert_close(out[:, :3], reference.attention(q[:, :3], k[:, 450:], v[:, 450:]), rtol=1e-5, atol=1e-6)
    assert out[0, 3].isnan().all()
    assert ops.attention(q, k[:, :450], v[:, :450]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    q, k, v, grad_out = inputs(2, 9, 7, 2, 16, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(OP, (q, k, v, 0.25))
    out, lse = (x.detach() for x in OP(q, k, v, 0.25))
    torch.library.opcheck(BACKWARD, (grad_out, q.detach(), k.detach(), v.detach(), out, lse, 0.25))
    qkv = torch.randn(2, 9, 3, 2, 16).to(dtype).requires_grad_()
    torch.library.opcheck(PACKED, (qkv, 0.25))
    out, lse = (x.detach() for x in PACKED(qkv, 0.25))
    torch.library.opcheck(PACKED_BACKWARD, (grad_out, qkv.detach(), out, lse, 0.25))


def test_compile_without_graph_breaks():
    q, k, v, grad_out = inputs(1, 12, 10, 2, 16)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for e, o in zip(results(ops.attention, q, k, v, grad_out), results(compiled, q, k, v, grad_out)):
        assert torch.equal(e, o)
    qkv = torch.randn(1, 12, 3, 2, 16, requires_grad=True)
    compiled = torch.compile(ops.attention_qkvpacked, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(qkv), qkv, grad_out)[0] for f in (ops.attention_qkvpacked, compiled)))


def test_autocast():
    q, k, v, grad_out = inputs(1, 12, 10, 2, 16)
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *grads = results(ops.attention, q, k, v, grad_out.bfloat16())
        packed = ops.attention_qkvpacked(torch.stack([k, k, v], dim=2))
    expected, *expected_grads = results(ops.attention, *low, grad_out.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected) and packed.dtype == torch.bfloat16
    for g, e in zip(grads, expected_grads):
        assert g.dtype == torch.float32 and torch.equal(g, e.float())


@pytest.mark.parametrize("name", ["attention", "attention_qkvpacked"])
def test_double_backward_is_refused(name):
    qkv = torch.randn(1, 5, 3, 2, 8, requires_grad=True)
    out = ops.attention_qkvpacked(qkv) if name == "attention_qkvpacked" else ops.attention(*qkv.unbind(2))
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("B, N, H", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_empty(B, N, H):
    q = torch.randn(B, N, H, 8, requires_grad=True)
    out = ops.attention(q, q, q)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape
    qkv = torch.randn(B, N, 3, H, 8, requires_grad=True)
    ops.attention_qkvpacked(qkv).sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_no_queries():
    k, v = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(2))
    out = ops.attention(torch.randn(2, 0, 3, 8), k, v)
    out.sum().backward()
    assert out.shape == (2, 0, 3, 8) and not k.grad.any() and not v.grad.any()


good = torch.zeros(2, 5, 3, 16)


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        (good[0], good, good, r"expected q \[B, N, H, D\] float32 or bfloat16 .*, got \[5, 3, 16\] float32 on cpu"),
        (good, good[:1], good, r"expected k \[B, Nk, H, D\] float32 \(here \[2, \*, 3, 16\]\), got \[1, 5, 3, 16\] float32"),
        (good, good, good[:, :4], r"expected v .*here \[2, 5, 3, 16\].*, got \[2, 4, 3, 16\]"),
        (good, good[..., :8], good, r"expected k .*got \[2, 5, 3, 8\]"),
        (*[good.double()] * 3, r"expected q .*float32 or bfloat16 .*got \[2, 5, 3, 16\] float64"),
        (good.half(), good.half(), good.half(), "expected q .*got .* float16"),
        (good, good.bfloat16(), good, "expected k .* float32 .*got .* bfloat16"),
        (good, good, good.to("meta"), "expected all tensors on one device, got q on cpu, k on cpu, v on meta"),
        (good, good[:, :0], good[:, :0], r"expected at least one key, got k \[2, 0, 3, 16\]"),
        (*[good[..., :12]] * 3, "expected a head dim D that is a multiple of 8 and at most 128, got 12"),
        (*[torch.zeros(1, 2, 1, 136)] * 3, "expected a head dim D that is a multiple of 8 and at most 128, got 136"),
        (good, good.mT.contiguous().mT, good, "expected k with a contiguous last dimension, got strides"),
        (good, [1.0], good, "expected k"),
    ],
    ids=["3d", "batch", "keys", "head-dim", "float64", "float16", "mixed", "device", "no-keys", "12", "136", "strides", "list"],
)
def test_bad_input(q, k, v, message):
    with pytest.raises(ValueError, match="^attention: " + message):
        ops.attention(q, k, v)


@pytest.mark.parametrize(
    "qkv, message",
    [
        (torch.zeros(2, 5, 2, 3, 16), r"attention_qkvpacked: expected qkv \[B, N, 3, H, D\] .*got \[2, 5, 2, 3, 16\] float32"),
        (torch.zeros(2, 5, 9, 16), r"attention_qkvpacked: expected qkv .*got \[2, 5, 9, 16\]"),
        (torch.zeros(2, 5, 3, 3, 4), "attention_qkvpacked: expected a head dim D .*got 4"),
        (torch.zeros(2, 5, 3, 3, 16).long(), "attention_qkvpacked: expected qkv .*got .* int64"),
        (torch.zeros(2, 5, 3, 16, 8).transpose(3, 4), "attention_qkvpacked: expected qkv with a contiguous last dimension"),
    ],
)
def test_bad_packed_input(qkv, message):
    with pytest.raises(ValueError, match=message):
        ops.attention_qkvpacked(qkv)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", torch.tensor(1.0)])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="attention: expected scale a finite number or None, got"):
        ops.attention(good, good, good, scale=scale)


def test_the_kernels_check_what_reaches_them_unchecked():
    """torch.ops.stmae.* can be called directly; sizes that do not fit must not read out of bounds."""
    out, lse = OP(good, good, good, 1.0)
    for arguments, message in [
        ((good, good[:, :4], good), r"attention: expected v \[2, 4, 3, 16\] float32, got \[2, 5, 3, 16\]"),
        ((good, good, good.bfloat16()), r"attention: expected v \[2, 5, 3, 16\] float32, got \[2, 5, 3, 16\] bfloat16"),
        ((good, good, good[0]), r"attention: expected v \[2, 5, 3, 16\] float32, got \[5, 3, 16\]"),
        ((good[..., ::2], good[..., :8], good[..., :8]), "attention: expected q with a contiguous last dimension"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            OP(*arguments, 1.0)
    with pytest.raises(RuntimeError, match=r"attention_backward: expected grad_out \[2, 5, 3, 16\] float32, got \[2, 4, 3, 16\]"):
        BACKWARD(good[:, :4], good, good, good, out, lse, 1.0)
    with pytest.raises(RuntimeError, match=r"attention_backward: expected lse \[2, 3, 5\] float32, got \[2, 3, 4\]"):
        BACKWARD(good, good, good, good, out, lse[..., :4].contiguous(), 1.0)
    with pytest.raises(RuntimeError, match="attention_backward: expected lse contiguous"):
        BACKWARD(good, good, good, good, out, lse.transpose(1, 2).contiguous().transpose(1, 2), 1.0)
