"""gather_tokens: rows are copied, so everything is exact."""

import pytest
import torch

from stmae import ops, reference

DTYPES = [torch.float32, torch.bfloat16]


def tensors(B, N, M, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N * 100 + D)
    return torch.randn(B, N, D, generator=generator).to(dtype), torch.rand(B, N, generator=generator).argsort(1)[:, :M]


def run(function, x, ids):
    x = x.detach().requires_grad_()
    out = function(x, ids)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, x, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,N,M,D", [(1, 1, 1, 1), (3, 21, 5, 40), (2, 70, 63, 129), (2, 9, 9, 16), (0, 9, 4, 8), (2, 9, 0, 8)])
def test_forward_and_gradient(B, N, M, D, dtype, nan_filled):
    arguments = tensors(B, N, M, D, dtype)
    for kernel, plain in zip(run(ops.gather_tokens, *arguments), run(reference.gather_tokens, *arguments)):
        assert kernel.dtype == plain.dtype and torch.equal(kernel, plain)


def test_it_undoes_restore_tokens():
    x, keep = tensors(3, 20, 6, 24)
    tokens = ops.gather_tokens(x, keep)
    restored = ops.restore_tokens(tokens, keep, torch.zeros(24), torch.zeros(20, 24))
    assert torch.equal(ops.gather_tokens(restored, keep), tokens)


def test_strides():
    x, ids = tensors(3, 20, 6, 24)
    wide = torch.randn(20, 3, 50)
    wide[:, :, 5:29] = x.transpose(0, 1)
    view = wide[:, :, 5:29].transpose(0, 1).detach().requires_grad_()
    every_other = torch.stack([ids, ids], 2)[:, :, 0]
    out = ops.gather_tokens(view, every_other)
    assert torch.equal(out, reference.gather_tokens(x, ids))
    upstream = torch.randn(6, 3, 24).transpose(0, 1)
    expected = torch.zeros_like(x).scatter(1, ids.unsqueeze(-1).expand(-1, -1, 24), upstream)
    assert torch.equal(torch.autograd.grad(out, view, upstream, retain_graph=True)[0], expected)
    assert torch.autograd.grad(out.sum(), view)[0].sum() == out.numel()  # an expanded gradient


def test_same_at_any_number_of_threads(threads):
    arguments = tensors(4, 400, 300, 96)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(ops.gather_tokens, *arguments))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatcher_contract(dtype):
    x, ids = tensors(2, 7, 3, 8, dtype)
    torch.library.opcheck(torch.ops.stmae.gather_tokens.default, (x.requires_grad_(), ids))
    torch.library.opcheck(torch.ops.stmae.gather_tokens_backward.default, (torch.randn(2, 3, 8).to(dtype), ids, 7))


def test_compiles_without_graph_breaks():
    arguments = tensors(2, 7, 3, 8)
    compiled = torch.compile(ops.gather_tokens, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(run(compiled, *arguments), run(ops.gather_tokens, *arguments)))


def test_double_backward_is_refused():
    x, ids = tensors(2, 7, 3, 8)
    upstream = torch.randn(2, 3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gather_tokens(x.requires_grad_(), ids), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="gather_tokens: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.randn(7, 8)), r"gather_tokens: expected x \[B, N, D\] .*got \[7, 8\] float32"),
        (dict(x=torch.randn(2, 7, 8).long()), r"gather_tokens: expected x .*got \[2, 7, 8\] int64"),
        (dict(x=torch.randn(2, 8, 7).transpose(1, 2)), r"gather_tokens: expected x with a contiguous last dimension"),
        (dict(ids=torch.zeros(3, 2, dtype=torch.int64)), r"gather_tokens: expected ids \[B, K\] int64 .*got \[3, 2\]"),
        (dict(ids=torch.zeros(2, 2)), r"gather_tokens: expected ids \[B, K\] int64 .*got \[2, 2\] float32"),
        (dict(ids=torch.zeros(2, 8, dtype=torch.int64)), r"gather_tokens: expected ids with at most 7 tokens, got \[2, 8\]"),
        (dict(ids=torch.zeros(2, 2, dtype=torch.int64, device="meta")), r"gather_tokens: expected all tensors on one device"),
    ],
)
def test_bad_input(change, message):
    x, ids = tensors(2, 7, 3, 8)
    with pytest.raises(ValueError, match=message):
        ops.gather_tokens(**{**dict(x=x, ids=ids), **change})


@pytest.mark.parametrize(
    "ids,message",
    [
        ([[0, 1], [3, 7]], r"gather_tokens: expected ids in \[0, 7\), got 7 at \[1, 1\]"),
        ([[-1, 1], [3, 7]], r"gather_tokens: expected ids in \[0, 7\), got -1 at \[0, 0\]"),
        ([[0, 1], [3, 3]], r"gather_tokens: expected ids without repeats in a row, got 3 at \[1, 1\]"),
    ],
)
def test_wrong_ids(ids, message):
    x, _ = tensors(2, 7, 3, 8)
    with pytest.raises(RuntimeError, match=message):
        ops.gather_tokens(x, torch.tensor(ids))
