"""random_masking: the ids that a stable argsort gives, exactly."""

import pytest
import torch

from stmae import ops, reference


def same(noise, num_keep):
    result, expected = ops.random_masking(noise, num_keep), reference.random_masking(noise, num_keep)
    return all(torch.equal(x, y) for x, y in zip(result, expected)) and all(x.dtype == torch.int64 for x in result)


@pytest.mark.parametrize("B,N,K", [(1, 2, 1), (3, 17, 16), (4, 1568, 156), (2, 33, 1), (5, 100, 99), (0, 9, 4)])
def test_uniform_noise(B, N, K, capability, nan_filled):
    assert same(torch.rand(B, N, generator=torch.Generator().manual_seed(N)), K)


@pytest.mark.parametrize("K", [1, 7, 30, 63])
def test_ties_go_to_the_lower_index(K, capability):
    generator = torch.Generator().manual_seed(0)
    assert same(torch.randint(0, 3, (6, 64), generator=generator).float(), K)
    assert same(torch.full((2, 64), 0.5), K)


def test_negative_zero_equals_zero(capability):
    noise = torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0], [-0.0, -1.0, 0.0, 2.0, -0.0]])
    for K in range(1, 5):
        assert same(noise, K)


def test_infinities_and_extremes(capability):
    inf, tiny, huge = float("inf"), 1e-45, 3.4e38
    noise = torch.tensor([[inf, -inf, tiny, -tiny, huge, -huge, 0.0, inf], [-inf, inf, inf, inf, inf, -inf, inf, 1.0]])
    for K in range(1, 8):
        assert same(noise, K)


def test_strided_noise(capability):
    noise = torch.rand(40, 6, 2, generator=torch.Generator().manual_seed(1))
    assert same(noise[:, :, 0].t(), 11)
    assert same(noise[::2, 1, :].t(), 3)


def test_same_at_any_number_of_threads(threads):
    noise = torch.rand(37, 1000, generator=torch.Generator().manual_seed(2))
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(ops.random_masking(noise, 100))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


def test_dispatcher_contract():
    torch.library.opcheck(torch.ops.stmae.random_masking.default, (torch.rand(2, 12), 5))


def test_compiles_without_graph_breaks():
    noise = torch.rand(3, 20)
    compiled = torch.compile(lambda x: ops.random_masking(x, 4), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(noise), reference.random_masking(noise, 4)))


@pytest.mark.parametrize(
    "noise,num_keep,message",
    [
        (torch.rand(4), 1, r"random_masking: expected noise \[B, N\] float32 .*got \[4\] float32 on cpu"),
        (torch.rand(2, 4).double(), 1, r"random_masking: expected noise .*float32.*got \[2, 4\] float64"),
        ([[1.0, 2.0]], 1, r"random_masking: expected noise .*got list"),
        (torch.rand(2, 4), 0, r"random_masking: expected num_keep in \[1, 3\] for 4 tokens, got 0 \(which keeps nothing\)"),
        (torch.rand(2, 4), 4, r"random_masking: expected num_keep in \[1, 3\] .*got 4 \(which keeps everything\)"),
        (torch.rand(2, 4), -1, r"random_masking: expected num_keep .*keeps nothing"),
        (torch.rand(2, 4), 1.5, r"random_masking: expected num_keep an int, got float 1.5"),
        (torch.rand(2, 4), True, r"random_masking: expected num_keep an int"),
    ],
)
def test_bad_input(noise, num_keep, message):
    with pytest.raises(ValueError, match=message):
        ops.random_masking(noise, num_keep)


def test_nan_is_named(capability):
    noise = torch.rand(3, 40)
    noise[1, 33] = noise[1, 35] = noise[2, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"random_masking: expected noise without NaN, got NaN at \[1, 33\]"):
        ops.random_masking(noise, 5)
