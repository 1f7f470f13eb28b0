"""masked_patchify: the product and its gradients against float64, for every layout of the video, dtype and odd size."""

import itertools

import pytest
import torch

from stmae import ops, reference
from tests.support.exact import pixels
from tests.support.tolerance import assert_as_good_as

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)]  # of weight and bias, of position
RGB = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def one_thread(threads):  # the tensors are so small that threads would mostly wait; test_same_at_any_number_of_threads has more
    threads(1)


def video(B, C, T, H, W, *, dtype=torch.uint8, layout="planar"):
    x = torch.randint(0, 256, (B, C, T, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(H * W + C))
    x = x if dtype == torch.uint8 else pixels(x, 0.45, 0.225).to(dtype)
    if layout == "channels_last":  # [B, T, H, W, C] in memory, as decoders give it
        return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    if layout == "sliced":  # a crop out of every other frame of a larger video
        big = torch.zeros(B, C, 2 * T + 1, H + 5, W + 3, dtype=x.dtype)
        big[:, :, 1::2, 2 : H + 2, 1 : W + 1] = x
        return big[:, :, 1::2, 2 : H + 2, 1 : W + 1]
    if layout == "flipped":  # rows and columns the other way round in memory
        return x.transpose(3, 4).contiguous().transpose(3, 4)
    return x


def tensors(clip, K, D, patch, dtypes=(F32, F32)):
    B, C, T, H, W = clip.shape
    N = T // patch[0] * (H // patch[1]) * (W // patch[2])
    generator = torch.Generator().manual_seed(N * 100 + D)
    keep = torch.rand(B, N, generator=generator).argsort(1)[:, :K]
    weight = torch.randn(D, C, *patch, generator=generator) / (C * patch[0] * patch[1] * patch[2]) ** 0.5
    bias, position = torch.randn(D, generator=generator), torch.randn(N, D, generator=generator)
    return keep, weight.to(dtypes[0]), bias.to(dtypes[0]), position.to(dtypes[1])


def run(function, clip, keep, weight, bias, position, **options):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (weight, bias, position)]
    out = function(clip, keep, *leaves, **options)
    # The same upstream for all precisions: values that bfloat16 holds.
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(BF16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], upstream)]


def check(clip, keep, weight, bias, position, **options):
    plain = run(reference.masked_patchify, clip, keep, weight, bias, position, **options)
    wide = [None if x is None else x.double() for x in (weight, bias, position)]
    exact = run(reference.masked_patchify, pixels(clip, options.get("mean", 0.45), options.get("std", 0.225)), keep, *wide)
    kernel = run(ops.masked_patchify, clip, keep, weight, bias, position, **options)
    given = dict(grad_weight=weight, grad_bias=bias, grad_position=position)
    names = ["out", *(name for name, x in given.items() if x is not None)]
    assert len(plain) == len(exact) == len(kernel) == len(names)
    for name, p, e, k in zip(names, plain, exact, kernel):
        assert_as_good_as(p, e, k, factor=3 if name.startswith("grad") else 2, name=name)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("layout", ["planar", "channels_last", "sliced", "flipped"])
@pytest.mark.parametrize("pixel", [torch.uint8, F32, BF16], ids=str)
def test_layouts_and_dtypes(pixel, layout, dtypes, capability, nan_filled):
    clip = video(2, 3, 4, 32, 48, dtype=pixel, layout=layout)
    check(clip, *tensors(clip, 7, 24, (2, 16, 16), dtypes))


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize(
    "C,patch,D,K",
    [(1, (1, 5, 7), 13, 4), (4, (2, 4, 3), 17, 6), (3, (2, 14, 14), 40, 5), (3, (1, 1, 17), 1, 3), (5, (1, 3, 3), 33, 12)],
)
def test_odd_sizes_and_channels(C, patch, D, K, dtypes, capability, nan_filled):
    for layout in ("planar", "channels_last"):
        clip = video(3, C, 2 * patch[0], 2 * patch[1], 3 * patch[2], layout=layout)
        check(clip, *tensors(clip, K, D, patch, dtypes))


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_mean_and_std_per_channel(layout, capability):
    clip = video(2, 3, 2, 32, 32, layout=layout)
    check(clip, *tensors(clip, 3, 16, (2, 16, 16)), **RGB)


@pytest.mark.parametrize("bias,position", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_without_bias_or_position(dtype, bias, position, capability):
    clip = video(2, 3, 2, 32, 32)
    keep, w, b, p = tensors(clip, 3, 24, (2, 16, 16), (dtype, dtype))
    check(clip, keep, w, b if bias else None, p if position else None)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_frozen_parameters_get_no_gradient(dtypes):
    clip = video(2, 3, 2, 16, 16)
    keep, *parameters = tensors(clip, 3, 24, (1, 8, 8), dtypes)
    _, *expected = run(ops.masked_patchify, clip, keep, *parameters)
    for wanted in itertools.product([False, True], repeat=3):
        if any(wanted):
            leaves = [x.clone().requires_grad_(want) for x, want in zip(parameters, wanted)]
            out = ops.masked_patchify(clip, keep, *leaves)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(BF16).to(out.dtype))
            for leaf, want, gradient in zip(leaves, wanted, expected):
                assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_more_patches_than_are_gathered_at_once(dtypes, capability):
    clip = video(3, 3, 2, 176, 176)  # 3 * 400 patches: a part of 960, and 240 more; sums over them run across both
    check(clip, *tensors(clip, 400, 10, (2, 8, 8), dtypes))


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_same_at_any_number_of_threads(dtypes, threads):
    clip = video(3, 3, 4, 64, 64)
    arguments = tensors(clip, 25, 72, (2, 8, 8), dtypes)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(ops.masked_patchify, clip, *arguments))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


@pytest.mark.parametrize("B,K", [(0, 2), (2, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_empty_batches(B, K, dtype, capability, nan_filled):
    clip = video(B, 3, 2, 16, 16)
    out, *grads = run(ops.masked_patchify, clip, *tensors(clip, K, 8, (2, 8, 8), (dtype, F32)))
    assert out.shape == (B, K, 8) and all((grad == 0).all() for grad in grads)


def test_only_kept_patches_are_read(capability):
    clip = video(1, 3, 2, 16, 16, dtype=F32)
    keep, *parameters = tensors(clip, 1, 8, (2, 8, 8))
    keep[:] = 2
    expected = ops.masked_patchify(clip, keep, *parameters)
    poisoned = torch.full_like(clip, float("nan"))
    poisoned[:, :, :, 8:, :8] = clip[:, :, :, 8:, :8]
    assert torch.equal(ops.masked_patchify(poisoned, keep, *parameters), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dispatcher_contract(dtype):
    clip = video(2, 3, 2, 16, 16)
    keep, w, b, p = tensors(clip, 3, 8, (2, 8, 8), (dtype, F32))
    options = ([0.45] * 3, [0.225] * 3)
    for bias, position in ((b, p), (None, p), (b, None)):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (w, bias, position)]
        torch.library.opcheck(torch.ops.stmae.masked_patchify.default, (clip, keep, *leaves, *options))
    upstream = torch.randn(2, 3, 8)
    torch.library.opcheck(torch.ops.stmae.masked_patchify_backward.default, (upstream, clip, keep, w, b, p, *options))


def test_compiles_without_graph_breaks():
    clip = video(2, 3, 2, 16, 16)
    arguments = tensors(clip, 3, 8, (2, 8, 8))
    compiled = torch.compile(ops.masked_patchify, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, clip, *arguments), run(ops.masked_patchify, clip, *arguments)):
        assert torch.equal(x, y)


def test_autocast_multiplies_in_bfloat16():
    clip = video(2, 3, 2, 16, 16)
    keep, w, b, p = tensors(clip, 3, 8, (2, 8, 8))
    with torch.autocast("cpu", BF16):
        out, grad_weight, grad_bias, grad_position = run(ops.masked_patchify, clip, keep, w, b, p)
    expected = run(ops.masked_patchify, clip, keep, w.to(BF16), b.to(BF16), p)
    assert out.dtype == F32 and torch.equal(out, expected[0])
    assert grad_weight.dtype == F32 and torch.equal(grad_weight, expected[1].float())
    assert torch.equal(grad_position, expected[3])


def test_double_backward_is_refused():
    clip = video(2, 3, 2, 16, 16)
    keep, w, b, p = tensors(clip, 3, 8, (2, 8, 8))
    out = ops.masked_patchify(clip, keep, w.requires_grad_(), b, p)
    (grad,) = torch.autograd.grad(out, w, torch.randn(2, 3, 8, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="masked_patchify: double backward is not supported"):
        grad.sum().backward()


CLIP = torch.zeros(2, 3, 2, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(video=CLIP[0]), r"masked_patchify: expected video \[B, C, T, H, W\] .*got \[3, 2, 16, 16\] uint8"),
        (dict(video=CLIP.double()), r"masked_patchify: expected video .*got \[2, 3, 2, 16, 16\] float64"),
        (dict(video=CLIP.float().requires_grad_()), r"masked_patchify: expected a video that needs no gradient"),
        (dict(video=CLIP[:, :2]), r"masked_patchify: expected weight \[D, C, pt, ph, pw\] .*here \[\*, 2, \*, \*, \*\]"),
        (dict(video=CLIP[..., :12]), r"masked_patchify: expected frames, height and width that are multiples .* \(2, 8, 8\)"),
        (dict(video=CLIP[:, :, :1]), r"masked_patchify: expected frames, height and width that are multiples of the patch"),
        (dict(video=CLIP.to("meta")), r"masked_patchify: expected all tensors on one device"),
        (dict(keep=torch.zeros(1, 2, dtype=torch.int64)), r"masked_patchify: expected keep \[B, K\] int64 .*got \[1, 2\]"),
        (dict(keep=torch.zeros(2, 2)), r"masked_patchify: expected keep .*int64.*got \[2, 2\] float32"),
        (dict(keep=torch.zeros(2, 5, dtype=torch.int64)), r"masked_patchify: expected keep with at most 4 tokens"),
        (dict(weight=torch.zeros(8, 192)), r"masked_patchify: expected weight .*got \[8, 192\] float32"),
        (dict(weight=torch.zeros(8, 3, 2, 8, 8).double()), r"masked_patchify: expected weight .*float64"),
        (dict(bias=torch.zeros(7)), r"masked_patchify: expected bias \[D\] .*here \[8\].*got \[7\]"),
        (dict(position=torch.zeros(5, 8)), r"masked_patchify: expected position \[N, D\] .*here \[4, 8\].*got \[5, 8\]"),
        (dict(mean=[0.4, 0.5]), r"masked_patchify: expected mean a finite number or one per channel \(3\), got \[0\."),
        (dict(std=[0.2, 0.2, -0.1]), r"masked_patchify: expected std above 0"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(
        video=CLIP,
        keep=torch.arange(2).repeat(2, 1),
        weight=torch.zeros(8, 3, 2, 8, 8),
        bias=torch.zeros(8),
        position=torch.zeros(4, 8),
    )
    with pytest.raises(ValueError, match=message):
        ops.masked_patchify(**{**arguments, **change})


@pytest.mark.parametrize(
    "keep,message",
    [
        ([[0, 1], [3, 4]], r"masked_patchify: expected keep in \[0, 4\), got 4 at \[1, 1\]"),
        ([[0, -1], [3, 4]], r"masked_patchify: expected keep in \[0, 4\), got -1 at \[0, 1\]"),
        ([[0, 1], [3, 3]], r"masked_patchify: expected keep without repeats in a row, got 3 at \[1, 1\]"),
    ],
)
def test_wrong_ids(keep, message):
    with pytest.raises(RuntimeError, match=message):
        ops.masked_patchify(CLIP, torch.tensor(keep), torch.zeros(8, 3, 2, 8, 8), None, None)
