"""What every kernel has to do, written once: run interpreted anywhere (check_interpreted.py) and on a GPU (test_on_gpu.py).

Both ways go through the dispatcher's CUDA entry, so that registration and launcher are part of what is tested. The fixture
`device` says where tensors live; `guarded` wraps the launches (the sanitiser, where there is one).
"""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from stmae import ops, reference
from stmae.kernels.attention import exp2
from stmae.reference.patch_loss import patchify
from tests.support.tolerance import assert_as_good_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = [0.4, 0.45, 0.5, 0.6], [0.2, 0.225, 0.25, 0.3]

name_of = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}.get
id_of = lambda x: name_of(x) or str(x)  # noqa: E731
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def launch(op, *arguments):
    """stmae::op as a CUDA tensor would reach it; tensors on the CPU are handed to the same entry."""
    overload = getattr(torch.ops.stmae, op).default
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments):
        return overload(*arguments)
    return overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


class _OnGpuEntry(TorchDispatchMode):
    """Hands every stmae op, whatever its tensors are on, to its CUDA entry."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stmae":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def on_gpu_entry(device):
    """Within, the public functions, with autograd, reach the kernels as CUDA tensors do, also from the CPU."""
    return contextlib.nullcontext() if torch.device(device).type == "cuda" else _OnGpuEntry()


@pytest.fixture(autouse=True)
def _seeded(nan_filled):
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(dtype).to(device)


def masks(B, N, K, device):
    return reference.random_masking(torch.rand(B, N, device=device), K)


def expected(function, arguments, options, grad):
    """Of a reference: output and gradients of its arguments, in their own dtypes, and in float64."""
    results = []
    for exact in (False, True):
        leaves = [x.detach().to(torch.float64 if exact else x.dtype).requires_grad_() for x in arguments]
        out = function(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        results.append((out.detach(), *grads))
    return results


def assert_all(names, plain, exact, kernel):
    for name, a, b, c in zip(names, plain, exact, kernel, strict=True):
        assert_as_good_as(a, b, c, name=name)


# random_masking


@pytest.mark.parametrize("N, K", [(1, 0), (1, 1), (7, 3), (157, 0), (157, 157), (157, 31), (1568, 156), (5000, 777)])
def test_random_masking(device, guarded, N, K):
    noise = torch.rand(2, N, device=device)
    with guarded():
        keep, masked = launch("random_masking", noise, K)
    assert torch.equal(keep, reference.random_masking(noise, K)[0])
    assert torch.equal(masked, reference.random_masking(noise, K)[1])


def test_random_masking_ties_zeros_infinities_and_nan(device, guarded):
    noise = torch.rand(4, 96).round(decimals=1)
    noise[1] = 0.0
    noise[1, ::2] = -0.0
    noise[2, :8], noise[2, 8:16], noise[2, 16:80] = float("inf"), -float("inf"), float("nan")
    noise[3] = -noise[3]
    noise = noise.to(device)
    for K in (1, 20, 50, 90):
        with guarded():
            result = launch("random_masking", noise, K)
        for ours, theirs in zip(result, reference.random_masking(noise, K)):
            assert torch.equal(ours, theirs)


def test_random_masking_strided(device, guarded):
    noise = torch.rand(50, 6, device=device).t()[::2]
    with guarded():
        result = launch("random_masking", noise, 20)
    for ours, theirs in zip(result, reference.random_masking(noise, 20)):
        assert torch.equal(ours, theirs)


# gather_tokens


@each_dtype
@pytest.mark.parametrize("D", [8, 72, 768])
def test_gather_tokens(device, guarded, dtype, D):
    x = random(2, 37, D, dtype=dtype, device=device)
    ids, _ = masks(2, 37, 19, device)
    grad = random(2, 19, D, dtype=dtype, device=device)
    with guarded():
        out = launch("gather_tokens", x, ids)
        grad_x = launch("gather_tokens_backward", grad, ids, 37)
    assert torch.equal(out, reference.gather_tokens(x, ids))
    assert torch.equal(grad_x, torch.zeros_like(x).scatter(1, ids.unsqueeze(-1).expand_as(grad), grad))


def test_gather_tokens_strided(device, guarded):
    x = random(24, 2, 37, 2, device=device)[..., 1].permute(1, 2, 0)  # no stride is 1
    ids = masks(2, 37, 19, device)[0].flip(1).repeat(1, 2)[:, ::2]  # neither ascending nor dense
    ids = torch.stack([row.unique()[:8].flip(0) for row in ids])
    with guarded():
        assert torch.equal(launch("gather_tokens", x, ids), reference.gather_tokens(x, ids))


@pytest.mark.parametrize("wild", [-1, 37, 2**31, -(2**40), 2**62])
def test_ids_out_of_range_touch_nothing(device, guarded, wild):
    ids, masked = masks(2, 37, 5, device)
    ids[0, 2] = wild
    x, tokens = random(2, 37, 24, device=device), random(2, 5, 24, device=device)
    with guarded():
        taken = launch("gather_tokens", x, ids)
        put = launch("restore_tokens", tokens, ids, random(24, device=device), random(37, 24, device=device))
        grad_tokens, _, _ = launch("restore_tokens_backward", x, ids, torch.float32)
        grad_x = launch("gather_tokens_backward", tokens, ids, 37)
    assert (taken[0, 2] == 0).all() and torch.equal(taken[1], x[1, ids[1]])
    assert (grad_tokens[0, 2] == 0).all() and torch.equal(grad_tokens[1], x[1, ids[1]])
    assert put.isfinite().all() and grad_x.isfinite().all()

    video = torch.randint(0, 256, (2, 1, 37, 4, 4), dtype=torch.uint8, device=device)
    weight, position = random(8, 1, 1, 4, 4, device=device), random(37, 8, device=device)
    pred = random(2, 5, 16, device=device)
    with guarded():
        rows = launch("masked_patchify", video, ids, weight, None, position, [0.5], [0.2])
        grads = launch("masked_patchify_backward", rows, video, ids, weight, None, position, [0.5], [0.2])
        losses = launch("patch_loss", pred, video, ids, [1, 4, 4], list(range(37)), True, [0.5], [0.2])
        rest = [1, 4, 4], list(range(37)), [0.5], [0.2]
        grad_pred = launch("patch_loss_backward", losses[0], pred, video, ids, *losses[1:], *rest)
    assert (rows[0, 2] == 0).all()
    torch.testing.assert_close(losses[0][0, 2], pred[0, 2].square().mean())  # against a patch of zeros
    assert all(x.isfinite().all() for x in (rows, *grads, *losses, grad_pred))


# restore_tokens


@pytest.mark.parametrize(
    "dtype, position_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("N, K, D", [(37, 11, 72), (50, 0, 8), (33, 33, 512)])
def test_restore_tokens(device, guarded, dtype, position_dtype, N, K, D):
    keep, _ = masks(3, N, K, device)
    tokens = random(3, K, D, dtype=dtype, device=device)
    mask_token, position = random(D, dtype=position_dtype, device=device), random(N, D, dtype=position_dtype, device=device)
    grad = random(3, N, D, dtype=position_dtype, device=device)
    with guarded():
        out = launch("restore_tokens", tokens, keep, mask_token, position)
        grads = launch("restore_tokens_backward", grad, keep, dtype)
    plain, exact = expected(lambda t, m, p: reference.restore_tokens(t, keep, m, p), (tokens, mask_token, position), {}, grad)
    assert_all(("out", "grad_tokens", "grad_mask_token", "grad_position"), plain, exact, (out, *grads))


def test_restore_tokens_strided(device, guarded):
    keep = torch.stack([torch.randperm(30)[:7] for _ in range(2)]).to(device)  # in any order
    tokens = random(7, 24, 2, device=device).permute(2, 0, 1)
    mask_token, position = random(48, device=device)[::2], random(24, 30, device=device).t()
    grad = random(24, device=device).expand(2, 30, 24)
    with guarded():
        out = launch("restore_tokens", tokens, keep, mask_token, position)
        grads = launch("restore_tokens_backward", grad, keep, torch.float32)
    plain, exact = expected(lambda t, m, p: reference.restore_tokens(t, keep, m, p), (tokens, mask_token, position), {}, grad)
    assert_all(("out", "grad_tokens", "grad_mask_token", "grad_position"), plain, exact, (out, *grads))


# masked_patchify


def video_of(layout, dtype, shape, device):
    """[B, C, T, H, W]: as a decoder gives it, as a Conv3d wants it, or a crop with no dense dimension."""
    B, C, T, H, W = shape
    if layout == "channels-last":
        x = torch.randint(0, 256, (B, T, H, W, C), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    elif layout == "planar":
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
    else:
        x = torch.randint(0, 256, (B, H + 3, T, 2 * W, C), dtype=torch.uint8).permute(0, 4, 2, 1, 3)[..., 2 : H + 2, ::2]
    return x.to(device) if dtype == torch.uint8 else (x.float() / 255 - 0.5).to(dtype).to(device)


PATCHIFY = {  # layout, video, weight, position, [B, C, T, H, W], patch, D, K, bias
    "channels-last": ("channels-last", torch.uint8, torch.bfloat16, torch.float32, (3, 3, 4, 32, 48), (2, 16, 16), 72, 9, True),
    "planar": ("planar", torch.uint8, torch.bfloat16, torch.bfloat16, (3, 3, 4, 32, 48), (2, 16, 16), 136, 9, True),
    "float32": ("channels-last", torch.uint8, torch.float32, torch.float32, (2, 3, 2, 32, 32), (2, 16, 16), 72, 3, True),
    "float16": ("planar", torch.uint8, torch.float16, torch.float16, (2, 3, 2, 32, 32), (2, 16, 16), 72, 3, True),
    "floating video": ("planar", torch.float32, torch.float32, torch.float32, (2, 2, 2, 28, 42), (1, 14, 14), 40, 5, True),
    "bfloat16 video": ("channels-last", torch.bfloat16, torch.bfloat16, None, (2, 3, 2, 28, 42), (2, 14, 14), 40, 5, False),
    "float16 video": ("channels-last", torch.float16, torch.float16, torch.float32, (2, 3, 2, 28, 42), (2, 14, 14), 40, 5, True),
    "float16 video, bfloat16": ("crop", torch.float16, torch.bfloat16, None, (2, 4, 4, 24, 16), (2, 8, 8), 24, 7, False),
    "patch 14": ("channels-last", torch.uint8, torch.bfloat16, torch.float32, (2, 3, 2, 28, 42), (2, 14, 14), 40, 5, True),
    "no dense dimension": ("crop", torch.uint8, torch.float32, None, (2, 4, 4, 24, 16), (2, 8, 8), 24, 7, False),
    "grey": ("planar", torch.uint8, torch.float32, torch.float32, (40, 1, 2, 8, 8), (1, 4, 4), 16, 4, True),
}


@pytest.mark.parametrize("case", PATCHIFY.values(), ids=PATCHIFY)
def test_masked_patchify(device, guarded, case):
    layout, video_dtype, dtype, position_dtype, shape, patch, D, K, has_bias = case
    C = shape[1]
    N = (shape[2] // patch[0]) * (shape[3] // patch[1]) * (shape[4] // patch[2])
    video = video_of(layout, video_dtype, shape, device)
    keep, _ = masks(shape[0], N, K, device)
    weight = (random(D, C, *patch) * 0.05).to(dtype).to(device)
    bias = random(D, dtype=dtype, device=device) if has_bias else None
    position = None if position_dtype is None else random(N, D, dtype=position_dtype, device=device)
    mean, std = MEAN[:C], STD[:C]
    grad = random(shape[0], K, D, dtype=position_dtype or dtype, device=device)
    with guarded():
        out = launch("masked_patchify", video, keep, weight, bias, position, mean, std)
        grads = launch("masked_patchify_backward", grad, video, keep, weight, bias, position, mean, std)
    given = [x for x in (weight, bias, position) if x is not None]
    for grad_x, x in zip(grads, (weight, bias, position)):
        assert grad_x.shape == ((0,) if x is None else x.shape) and grad_x.is_contiguous()

    def function(weight, *rest):
        rest = list(rest)
        b = rest.pop(0) if has_bias else None
        p = rest.pop(0) if position is not None else None
        # Pixels in float32, as the kernel makes them, also where the weight is float64.
        return reference.masked_patchify(video, keep, weight, b, p, mean=mean, std=std)

    plain, exact = expected(function, given, {}, grad)
    kernel = (out, *(x for x in grads if x.numel()))
    names = ("out", "grad_weight", *(n for n, x in (("grad_bias", bias), ("grad_position", position)) if x is not None))
    assert_all(names, plain, exact, kernel)


def test_masked_patchify_sums_in_parts(device, guarded):
    """Rows enough for several programs along each axis, and for the weight's gradient to be summed in two stages."""
    shape, patch, D = (2, 3, 2, 96, 96), (1, 4, 4), 72
    video = video_of("channels-last", torch.uint8, shape, device)
    keep, _ = masks(2, 1152, 500, device)
    weight = (random(D, 3, *patch) * 0.2).bfloat16().to(device)
    grad = random(2, 500, D, dtype=torch.bfloat16, device=device)
    mean, std = MEAN[:3], STD[:3]
    with guarded():
        out = launch("masked_patchify", video, keep, weight, None, None, mean, std)
        grad_weight, _, _ = launch("masked_patchify_backward", grad, video, keep, weight, None, None, mean, std)
    plain, exact = expected(
        lambda w: reference.masked_patchify(video, keep, w, None, None, mean=mean, std=std), [weight], {}, grad
    )
    assert_all(("out", "grad_weight"), plain, exact, (out, grad_weight))


# patch_loss

PATCH_LOSS = {  # layout, video, pred, [B, C, T, H, W], patch, frames, M, normalize
    "channels-last": ("channels-last", torch.uint8, torch.bfloat16, (2, 3, 8, 32, 48), (1, 16, 16), [0, 2, 4, 7], 17, True),
    "planar": ("planar", torch.uint8, torch.bfloat16, (2, 3, 8, 32, 48), (1, 16, 16), [0, 2, 4, 6], 17, True),
    "two frames": ("channels-last", torch.uint8, torch.float32, (2, 3, 4, 32, 32), (2, 16, 16), [0, 1, 2, 3], 5, True),
    "pixels": ("channels-last", torch.uint8, torch.float32, (2, 3, 4, 32, 32), (2, 16, 16), [3, 1], 3, False),
    "patch 14": ("planar", torch.uint8, torch.float16, (2, 3, 2, 28, 42), (1, 14, 14), [1], 5, True),
    "floating video": ("channels-last", torch.float32, torch.float32, (2, 2, 2, 16, 16), (1, 8, 8), [0, 1], 6, True),
    "bfloat16 video": ("planar", torch.bfloat16, torch.bfloat16, (2, 3, 2, 16, 16), (1, 8, 8), [0, 1], 6, True),
    "float16 video": ("channels-last", torch.float16, torch.float16, (2, 3, 2, 16, 16), (1, 8, 8), [0, 1], 6, True),
    "by channel": ("channels-last", torch.uint8, torch.bfloat16, (2, 3, 4, 32, 32), (2, 16, 16), [0, 1, 2, 3], 5, "channel"),
    "by channel, planar": ("planar", torch.float32, torch.float32, (2, 2, 2, 24, 16), (1, 8, 8), [0, 1], 6, "channel"),
    "no dense dimension": ("crop", torch.uint8, torch.float32, (2, 4, 4, 24, 16), (2, 8, 8), [0, 2, 1, 3], 7, True),
}


@pytest.mark.parametrize("case", PATCH_LOSS.values(), ids=PATCH_LOSS)
def test_patch_loss(device, guarded, case):
    layout, video_dtype, dtype, shape, patch, frames, M, normalize = case
    B, C, _, H, W = shape
    N = len(frames) // patch[0] * (H // patch[1]) * (W // patch[2])
    video = video_of(layout, video_dtype, shape, device)
    _, masked = masks(B, N, N - M, device)
    wide = random(B, M + 1, C * patch[0] * patch[1] * patch[2] + 8, dtype=dtype, device=device)
    pred = wide[:, 1:, :-8]  # a view: rows are dense, the array is not
    options = dict(patch_size=patch, frames=frames, normalize=normalize, mean=MEAN[:C], std=STD[:C], reduction="none")
    grad = torch.rand(M, device=device).expand(B, M)
    arguments = (list(patch), frames, MEAN[:C], STD[:C])
    statistics = {False: 0, True: 1, "channel": 2}[normalize]
    with guarded():
        loss, mean, rstd = launch("patch_loss", pred, video, masked, *arguments[:2], statistics, *arguments[2:])
        grad_pred = launch("patch_loss_backward", grad, pred, video, masked, mean, rstd, *arguments)
    exact_pred = pred.double().requires_grad_()
    exact_video = video
    if video_dtype == torch.uint8:
        scale = (-1, 1, 1, 1)
        m, s = (torch.tensor(x[:C], dtype=torch.float64, device=device).view(scale) for x in (MEAN, STD))
        exact_video = (video.double() / 255 - m) / s
    target = reference.gather_tokens(patchify(exact_video.double()[:, :, frames], patch), masked)
    if normalize == "channel":
        target = target.unflatten(-1, (-1, C))
        target = ((target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True).sqrt() + 1e-6)).flatten(-2)
    elif normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    exact = (exact_pred - target).square().mean(-1)
    (exact_grad,) = torch.autograd.grad(exact, exact_pred, grad.double())
    plain_pred = pred.detach().requires_grad_()
    plain = reference.patch_loss(plain_pred, video, masked, **options)
    (plain_grad,) = torch.autograd.grad(plain, plain_pred, grad)
    assert_all(("loss", "grad_pred"), (plain.detach(), plain_grad), (exact.detach(), exact_grad), (loss, grad_pred))


# lists of videos


def list_of_videos(patch, channels_last, dtype, device):
    """Videos of three grids, ids of some of their tokens, the offsets of the ids, and the number of all tokens."""
    videos, ids, counts, first = [], [], [], 0
    for (t, h, w), count in zip(((2, 2, 3), (1, 1, 1), (3, 2, 2)), (5, 1, 7)):
        video = torch.randint(0, 256, (3, t * patch[0], h * patch[1], w * patch[2]), dtype=torch.uint8)
        video = video if dtype == torch.uint8 else (video / 255).to(dtype)
        if channels_last:
            video = video.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        videos.append(video.to(device))
        ids.append(first + torch.randperm(t * h * w)[:count])
        counts.append(count)
        first += t * h * w
    return videos, torch.cat(ids).to(device), torch.tensor([0, *counts]).cumsum(0).to(device), first


# The kernels find videos by their addresses, in a table, which the sanitiser does not know: they are compared without it.
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "planar"])
@pytest.mark.parametrize(
    "pixels, dtype", [(torch.uint8, torch.bfloat16), (torch.uint8, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=id_of
)
@pytest.mark.parametrize("patch, D", [((2, 4, 4), 24), ((2, 16, 16), 72), ((1, 6, 14), 16)], ids=str)
def test_masked_patchify_varlen(device, patch, D, pixels, dtype, channels_last):
    videos, keep, cu_seqlens, N = list_of_videos(patch, channels_last, pixels, device)
    parameters = [random(*shape, dtype=dtype, device=device) for shape in ((D, 3, *patch), (D,), (N, D))]
    grad = random(13, D, dtype=dtype, device=device)
    colour = MEAN[:3], STD[:3]
    out = launch("masked_patchify_varlen", videos, keep, cu_seqlens, *parameters, *colour)
    grads = launch("masked_patchify_varlen_backward", grad, videos, keep, cu_seqlens, *parameters, *colour)

    def embed(*parameters):
        return reference.masked_patchify_varlen(videos, keep, cu_seqlens, *parameters, mean=MEAN[:3], std=STD[:3])

    plain, exact = expected(embed, parameters, {}, grad)
    assert_all(("out", "grad_weight", "grad_bias", "grad_position"), plain, exact, (out, *grads))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "planar"])
@pytest.mark.parametrize("normalize", [False, True, "channel"], ids=str)
@pytest.mark.parametrize("patch", [(1, 4, 4), (1, 16, 16)], ids=str)
def test_patch_loss_varlen(device, patch, normalize, channels_last):
    videos, masked, cu_seqlens, _ = list_of_videos((2, *patch[1:]), channels_last, torch.uint8, device)
    frames = [[0, 3], [1], [0, 2, 5]]
    pred, grad = random(13, 3 * patch[1] * patch[2], device=device), random(13, device=device)
    constants = list(patch), [i for own in frames for i in own], [len(own) for own in frames]
    kind, colour = {False: 0, True: 1, "channel": 2}[normalize], (MEAN[:3], STD[:3])
    loss, *kept = launch("patch_loss_varlen", pred, videos, masked, cu_seqlens, *constants, kind, *colour)
    grad_pred = launch("patch_loss_varlen_backward", grad, pred, videos, masked, cu_seqlens, *kept, *constants, *colour)

    def error(pred):
        options = dict(patch_size=patch, frames=frames, normalize=normalize, mean=MEAN[:3], std=STD[:3], reduction="none")
        return reference.patch_loss_varlen(pred, videos, masked, cu_seqlens, **options)

    plain, exact = expected(error, (pred,), {}, grad)
    assert_all(("loss", "grad_pred"), plain, exact, (loss, grad_pred))


def test_ids_of_no_video_touch_nothing(device):
    videos, keep, cu_seqlens, N = list_of_videos((2, 4, 4), True, torch.uint8, device)
    keep[3], keep[7] = -1, 2**40
    weight, bias = random(8, 3, 2, 4, 4, device=device), random(8, device=device)
    out = launch("masked_patchify_varlen", videos, keep, cu_seqlens, weight, bias, None, MEAN[:3], STD[:3])
    assert torch.equal(out[3], bias) and torch.equal(out[7], bias) and out.isfinite().all()


@pytest.mark.parametrize("lengths, num_keep", [([20, 0, 40], [5, 0, 30]), ([5000, 2], [777, 1]), ([3], [1])], ids=str)
def test_random_masking_varlen(device, guarded, lengths, num_keep):
    noise = torch.rand(sum(lengths), device=device)
    cu_seqlens, cu_keep = (torch.tensor([0, *x], device=device).cumsum(0) for x in (lengths, num_keep))
    with guarded():
        result = launch("random_masking_varlen", noise, cu_seqlens, cu_keep, sum(num_keep))
    for ours, theirs in zip(result, reference.random_masking_varlen(noise, cu_seqlens, num_keep)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cu_keep", [[0, 30, 33], [0, 40, 10], [9, 0, 33]], ids=str)
def test_random_masking_varlen_stays_within_its_tensors(device, guarded, cu_keep):
    noise, cu_seqlens = torch.rand(60, device=device), torch.tensor([0, 20, 60], device=device)
    with contextlib.suppress(RuntimeError), guarded():  # two programs may write one place
        launch("random_masking_varlen", noise, cu_seqlens, torch.tensor(cu_keep, device=device), 33)


# attention

ATTENTION = [  # dtype, B, N, H, D
    (torch.bfloat16, 1, 157, 2, 64),
    (torch.bfloat16, 2, 33, 2, 32),
    (torch.bfloat16, 1, 77, 1, 80),
    (torch.bfloat16, 1, 40, 2, 96),
    (torch.bfloat16, 1, 70, 1, 128),
    (torch.bfloat16, 1, 300, 1, 32),
    (torch.bfloat16, 1, 1, 3, 8),
    (torch.float16, 1, 65, 2, 64),
    (torch.float16, 1, 20, 1, 72),
    (torch.float32, 1, 77, 1, 64),
    (torch.float32, 1, 33, 2, 80),
    (torch.float32, 1, 40, 1, 128),
    (torch.float32, 1, 17, 1, 24),
]


def attention_errors(device, guarded, q, k, v, scale):
    grad = random(*q.shape, dtype=q.dtype, device=device)
    with guarded():
        out, lse = launch("attention", q, k, v, scale)
        grads = launch("attention_backward", grad, q, k, v, out, lse, scale)
    plain, exact = expected(reference.attention, (q, k, v), dict(scale=scale), grad)
    scores = scale * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    # The weights that lse sums are rounded as those that meet v are: by at most half of eps, which log makes an absolute error.
    rounding = torch.finfo(q.dtype).eps / 2 if q.dtype != torch.float32 else 0
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5 + rounding)
    assert_all(("out", "grad_q", "grad_k", "grad_v"), plain, exact, (out, *grads))


@pytest.mark.parametrize("dtype, B, N, H, D", ATTENTION, ids=id_of)
def test_attention_qkvpacked(device, guarded, dtype, B, N, H, D):
    qkv, grad = random(B, N, 3, H, D, dtype=dtype, device=device), random(B, N, H, D, dtype=dtype, device=device)
    scale = D**-0.5
    with guarded():
        out, lse = launch("attention_qkvpacked", qkv, scale)
        grad_qkv = launch("attention_qkvpacked_backward", grad, qkv, out, lse, scale)
    plain, exact = expected(reference.attention_qkvpacked, (qkv,), dict(scale=scale), grad)
    assert_all(("out", "grad_qkv"), plain, exact, (out, grad_qkv))


LENGTHS = [  # of queries and of keys
    ([65, 0, 1, 130, 40], None),
    ([200], None),
    ([0, 0, 7, 0], None),
    ([33, 1, 0, 70], [20, 90, 5, 64]),
]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.bfloat16, 80), (torch.float32, 32)], ids=id_of)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_varlen(device, guarded, lengths, dtype, D, index_dtype):
    queries, keys = lengths[0], lengths[1] or lengths[0]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(index_dtype).to(device) for x in (queries, keys))
    q, k, v = (random(sum(n), 2, D, dtype=dtype, device=device) for n in (queries, keys, keys))
    grad, scale = random(*q.shape, dtype=dtype, device=device), D**-0.5
    with guarded():
        out, lse = launch("attention_varlen", q, k, v, cu_q, cu_k, scale)
        grads = launch("attention_varlen_backward", grad, q, k, v, out, lse, cu_q, cu_k, scale)
    plain, exact = expected(lambda *x: reference.attention_varlen(*x, cu_q, cu_k, scale=scale), (q, k, v), {}, grad)
    assert_all(("out", "grad_q", "grad_k", "grad_v"), plain, exact, (out, *grads))


def test_attention_varlen_qkvpacked(device, guarded):
    cu_seqlens = torch.tensor([0, 35, 35, 130, 131], device=device)
    qkv, grad = (random(131, *s, 2, 64, dtype=torch.bfloat16, device=device) for s in ((3,), ()))
    with guarded():
        out, lse = launch("attention_varlen_qkvpacked", qkv, cu_seqlens, 0.125)
        grad_qkv = launch("attention_varlen_qkvpacked_backward", grad, qkv, out, lse, cu_seqlens, 0.125)
        alone, alone_lse = launch("attention_qkvpacked", qkv[None, 35:130], 0.125)
    plain, exact = expected(lambda x: reference.attention_varlen_qkvpacked(x, cu_seqlens, scale=0.125), (qkv,), {}, grad)
    assert_all(("out", "grad_qkv"), plain, exact, (out, grad_qkv))
    assert_as_good_as(plain[0][35:130], exact[0][35:130], alone[0], name="one by itself")
    torch.testing.assert_close(lse[:, 35:130], alone_lse[0], rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("offsets", [[0, 70, 30, 90], [5, -200, 10**6, 90], [0, 0, 0, 0], [90, 0, 90, 0]], ids=str)
def test_attention_varlen_stays_within_its_tensors(device, guarded, offsets):
    """Whatever the offsets, which nobody looks at on a GPU."""
    qkv, offsets = random(90, 3, 1, 32, dtype=torch.bfloat16, device=device), torch.tensor(offsets, device=device)
    out, lse = random(90, 1, 32, dtype=torch.bfloat16, device=device), random(1, 90, device=device)
    with contextlib.suppress(RuntimeError), guarded():  # two programs may write one place
        launch("attention_varlen_qkvpacked", qkv, offsets, 0.2)
    with contextlib.suppress(RuntimeError), guarded():
        launch("attention_varlen_qkvpacked_backward", out, qkv, out, lse, offsets, 0.2)


@pytest.mark.parametrize("scale", [0.2, 0.0, -0.3])
def test_attention_of_other_lengths_and_strides(device, guarded, scale):
    q = random(1, 2, 41, 32, device=device, dtype=torch.bfloat16).transpose(1, 2)
    k = random(1, 75, 2, 64, device=device, dtype=torch.bfloat16)[..., ::2]
    v = random(1, 75, 3, 40, device=device, dtype=torch.bfloat16)[:, :, 1:, 8:]
    attention_errors(device, guarded, q, k, v, scale)


def test_attention_of_large_scores(device, guarded):
    """Scores of hundreds: the exponentials of raw scores would overflow, and the backward's would without their maximum."""
    q, k, v = (random(1, 40, 1, 32, device=device) * s for s in (10, 10, 1))
    grad = random(1, 40, 1, 32, device=device)
    with guarded():
        out, lse = launch("attention", q, k, v, 1.0)
        grads = launch("attention_backward", grad, q, k, v, out, lse, 1.0)
    _, exact = expected(reference.attention, (q, k, v), dict(scale=1.0), grad)
    # A score of 1000 is rounded by 1000 eps, which the exponential makes a relative error.
    for ours, theirs in zip((out, *grads), exact):
        assert (ours - theirs).abs().max() < 1e-3 * max(1, theirs.abs().max())


# Of all targets, as far as they differ in more than the number of warps: (BLOCK_M, BLOCK_N), and with exponentials by a
# polynomial.
TILES = [(64, 64, 0), (64, 128, 1), (128, 64, 2), (32, 32, 0), (64, 64, 4), (16, 128, 0), (32, 16, 0)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_gives_the_same(device, guarded, tile, monkeypatch):
    """At a length that none of them divides: full tiles, and a last, smaller one."""
    from stmae.kernels import attention as kernels
    from stmae.kernels.launching import configs

    block_m, block_n, eighths = tile
    one = configs((4, 2, dict(BLOCK_M=block_m, BLOCK_N=block_n, EIGHTHS=eighths)))
    monkeypatch.setattr(kernels, "_configurations", lambda *_: one)
    q, k, v = (random(1, 141, 1, 32, device=device, dtype=torch.bfloat16) for _ in range(3))
    attention_errors(device, guarded, q, k, v, 0.125)


@pytest.mark.parametrize("eighths", [0, 1, 2, 4])
def test_no_score_that_is_not_a_number_is_lost(device, guarded, eighths, monkeypatch):
    from stmae.kernels import attention as kernels
    from stmae.kernels.launching import configs

    one = configs((4, 2, dict(BLOCK_M=64, BLOCK_N=64, EIGHTHS=eighths)))
    monkeypatch.setattr(kernels, "_configurations", lambda *_: one)
    q, k, v = (random(1, 64, 1, 32, device=device, dtype=torch.bfloat16) for _ in range(3))
    k[0, 60, 0, 3] = float("nan")
    with guarded():
        out, lse = launch("attention", q, k, v, 0.2)
        grad_q, grad_k, grad_v = launch("attention_backward", v, q, k, v, out, lse, 0.2)
    assert not out.isfinite().any() and not grad_q.isfinite().any() and not grad_k.isfinite().any()


@triton.jit
def _powers(x_ptr, out_ptr, EIGHTHS: tl.constexpr):
    where = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + where, exp2(tl.load(x_ptr + where), EIGHTHS))


@pytest.mark.parametrize("eighths", [0, 1, 2, 4])
def test_exponentials_by_a_polynomial(device, guarded, eighths):
    """Against float64: the columns that are meant to be approximated are, within the documented error, and the others are not."""
    x = torch.linspace(-127, 1, 64 * 64, dtype=torch.float64)[torch.randperm(64 * 64)].float().view(64, 64).to(device)
    out = torch.empty_like(x)
    with guarded():
        _powers[(1,)](x, out, EIGHTHS=eighths)
    error = (out / x.double().exp2() - 1).abs()
    error[x < -126] = 0  # where float32 has no normal numbers: both are as good as 0
    first = 64 - 8 * eighths
    assert error[:, :first].max() < 1e-6
    if eighths:
        assert 5e-5 < error[:, first:].max() <= 1.1e-4
    assert out.max() <= 2 and (out[x < -126] <= 2.0**-126).all()


def test_tf32_only_where_torch_allows_it(device, guarded, monkeypatch):
    q, k, v = (random(1, 48, 1, 64, device=device) for _ in range(3))
    exact = reference.attention(q.double(), k.double(), v.double())
    errors = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            with guarded():
                out, _ = launch("attention", q, k, v, 0.125)
            errors[precision] = (out - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 2e-6
    assert 1e-5 < errors["tf32"] < 5e-3


# add_layer_norm

WIDTHS = [192, 384, 768, 1024, 1280, 100, 7]
STREAMS = [  # x, branch, out: as under autocast, and all of one kind
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    *((dtype, dtype, dtype) for dtype in DTYPES),
]


def norm_errors(guarded, x, branch, weight, bias, grad_sum, grad_out, dtype):
    """add_layer_norm, or with branch None a layer norm, and its gradients, against the reference."""
    eps = 1e-6
    with guarded():
        if branch is None:
            sum, (out, mean, rstd) = x, launch("_layer_norm", x, weight, bias, eps, dtype)
        else:
            sum, out, mean, rstd = launch("add_layer_norm", x, branch, weight, bias, eps, dtype)
        branch_dtype = x.dtype if branch is None else branch.dtype
        grads = launch("add_layer_norm_backward", grad_sum, grad_out, sum, mean, rstd, weight, branch_dtype)
    grad_x, grad_branch, grad_weight, grad_bias = grads
    if branch_dtype == x.dtype:
        assert grad_branch.shape == (0,)
        grad_branch = grad_x
    results = []
    for exact in (False, True):
        leaves = [None if t is None else t.detach().to(torch.float64 if exact else t.dtype) for t in (x, branch, weight, bias)]
        given = [t.requires_grad_() for t in leaves if t is not None]
        first, second = reference.add_layer_norm(*leaves, eps=eps)
        second = second if exact else second.to(dtype)
        upstream = [None if t is None else t.to(torch.float64) if exact else t for t in (grad_sum, grad_out)]
        used = [(a, b) for a, b in zip((first, second), upstream) if b is not None]
        found = torch.autograd.grad([a for a, _ in used], given, [b for _, b in used])
        results.append((first.detach(), second.detach(), *found))
    names = ["sum", "out", "grad_x", "grad_branch", "grad_weight", "grad_bias"]
    kernel = [sum, out, grad_x, grad_branch, grad_weight, grad_bias]
    if branch is None:
        del names[3], kernel[3]
    assert_all(names, *results, kernel)


@pytest.mark.parametrize(
    "x_dtype, branch_dtype, dtype, D", [(*STREAMS[0], D) for D in WIDTHS] + [(*kinds, 328) for kinds in STREAMS[1:]], ids=id_of
)
def test_add_layer_norm(device, guarded, x_dtype, branch_dtype, dtype, D):
    x, branch, grad_sum, grad_out = (
        random(2, 19, D, dtype=kind, device=device) for kind in (x_dtype, branch_dtype, x_dtype, dtype)
    )
    weight, bias = random(D, device=device), random(D, device=device)
    norm_errors(guarded, 2 * x + 1, branch, weight, bias, grad_sum, grad_out, dtype)


@each_dtype
def test_layer_norm_and_no_gradient_of_the_sum(device, guarded, dtype):
    x, branch, grad = (random(3, 7, 72, dtype=dtype, device=device) for _ in range(3))
    weight, bias = random(72, dtype=dtype, device=device), random(72, dtype=dtype, device=device)
    norm_errors(guarded, x, None, weight, bias, None, grad, dtype)
    norm_errors(guarded, x, branch, weight, bias, None, grad, dtype)


def test_add_layer_norm_strided(device, guarded):
    """Rows apart from each other, columns apart from each other, and expanded gradients."""
    weight, bias = random(96, device=device)[::2], random(48, device=device)
    wide = random(5, 64, device=device)
    branch, grad = random(48, 5, dtype=torch.bfloat16, device=device).t(), random(48, dtype=torch.bfloat16, device=device)
    norm_errors(guarded, wide[:, 8:56], branch, weight, bias, wide[:, :48], grad.expand(5, 48), torch.bfloat16)


def test_add_layer_norm_sums_in_parts(device, guarded):
    """Rows enough for several programs to sum the parameters' gradients, the last with fewer rows than the others."""
    x, branch, grad_sum, grad_out = (random(16 * 20 + 3, 40, device=device) for _ in range(4))
    norm_errors(guarded, x, branch, random(40, device=device), random(40, device=device), grad_sum, grad_out, torch.float32)


def test_layer_norm_far_from_zero(device, guarded):
    """A mean 10,000 times the deviation: squares of the elements would lose the variance."""
    x = random(4, 768, device=device) + 1e4
    with guarded():
        out, mean, rstd = launch("_layer_norm", x, torch.ones(768, device=device), torch.zeros(768, device=device), 0.0, x.dtype)
    exact = torch.nn.functional.layer_norm(x.double(), (768,), eps=0.0)
    # Of x's magnitude, float32 keeps 2^-24, which the division by a deviation of 1 keeps.
    assert (out - exact).abs().max() < 4 * 1e4 * 2**-24
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)


# linear and mlp


def layer_arguments(op, rows, width, hidden, dtype, parameters, device):
    x = random(rows, width, dtype=dtype, device=device)
    fan_in = random(hidden, width) * width**-0.5
    shapes = [fan_in, random(hidden)]
    if op == "mlp":
        shapes += [random(width, hidden) * max(1, hidden) ** -0.5, random(width)]
    return [x, *(t.to(parameters).to(device) for t in shapes)]


@pytest.mark.parametrize(
    "dtype, parameters", [*((d, torch.float32) for d in DTYPES), (torch.bfloat16, torch.bfloat16)], ids=name_of
)
@pytest.mark.parametrize("rows, width, hidden", [(70, 24, 192), (131, 40, 100), (3, 16, 1024), (1, 8, 7)])
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_linear_layers(device, guarded, op, rows, width, hidden, dtype, parameters):
    """Autograd and all: the ops are entered where CUDA tensors would enter them, forward and backward."""
    arguments = layer_arguments(op, rows, width, hidden, dtype, parameters, device)
    grad = random(rows, hidden if op == "linear" else width, dtype=dtype, device=device)
    plain, exact = expected(getattr(reference, op), arguments, {}, grad)
    leaves = [x.detach().requires_grad_() for x in arguments]
    with guarded(), on_gpu_entry(device):
        out, *kept = getattr(torch.ops.stmae, op)(*leaves)
        grads = torch.autograd.grad(out, leaves, grad)
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    assert_all(("out", *(f"grad_{name}" for name in names[: len(grads)])), plain, exact, (out.detach(), *grads))
    for weight, cast in zip(arguments[1::2], kept if op == "linear" else kept[2:], strict=True):
        assert torch.equal(cast, weight.new_empty(0) if parameters == dtype else weight.to(dtype))


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]], ids=str)
def test_frozen_arguments_of_linear(device, guarded, wanted):
    x, weight, bias = layer_arguments("linear", 9, 16, 24, torch.bfloat16, torch.float32, device)
    grad, cast = random(9, 24, dtype=torch.bfloat16, device=device), weight.bfloat16()
    with guarded():
        every = launch("linear_backward", grad, x, cast, bias, torch.float32, [True] * 3)
        some = launch("linear_backward", grad, x, cast, bias, torch.float32, wanted)
    for a, b, want in zip(every, some, wanted, strict=True):
        assert torch.equal(a, b) if want else b.shape == (0,)


@pytest.mark.parametrize("number", range(5))
def test_frozen_arguments_of_mlp(device, guarded, number):
    wanted = [i == number for i in range(5)]
    arguments = layer_arguments("mlp", 9, 16, 24, torch.bfloat16, torch.bfloat16, device)
    grad = random(9, 16, dtype=torch.bfloat16, device=device)
    with guarded():
        _, hidden, activation, *_ = launch("mlp", *arguments)
        kept = (grad, arguments[0], hidden, activation, *arguments[1:], torch.bfloat16, torch.bfloat16)
        every, some = (launch("mlp_backward", *kept, want) for want in ([True] * 5, wanted))
    for a, b, want in zip(every, some, wanted, strict=True):
        assert torch.equal(a, b) if want else b.shape == (0,)


@each_dtype
def test_gelu_over_its_whole_range(device, guarded, dtype):
    from stmae.kernels.mlp import gelu, gelu_backward

    extremes = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 80.0, -80.0, 6e4, -6e4])
    h = torch.cat([torch.linspace(-12, 12, 4000), extremes]).to(dtype).view(8, 501).to(device)
    grad = torch.ones_like(h)
    leaf = h.double().requires_grad_()
    (exact,) = torch.autograd.grad(torch.nn.functional.gelu(leaf), leaf, grad.double())
    with guarded():
        result, sums = gelu_backward(h, grad, torch.float32)
    # Phi is off by a few 2^-24. The result is rounded to its dtype, the sums are taken before.
    assert ((result - exact).abs() <= 5e-7 + torch.finfo(dtype).eps / 2 * exact.abs()).all()
    assert ((sums - exact.sum(0)).abs() <= 8 * 5e-7).all()
    with guarded():
        result, exact = gelu(h), torch.nn.functional.gelu(h.double())
    assert ((result - exact).abs() <= 5e-7 * h.abs().clamp(max=12) + torch.finfo(dtype).eps / 2 * exact.abs()).all()
    with guarded():
        nan = torch.full_like(h, float("nan"))
        result, _ = gelu_backward(nan, grad, None)
        assert result.isnan().all() and gelu(nan).isnan().all()


def test_a_residual_branch_with_its_gradients(device, guarded):
    """Norm, product, norm and MLP through the public functions under autocast: what a block does around its attention."""
    x = random(2, 37, 48, device=device)
    shapes = [(48,), (48,), (48, 48), (48,), (48,), (48,), (96, 48), (96,), (48, 96), (48,)]
    parameters = [random(*shape, device=device) / (len(shape) * 3) for shape in shapes]
    grad = random(2, 37, 48, device=device)

    def block(module, x, parameters):
        w1, b1, w, b, w2, b2, *rest = parameters
        x, normal = module.add_layer_norm(x, None, w1, b1)
        x, normal = module.add_layer_norm(x, module.linear(normal, w, b), w2, b2)
        return module.add_layer_norm(x, module.mlp(normal, *rest), w1, b1)[1].float()

    def run(module, dtype, autocast):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            out = block(module, leaves[0], leaves[1:])
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    plain, exact = run(reference, torch.float32, True), run(reference, torch.float64, False)
    with guarded(), on_gpu_entry(device):
        kernel = run(ops, torch.float32, True)
    assert_all(["out", "grad_x", *(f"grad {number}" for number in range(10))], plain, exact, kernel)


# what holds for all


def far(x):
    """x with its first two dimensions so far apart that the third entry of the one and the fifth of the other lie 2^31 elements
    on, by strides that themselves fit 32 bits. Memory that is never touched is never there."""
    inner = x[0, 0].numel()
    gap = (2**30 + inner, 2**29 + inner)  # no two entries overlap: where b * 2^30 + n * 2^29 agree, b + n does not
    storage = torch.empty(sum((n - 1) * s for n, s in zip(x.shape[:2], gap)) + inner, dtype=x.dtype, device=x.device)
    y = storage.as_strided(x.shape, (*gap, *x[0, 0].contiguous().stride()))
    return y.copy_(x)


@pytest.mark.parametrize(
    "op", ["gather_tokens", "restore_tokens", "attention", "masked_patchify", "patch_loss", "add_layer_norm"]
)
def test_offsets_beyond_32_bits(device, guarded, op, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    keep, _ = (ids.flip(1).contiguous() for ids in masks(3, 6, 5, device))
    x, tokens, position = (random(*shape, dtype=torch.bfloat16) for shape in ((3, 6, 16), (3, 5, 16), (6, 16)))
    if op == "gather_tokens":
        call = lambda x, grad: (launch(op, x, keep), launch("gather_tokens_backward", grad, keep, 6))  # noqa: E731
        near = (x, tokens)
    elif op == "restore_tokens":
        call = lambda tokens, grad: (  # noqa: E731
            launch(op, tokens, keep, position[0].to(device), position.to(device)),
            *launch("restore_tokens_backward", grad, keep, torch.bfloat16),
        )
        near = (tokens, x)
    elif op == "attention":

        def call(qkv, grad):
            out, lse = launch("attention_qkvpacked", qkv, 0.3)
            return out, launch("attention_qkvpacked_backward", grad, qkv, out, lse, 0.3)

        near = (random(3, 5, 3, 1, 16, dtype=torch.bfloat16), random(3, 5, 1, 16, dtype=torch.bfloat16))
    elif op == "add_layer_norm":  # rows far apart

        def call(x, branch):
            x, branch = x.squeeze(1), branch.squeeze(1)
            sum, out, mean, rstd = launch(op, x, branch, position[0].to(device), position[1].to(device), 1e-6, torch.bfloat16)
            return sum, out, *launch("add_layer_norm_backward", branch, x, x, mean, rstd, position[0].to(device), x.dtype)

        near = (random(3, 1, 16, dtype=torch.bfloat16), random(3, 1, 16, dtype=torch.bfloat16))
    else:  # clips and colours far apart, then clips and frames
        near = tuple(torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((3, 5, 6, 4, 4), (3, 6, 4, 4, 3)))
        weights = [random(16, C, 1, 4, 4, dtype=torch.bfloat16).to(device) for C in (5, 3)]
        grad, preds = random(3, 5, 16).to(device), [random(3, 5, 16 * C).to(device) for C in (5, 3)]

        def call(planar, channels_last):
            results = []
            for video, weight, pred in zip((planar, channels_last.permute(0, 4, 1, 2, 3)), weights, preds):
                constants = ([0.5] * video.shape[1], [0.2] * video.shape[1])
                if op == "masked_patchify":
                    results.append(launch(op, video, keep, weight, None, None, *constants))
                    results.append(launch("masked_patchify_backward", grad, video, keep, weight, None, None, *constants)[0])
                else:
                    shapes = [1, 4, 4], list(range(6))
                    loss, mean, rstd = launch(op, pred, video, keep, *shapes, True, *constants)
                    results += [loss, launch("patch_loss_backward", loss, pred, video, keep, mean, rstd, *shapes, *constants)]
            return results

    near = tuple(y.to(device) for y in near)
    with guarded():
        results = call(*(far(y) for y in near))
    for a, b in zip(results, call(*near), strict=True):
        assert torch.equal(a, b)


def test_empty(device, guarded):
    for B, K in ((0, 3), (2, 0)):
        ids = torch.zeros(B, K, dtype=torch.int64, device=device)
        tokens, position = random(B, K, 16, device=device), random(9, 16, device=device)
        assert launch("gather_tokens", random(B, 9, 16, device=device), ids).shape == (B, K, 16)
        assert (launch("gather_tokens_backward", tokens, ids, 9) == 0).all()
        out = launch("restore_tokens", tokens, ids, position[0], position)
        grads = launch("restore_tokens_backward", out, ids, torch.float32)
        assert [x.shape for x in (out, *grads)] == [(B, 9, 16), (B, K, 16), (16,), (9, 16)]
        assert all(x.isfinite().all() for x in grads)
        video = torch.zeros(B, 1, 1, 12, 12, dtype=torch.uint8, device=device)
        weight = random(16, 1, 1, 4, 4, device=device)
        rows = launch("masked_patchify", video, ids, weight, None, position, [0.5], [0.2])
        grads = launch("masked_patchify_backward", rows, video, ids, weight, position[0], position, [0.5], [0.2])
        assert rows.shape == (B, K, 16) and all((x == 0).all() for x in grads)
        losses = launch("patch_loss", tokens, video, ids, [1, 4, 4], [0], True, [0.5], [0.2])
        assert all(x.shape == (B, K) for x in losses)
        qkv = random(B, K, 3, 2, 8, device=device)
        out, lse = launch("attention_qkvpacked", qkv, 1.0)
        assert launch("attention_qkvpacked_backward", out, qkv, out, lse, 1.0).shape == qkv.shape
    for rows, D in ((0, 16), (2, 0)):
        x, weight = random(rows, D, device=device), random(D, device=device)
        sum, out, mean, rstd = launch("add_layer_norm", x, x, weight, weight, 1e-6, torch.bfloat16)
        assert sum.shape == out.shape == x.shape and out.dtype == torch.bfloat16
        grads = launch("add_layer_norm_backward", sum, out, sum, mean, rstd, weight, torch.float32)
        assert [g.shape for g in grads] == [x.shape, (0,), (D,), (D,)] and all((g == 0).all() for g in grads)
    for rows, F in ((0, 16), (2, 0)):
        arguments = layer_arguments("mlp", rows, 8, F, torch.bfloat16, torch.float32, device)
        out, hidden, activation, *casts = launch("mlp", *arguments)
        assert out.shape == (rows, 8) and out.isfinite().all()
        _, fc1, fc1_bias, fc2, fc2_bias = arguments
        weights = casts[0], fc1_bias, casts[1], fc2_bias
        dtypes = torch.float32, torch.float32
        grads = launch("mlp_backward", out, arguments[0], hidden, activation, *weights, *dtypes, [True] * 5)
        assert [g.shape for g in grads] == [x.shape for x in arguments]
        assert all((g == 0).all() for g in grads[:4])


@pytest.mark.parametrize("op", ["masked_patchify", "restore_tokens", "attention", "add_layer_norm", "mlp"])
def test_same_bits_every_time(device, guarded, op):
    keep, _ = masks(3, 96, 40, device)

    def run():
        if op == "attention":
            qkv = random(1, 45, 3, 1, 32, dtype=torch.bfloat16, device=device)
            out, lse = launch("attention_qkvpacked", qkv, 0.2)
            return [launch("attention_qkvpacked_backward", out, qkv, out, lse, 0.2)]
        if op == "add_layer_norm":
            x, statistics = random(90, 24, device=device), torch.rand(90, device=device)
            return launch("add_layer_norm_backward", x, x, x, statistics, statistics, x[0], torch.bfloat16)
        if op == "mlp":
            arguments = layer_arguments("mlp", 150, 16, 24, torch.bfloat16, torch.bfloat16, device)
            out, hidden, activation, *_ = launch("mlp", *arguments)
            kinds = torch.bfloat16, torch.bfloat16
            return launch("mlp_backward", out, arguments[0], hidden, activation, *arguments[1:], *kinds, [True] * 5)
        grad = random(3, 96 if op == "restore_tokens" else 40, 24, device=device)
        if op == "restore_tokens":
            return launch("restore_tokens_backward", grad, keep, torch.float32)
        video = video_of("planar", torch.uint8, (3, 1, 6, 16, 16), device)
        weight, position = random(24, 1, 1, 4, 4, device=device), random(96, 24, device=device)
        return launch("masked_patchify_backward", grad, video, keep, weight, position[0], position, [0.5], [0.2])

    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run())
    assert all(torch.equal(a, b) for a, b in zip(*results))
