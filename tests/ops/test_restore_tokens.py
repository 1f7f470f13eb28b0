"""restore_tokens: the forward equals the reference exactly; gradients are copies and sums."""

import pytest
import torch

from stmae import ops, reference
from tests.support.tolerance import assert_as_good_as

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)]  # of the tokens, of mask token and position


def tensors(B, K, N, D, dtypes=(F32, F32)):
    generator = torch.Generator().manual_seed(N * 100 + D)
    keep = torch.rand(B, N, generator=generator).argsort(1)[:, :K]  # in no order: the op does not ask for any
    tokens, mask_token, position = (torch.randn(*shape, generator=generator) for shape in ((B, K, D), (D,), (N, D)))
    return tokens.to(dtypes[0]), keep, mask_token.to(dtypes[1]), position.to(dtypes[1])


def run(function, tokens, keep, mask_token, position):
    tokens, mask_token, position = (x.detach().clone().requires_grad_() for x in (tokens, mask_token, position))
    out = function(tokens, keep, mask_token, position)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (tokens, mask_token, position), upstream)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("B,K,N,D", [(1, 1, 1, 1), (3, 5, 21, 40), (2, 7, 70, 64), (5, 9, 33, 129), (2, 3, 100, 7)])
def test_forward_and_gradients(B, K, N, D, dtypes, capability, nan_filled):
    arguments = tensors(B, K, N, D, dtypes)
    plain = run(reference.restore_tokens, *arguments)
    exact = run(reference.restore_tokens, *(x.double() if x.is_floating_point() else x for x in arguments))
    kernel = run(ops.restore_tokens, *arguments)
    assert kernel[0].dtype == plain[0].dtype and torch.equal(kernel[0], plain[0])
    # `exact` has its upstream in float64; the kernels' is rounded to the result's dtype first.
    rounded = torch.randn(plain[0].shape, generator=torch.Generator().manual_seed(0)).to(plain[0].dtype).double()
    exact_inputs = [x.double().requires_grad_() for x in (arguments[0], arguments[2], arguments[3])]
    out = reference.restore_tokens(exact_inputs[0], arguments[1], exact_inputs[1], exact_inputs[2])
    exact[1:] = torch.autograd.grad(out, exact_inputs, rounded)
    assert torch.equal(kernel[1], plain[1])
    assert_as_good_as(plain[2], exact[2], kernel[2], name="grad_mask_token")
    assert_as_good_as(plain[3], exact[3], kernel[3], name="grad_position")


def test_strided_tokens_and_gradient(capability):
    tokens, keep, mask_token, position = tensors(3, 6, 20, 24)
    wide = torch.randn(3, 7, 50)
    wide[:, 1:, 5:29] = tokens
    view = wide[:, 1:, 5:29].detach().requires_grad_()
    out = ops.restore_tokens(view, keep, mask_token, position)
    assert torch.equal(out, reference.restore_tokens(tokens, keep, mask_token, position))
    upstream = torch.randn(20, 3, 24).transpose(0, 1)
    expected = upstream.gather(1, keep.unsqueeze(-1).expand(-1, -1, 24))
    assert torch.equal(torch.autograd.grad(out, view, upstream, retain_graph=True)[0], expected)
    assert torch.equal(torch.autograd.grad(out.sum(), view)[0], torch.ones_like(tokens))  # an expanded gradient


def test_class_token_is_token_0():
    tokens, keep, mask_token, position = tensors(2, 4, 9, 8)
    class_token, class_position = torch.randn(1, 1, 8).expand(2, 1, 8), torch.randn(1, 8)
    out = ops.restore_tokens(
        torch.cat([class_token, tokens], 1),
        torch.cat([torch.zeros(2, 1, dtype=torch.int64), keep + 1], 1),
        mask_token,
        torch.cat([class_position, position]),
    )
    assert torch.equal(out[:, :1], class_token + class_position)
    assert torch.equal(out[:, 1:], reference.restore_tokens(tokens, keep, mask_token, position))


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_same_at_any_number_of_threads(dtypes, threads):
    arguments = tensors(4, 40, 400, 96, dtypes)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(ops.restore_tokens, *arguments))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


@pytest.mark.parametrize("B,K,N,D", [(0, 3, 8, 16), (2, 0, 8, 16), (0, 0, 8, 16), (2, 8, 8, 16)])
def test_empty_batch_nothing_kept_everything_kept(B, K, N, D, capability, nan_filled):
    arguments = tensors(B, K, N, D)
    for plain, kernel in zip(run(reference.restore_tokens, *arguments), run(ops.restore_tokens, *arguments)):
        torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_dispatcher_contract(dtypes):
    tokens, keep, mask_token, position = tensors(2, 3, 7, 8, dtypes)
    arguments = (tokens.requires_grad_(), keep, mask_token.requires_grad_(), position.requires_grad_())
    torch.library.opcheck(torch.ops.stmae.restore_tokens.default, arguments)
    upstream = torch.randn(2, 7, 8, dtype=dtypes[1])
    torch.library.opcheck(torch.ops.stmae.restore_tokens_backward.default, (upstream, keep, dtypes[0]))


def test_compiles_without_graph_breaks():
    arguments = tensors(2, 3, 7, 8)
    compiled = torch.compile(ops.restore_tokens, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, *arguments), run(ops.restore_tokens, *arguments)):
        assert torch.equal(x, y)


def test_double_backward_is_refused():
    tokens, keep, mask_token, position = tensors(2, 3, 7, 8)
    tokens.requires_grad_()
    upstream = torch.randn(2, 7, 8, requires_grad=True)
    out = ops.restore_tokens(tokens, keep, mask_token, position)
    (grad,) = torch.autograd.grad(out, tokens, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="restore_tokens: double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(tokens=torch.randn(2, 3)), r"restore_tokens: expected tokens \[B, K, D\] .*got \[2, 3\] float32"),
        (dict(tokens=torch.randn(2, 3, 8).half()), r"restore_tokens: expected tokens .*got \[2, 3, 8\] float16"),
        (dict(tokens=torch.randn(2, 8, 3).transpose(1, 2)), r"restore_tokens: expected tokens with a contiguous last dimension"),
        (dict(keep=torch.zeros(2, 4, dtype=torch.int64)), r"restore_tokens: expected keep \[B, K\] int64 .*got \[2, 4\]"),
        (dict(keep=torch.zeros(2, 3, dtype=torch.int32)), r"restore_tokens: expected keep \[B, K\] int64 .*got \[2, 3\] int32"),
        (dict(mask_token=torch.randn(9)), r"restore_tokens: expected mask_token \[D\] .*here \[8\].*got \[9\]"),
        (dict(position=torch.randn(7, 9)), r"restore_tokens: expected position \[N, D\] .*got \[7, 9\]"),
        (dict(position=torch.randn(2, 8)), r"restore_tokens: expected keep with at most 2 tokens"),
        (dict(mask_token=torch.randn(8, device="meta")), r"restore_tokens: expected .*got .*meta"),
    ],
)
def test_bad_input(change, message):
    tokens, keep, mask_token, position = tensors(2, 3, 7, 8)
    arguments = dict(tokens=tokens, keep=keep, mask_token=mask_token, position=position)
    with pytest.raises(ValueError, match=message):
        ops.restore_tokens(**{**arguments, **change})


@pytest.mark.parametrize(
    "keep,message",
    [
        ([[0, 1, 2], [3, 7, 1]], r"restore_tokens: expected keep in \[0, 7\), got 7 at \[1, 1\]"),
        ([[0, -1, 2], [3, 9, 1]], r"restore_tokens: expected keep in \[0, 7\), got -1 at \[0, 1\]"),
        ([[0, 1, 2], [3, 1, 3]], r"restore_tokens: expected keep without repeats in a row, got 3 at \[1, 2\]"),
    ],
)
def test_wrong_ids(keep, message, threads):
    tokens, _, mask_token, position = tensors(2, 3, 7, 8)
    for count in (1, 4):
        threads(count)
        with pytest.raises(RuntimeError, match=message):
            ops.restore_tokens(tokens, torch.tensor(keep), mask_token, position)
