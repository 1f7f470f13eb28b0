"""Input that is odd but not plainly wrong, and input that once broke something: refused by name, or right."""

import pytest
import torch

from stmae import ops, reference


def test_float16_autocast_is_refused_on_a_cpu():
    """The CPU kernels read float32 and bfloat16; reading half precision as either would be silent nonsense."""
    x = torch.rand(4, 16)
    calls = {
        "linear": lambda: ops.linear(x, torch.rand(8, 16)),
        "mlp": lambda: ops.mlp(x, torch.rand(8, 16), torch.rand(8), torch.rand(16, 8), torch.rand(16)),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, torch.ones(16), torch.zeros(16)),
        "attention": lambda: ops.attention(*(torch.rand(3, 1, 4, 2, 8))),
        "attention_qkvpacked": lambda: ops.attention_qkvpacked(torch.rand(1, 4, 3, 2, 8)),
        "masked_patchify": lambda: ops.masked_patchify(
            torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), torch.tensor([[1]]), torch.rand(4, 3, 2, 4, 4), None, None
        ),
    }
    for op, call in calls.items():
        message = f"{op}: expected autocast to bfloat16.*float16"
        with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("stride", ["stepped", "expanded"])
def test_layer_norm_parameters_of_any_stride(stride):
    x = torch.randn(5, 8)
    weight, bias = torch.rand(16), torch.rand(16)
    weight, bias = (t[::2] if stride == "stepped" else t[:1].expand(8) for t in (weight, bias))
    for ours, theirs in zip(ops.add_layer_norm(x, x, weight, bias), reference.add_layer_norm(x, x, weight, bias)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("value", [0.0, 100.0, 1e4, 1e6])
def test_layer_norm_of_rows_far_from_zero(value, capability):
    x = torch.full((2, 768), value)
    _, out = ops.add_layer_norm(x, torch.zeros_like(x), torch.ones(768), torch.zeros(768))
    assert out.abs().max() <= 2e-3 * (value > 0)  # a mean off by one rounding, over sqrt(eps)
    x = value + torch.randn(4, 768, generator=torch.Generator().manual_seed(0))
    _, out = ops.add_layer_norm(x, torch.zeros_like(x), torch.ones(768), torch.zeros(768))
    exact = torch.nn.functional.layer_norm(x.double(), (768,), eps=1e-6)
    assert (out - exact).abs().max() <= 1e-5 + 2 * torch.finfo(torch.float32).eps * value


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8, 1e15])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_attention_with_large_scores(size, scale, capability):
    """The largest score wins all, and its own weight must not underflow through a rounded product."""
    generator = torch.Generator().manual_seed(1)
    q, v = torch.randn(1, 5, 1, 32, generator=generator), torch.randn(1, 5, 1, 32, generator=generator)
    out = ops.attention(q * size, q * size, v, scale=scale)
    torch.testing.assert_close(out, reference.attention(q * size, q * size, v, scale=scale), rtol=1e-4, atol=1e-3)


def test_no_channels_is_an_error():
    keep = torch.tensor([[0]])
    video = torch.zeros(1, 0, 2, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="masked_patchify: expected video with at least one channel"):
        ops.masked_patchify(video, keep, torch.zeros(4, 0, 2, 4, 4), None, None)
    with pytest.raises(ValueError, match="patch_loss: expected video with at least one channel"):
        ops.patch_loss(torch.zeros(1, 1, 0), video, keep, patch_size=(1, 4, 4), normalize=False)


@pytest.mark.parametrize("value", [None, "abc", float("nan"), [0.1, float("inf"), 0.2], torch.zeros(2)])
def test_mean_must_be_finite_numbers(value):
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="masked_patchify: expected mean a finite number or one per channel"):
        ops.masked_patchify(video, torch.tensor([[0]]), torch.zeros(4, 3, 2, 4, 4), None, None, mean=value)


@pytest.mark.parametrize("arguments", [{"frames": [1.9, 0.2]}, {"frames": 3}, {"patch_size": (1.7, 4.2, 4)}, {"patch_size": 4}])
def test_patch_loss_wants_whole_numbers(arguments):
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"patch_loss: expected {next(iter(arguments))} to be"):
        ops.patch_loss(torch.zeros(1, 1, 48), video, torch.tensor([[0]]), **{"patch_size": (1, 4, 4), **arguments})


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match="random_masking: expected noise"):
        ops.random_masking(torch.rand(2, 8).to_sparse(), 3)


def test_no_input_features():
    x, bias = torch.zeros(3, 4, 0), torch.rand(5)
    torch.testing.assert_close(ops.linear(x, torch.zeros(5, 0), bias), bias.expand(3, 4, 5))


def test_transposed_parameters_keep_the_dispatcher_contract():
    x = torch.rand(4, 5, requires_grad=True)
    weight = torch.rand(8, 5).t().contiguous().t().requires_grad_()
    torch.library.opcheck(torch.ops.stmae.linear, (x, weight, torch.rand(8, requires_grad=True)))


def test_ops_on_meta_tensors_give_shapes():
    with torch.device("meta"):
        out = ops.attention_qkvpacked(torch.rand(2, 6, 3, 2, 8))
        assert ops.linear(out.flatten(2), torch.rand(4, 16)).shape == (2, 6, 4)


def test_attention_with_scale_zero():
    q, k, v, grad = (torch.randn(1, 7, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(4))
    grads = []
    for module in (ops, reference):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        module.attention(*leaves, scale=0.0).backward(grad)
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
