"""attention_varlen: each sequence as by itself, whatever lies beside it."""

import functools

import pytest
import torch

from stmae import ops, reference
from tests.ops.test_attention import DTYPES
from tests.support.tolerance import assert_as_good_as

S = torch.ops.stmae
MIXED = [64, 1, 0, 158, 300, 12, 0]


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(attend, leaves, grad_out):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [None, [70, 3, 9, 40, 300, 200, 0]], ids=["own", "other"])
def test_as_good_as_the_reference(keys, dtype, capability, nan_filled):
    cu_q, cu_k = offsets(MIXED), None if keys is None else offsets(keys, torch.int64)
    total_k = sum(keys or MIXED)
    q, k, v, grad = tensors((sum(MIXED), 3, 24), (total_k, 3, 24), (total_k, 3, 24), (sum(MIXED), 3, 24), dtype=dtype)
    results = []
    for module, to in ((reference, dtype), (reference, torch.float64), (ops, dtype)):
        attend = functools.partial(module.attention_varlen, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=0.3)
        results.append(with_gradients(attend, [x.to(to) for x in (q, k, v)], grad))
    for name, plain, exact, ours in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        assert ours.isfinite().all() and ours.is_contiguous()
        assert_as_good_as(plain, exact, ours, factor=3.0, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [MIXED, [700, 1], [1] * 40, [160] * 4], ids=["mixed", "long and one", "ones", "equal"])
@pytest.mark.parametrize("H", [1, 4])
def test_the_bits_of_each_sequence_by_itself(lengths, H, dtype, threads, capability):
    qkv, grad = tensors((sum(lengths), 3, H, 16), (sum(lengths), H, 16), dtype=dtype)
    for count in (1, 2, 3):
        threads(count)
        out, grad_qkv = with_gradients(lambda x: ops.attention_varlen_qkvpacked(x, offsets(lengths)), [qkv], grad)
        start = 0
        for length in lengths:
            if length == 0:
                continue
            own = slice(start, start + length)
            alone = with_gradients(ops.attention_qkvpacked, [qkv[None, own]], grad[None, own])
            assert torch.equal(out[own], alone[0][0])
            # grad_k and grad_v, too, are sums in one order; grad_q is a sum over parts of the keys, of which a sequence by itself
            # may have more.
            assert torch.equal(grad_qkv[own, 1:], alone[1][0, :, 1:])
            assert length > 192 or torch.equal(grad_qkv[own, 0], alone[1][0, :, 0])
            start += length


def test_equal_lengths_are_a_batch(capability):
    q, k, v, grad = tensors(*[(5, 250, 2, 32)] * 4)
    batch = with_gradients(ops.attention, (q, k, v), grad)
    packed = with_gradients(
        lambda *x: ops.attention_varlen(*x, offsets([250] * 5)), [x.flatten(0, 1) for x in (q, k, v)], grad.flatten(0, 1)
    )
    for one, other in zip(batch, packed, strict=True):
        assert torch.equal(one.flatten(0, 1), other)


def test_very_many_and_very_unequal_sequences():
    """100,000 sequences of up to 3 tokens; one of 12,544 beside one of 1."""
    lengths = torch.randint(0, 4, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    cu_seqlens = offsets(lengths)
    (qkv,) = tensors((sum(lengths), 3, 1, 8))
    out, grad = with_gradients(lambda x: ops.attention_varlen_qkvpacked(x, cu_seqlens), [qkv], torch.ones(sum(lengths), 1, 8))
    some = [0, 1, 2, 50_000, 99_999]
    for s in some:
        own = slice(*cu_seqlens[s : s + 2].tolist())
        assert torch.equal(out[own], ops.attention_qkvpacked(qkv[None, own])[0]) and grad[own].isfinite().all()

    (qkv,) = tensors((12_545, 3, 1, 8))
    out = ops.attention_varlen_qkvpacked(qkv, offsets([12_544, 1]))
    assert torch.equal(out[-1:], qkv[-1:, 2])
    rows = torch.tensor([0, 5000, 12_543])
    expected = reference.attention(qkv[None, rows, 0], qkv[None, :-1, 1], qkv[None, :-1, 2])[0]
    torch.testing.assert_close(out[rows], expected, rtol=1e-4, atol=1e-5)


def test_nothing_at_all():
    for lengths in ([], [0], [0, 0, 0]):
        qkv = torch.zeros(0, 3, 2, 8, requires_grad=True)
        out = ops.attention_varlen_qkvpacked(qkv, offsets(lengths))
        out.sum().backward()
        assert out.shape == (0, 2, 8) and qkv.grad.shape == qkv.shape
        assert reference.attention_varlen_qkvpacked(qkv, offsets(lengths)).shape == out.shape
    k, v = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(2))  # keys that nobody asks for
    ops.attention_varlen(torch.zeros(0, 2, 8), k, v, offsets([0, 0]), offsets([2, 3])).sum().backward()
    assert not k.grad.any() and not v.grad.any()


BAD = [
    ([0, 4, 3, 9], "expected cu_seqlens ascending, got 3 after 4 at \\[2\\]"),
    ([0, 4, 8], "expected cu_seqlens to end at the 9 rows of qkv, got 8"),
    ([0, 4, 10], "expected cu_seqlens to end at the 9 rows of qkv, got 10"),
    ([1, 4, 9], "expected cu_seqlens to start at 0, got 1"),
    ([-1, 9], "expected cu_seqlens to start at 0, got -1"),
    ([0, 2**62, 9], "expected cu_seqlens ascending, got 9 after 4611686018427387904"),
    ([0], "expected cu_seqlens to end at the 9 rows of qkv, got 0"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_offsets_are_refused_by_name(values, message):
    with pytest.raises(RuntimeError, match=f"attention_varlen_qkvpacked: {message}"):
        ops.attention_varlen_qkvpacked(torch.zeros(9, 3, 2, 8), torch.tensor(values))


x = torch.zeros(9, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((x, x, x, torch.zeros(0, dtype=torch.int32)), r"expected cu_seqlens_q \[S \+ 1\], got \[0\] int32"),
        ((x, x, x, torch.tensor([0.0, 9.0])), r"expected cu_seqlens_q \[S \+ 1\] int32 or int64 .*got \[2\] float32"),
        ((x, x, x, [0, 9]), r"expected cu_seqlens_q .*got list"),
        ((x, x, x, torch.tensor([[0, 9]])), r"expected cu_seqlens_q .*got \[1, 2\] int64"),
        ((x, x, x, torch.tensor([0, 9], device="meta")), "expected all tensors on one device"),
        ((x, x[:7], x[:7], torch.tensor([0, 9])), "expected cu_seqlens_k for k of other lengths than q, got None for 7 keys"),
        ((x, x, x, torch.tensor([0, 9]), torch.tensor([0, 3, 9])), r"expected cu_seqlens_k .*here \[2\].*got \[3\]"),
        ((x, x, x[:, :1], torch.tensor([0, 9])), r"expected v \[total_k, H, D\]"),
        ((x[0], x, x, torch.tensor([0, 9])), r"expected q \[total_q, H, D\]"),
        ((x[..., :12], x[..., :12], x[..., :12], torch.tensor([0, 9])), "expected a head dim D that is a multiple of 8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"attention_varlen: {message}"):
        ops.attention_varlen(*arguments)


def test_queries_without_keys_are_refused():
    with pytest.raises(
        RuntimeError, match="attention_varlen: expected at least one key in each sequence with queries, got none in .* 1"
    ):
        ops.attention_varlen(x, x, x, torch.tensor([0, 4, 9]), torch.tensor([0, 9, 9]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    cu_q, cu_k = offsets([3, 0, 5]), offsets([4, 1, 2], torch.int64)
    q, k, v, grad = tensors((8, 2, 16), (7, 2, 16), (7, 2, 16), (8, 2, 16), dtype=dtype)
    arguments = (*(x.requires_grad_() for x in (q, k, v)), cu_q, cu_k, 0.25)
    torch.library.opcheck(S.attention_varlen.default, arguments)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, *S.attention_varlen(*arguments)))
    torch.library.opcheck(S.attention_varlen_backward.default, (grad, q, k, v, out, lse, cu_q, cu_k, 0.25))
    (qkv,) = tensors((8, 3, 2, 16), dtype=dtype)
    torch.library.opcheck(S.attention_varlen_qkvpacked.default, (qkv.requires_grad_(), cu_q, 0.25))
    out, lse = (x.detach() for x in S.attention_varlen_qkvpacked(qkv, cu_q, 0.25))
    torch.library.opcheck(S.attention_varlen_qkvpacked_backward.default, (grad, qkv.detach(), out, lse, cu_q, 0.25))


def test_compile_of_any_lengths_in_one_graph():
    compiled = torch.compile(ops.attention_varlen_qkvpacked, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 4, 2], [9, 0, 30, 7], [3, 3]):
            qkv, grad = tensors((sum(lengths), 3, 2, 16), (sum(lengths), 2, 16))
            attends = (functools.partial(f, cu_seqlens=offsets(lengths)) for f in (ops.attention_varlen_qkvpacked, compiled))
            ours, theirs = (with_gradients(attend, [qkv], grad) for attend in attends)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_autocast():
    qkv, cu_seqlens = torch.randn(9, 3, 2, 16), offsets([4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.attention_varlen_qkvpacked(qkv, cu_seqlens)
    assert torch.equal(out, ops.attention_varlen_qkvpacked(qkv.bfloat16(), cu_seqlens))


def test_operations_are_those_of_each_sequence():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for module in (ops, reference):
        qkv = torch.randn(20, 3, 2, 16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module.attention_varlen_qkvpacked(qkv, offsets([12, 0, 8])).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 4 * (12**2 + 8**2) * 2 * 16] * 2


@pytest.mark.parametrize("module", [ops, reference])
def test_the_old_name_of_attention_qkvpacked(module):
    qkv = torch.randn(1, 4, 3, 2, 8)
    with pytest.warns(DeprecationWarning, match=r"packed_attention is now attention_qkvpacked"):
        out = module.packed_attention(qkv, scale=0.2)
    assert torch.equal(out, module.attention_qkvpacked(qkv, scale=0.2))
