"""patch_loss: loss and gradient against float64, for every layout of the video that a decoder or a transform may leave."""

import pytest
import torch

from stmae import ops, reference
from stmae.reference.patch_loss import patchify
from tests.support.exact import pixels
from tests.support.tolerance import assert_as_good_as

F32, BF16 = torch.float32, torch.bfloat16
RGB = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def one_thread(threads):  # the tensors are so small that threads would mostly wait; test_same_at_any_number_of_threads has more
    threads(1)


def video(B, C, T, H, W, *, dtype=torch.uint8, layout="planar"):
    x = torch.randint(0, 256, (B, C, T, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(H * W + C))
    x = x if dtype == torch.uint8 else pixels(x, 0.45, 0.225).to(dtype)
    if layout == "channels_last":  # [B, T, H, W, C] in memory
        return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    if layout == "sliced":  # a crop out of every other frame of a larger video
        big = torch.zeros(B, C, 2 * T + 1, H + 5, W + 3, dtype=x.dtype)
        big[:, :, 1::2, 2 : H + 2, 1 : W + 1] = x
        return big[:, :, 1::2, 2 : H + 2, 1 : W + 1]
    if layout == "transposed":  # rows and columns the other way round in memory
        return x.transpose(3, 4).contiguous().transpose(3, 4)
    return x


def tensors(clip, patch_size, frames=None, *, dtype=F32, fraction=0.6):
    B, C, T, H, W = clip.shape
    u, p, q = patch_size
    N = (T if frames is None else len(frames)) // u * (H // p) * (W // q)
    generator = torch.Generator().manual_seed(N)
    masked = torch.rand(B, N, generator=generator).argsort(1)[:, : int(N * fraction)].sort(1).values
    return torch.randn(B, masked.shape[1], u * p * q * C, generator=generator).to(dtype), masked


def exact_loss(pred, clip, masked, *, patch_size, frames=None, normalize=True, mean=0.45, std=0.225, reduction="mean"):
    clip = pixels(clip, mean, std)
    clip = clip if frames is None else clip[:, :, list(frames)]
    target = reference.gather_tokens(patchify(clip, patch_size), masked)
    if normalize == "channel":
        target = target.unflatten(-1, (-1, clip.shape[1]))
        target = ((target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True).sqrt() + 1e-6)).flatten(-2)
    elif normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = (pred - target).square().mean(-1)
    return loss if reduction == "none" else loss.sum() / max(1, loss.numel())


def run(function, pred, *arguments, **options):
    pred = pred.detach().clone().requires_grad_()
    loss = function(pred, *arguments, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0)).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, pred, upstream)


def check(pred, clip, masked, **options):
    for reduction in ("mean", "none"):
        plain = run(reference.patch_loss, pred, clip, masked, reduction=reduction, **options)
        # Upstream in both is float32's: the generator draws float32 and the exact loss widens it.
        exact = run(exact_loss, pred.double(), clip, masked, reduction=reduction, **options)
        kernel = run(ops.patch_loss, pred, clip, masked, reduction=reduction, **options)
        for name, p, e, k in zip(("loss", "grad_pred"), plain, exact, kernel):
            assert_as_good_as(p, e, k, name=f"{name}, {reduction}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("pixel", [torch.uint8, F32, BF16], ids=str)
def test_layouts_and_dtypes(pixel, layout, dtype, capability, nan_filled):
    clip = video(2, 3, 4, 32, 48, dtype=pixel, layout=layout)
    check(*_with(clip, (1, 16, 16), [0, 1, 3], dtype=dtype), patch_size=(1, 16, 16), frames=[0, 1, 3])


def _with(clip, patch_size, frames=None, **options):
    pred, masked = tensors(clip, patch_size, frames, **options)
    return pred, clip, masked


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("patch_size", [(1, 5, 7), (2, 4, 3), (1, 14, 14), (2, 16, 16), (1, 1, 17)], ids=str)
def test_odd_sizes_and_channels(patch_size, layout, channels, capability):
    u, p, q = patch_size
    clip = video(2, channels, 2 * u, 2 * p, 3 * q, layout=layout)
    check(*_with(clip, patch_size), patch_size=patch_size)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9, 17])
@pytest.mark.parametrize("patch_size", [(1, 5, 7), (2, 4, 3), (2, 16, 16), (1, 1, 17)], ids=str)
def test_statistics_by_channel(patch_size, channels, dtype, capability, nan_filled):
    u, p, q = patch_size
    clip = video(2, channels, 2 * u, 2 * p, 3 * q)
    check(*_with(clip, patch_size, dtype=dtype), patch_size=patch_size, normalize="channel", mean=0.0, std=1.0)


@pytest.mark.parametrize("normalize", [True, False, "patch", "channel"])
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_mean_and_std_per_channel(layout, normalize, capability):
    clip = video(2, 3, 4, 32, 32, layout=layout)
    check(*_with(clip, (2, 16, 16)), patch_size=(2, 16, 16), normalize=normalize, **RGB)


LINSPACE, EVERY_OTHER = torch.linspace(0, 15, 8).long().tolist(), list(range(0, 16, 2))


@pytest.mark.parametrize("frames", [LINSPACE, EVERY_OTHER, [7, 3, 3, 0], [15, 0]], ids=str)
def test_frames(frames):
    clip = video(1, 3, 16, 16, 32)
    check(*_with(clip, (1, 8, 8), frames), patch_size=(1, 8, 8), frames=frames)
    check(*_with(clip, (2, 8, 8), frames), patch_size=(2, 8, 8), frames=torch.tensor(frames))


def test_the_target_ends_at_frame_15_or_14():
    """mae_st's linspace and SlowFast's ::2 differ in the last frame alone: no loss may confuse them."""
    clip, pred = video(1, 3, 16, 16, 16), torch.zeros(1, 8, 768)
    ids, size = torch.arange(8).unsqueeze(0), (1, 16, 16)
    options = dict(patch_size=size, normalize=False, reduction="none")
    losses = [ops.patch_loss(pred, clip, ids, frames=frames, **options) for frames in (LINSPACE, EVERY_OTHER)]
    assert torch.equal(losses[0][:, 0], losses[1][:, 0]) and not torch.equal(losses[0][:, 7], losses[1][:, 7])


def test_constant_patches_and_perfect_predictions(capability):
    clip = torch.full((1, 3, 2, 16, 16), 77, dtype=torch.uint8)
    ids = torch.arange(2).unsqueeze(0)
    loss = ops.patch_loss(torch.zeros(1, 2, 768), clip, ids, patch_size=(1, 16, 16), reduction="none")
    assert (loss < 1e-6).all()  # no variance: a target of zero, not the rounding of a mean blown up a thousandfold
    clip = video(1, 3, 2, 32, 32)
    ids = torch.arange(8).unsqueeze(0)
    target = patchify(pixels(clip, 0.45, 0.225), (1, 16, 16))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    assert ops.patch_loss(target.float(), clip, ids, patch_size=(1, 16, 16)) < 1e-12


def test_strided_predictions(capability):
    clip = video(2, 3, 2, 16, 16)
    pred, masked = tensors(clip, (1, 8, 8))
    wide = torch.zeros(pred.shape[1], 2, 200)
    wide[:, :, 3:195] = pred.transpose(0, 1)
    check(wide[:, :, 3:195].transpose(0, 1), clip, masked, patch_size=(1, 8, 8))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_at_any_number_of_threads(dtype, threads):
    clip = video(3, 3, 4, 96, 96)
    pred, masked = tensors(clip, (1, 16, 16), dtype=dtype)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(ops.patch_loss, pred, clip, masked, patch_size=(1, 16, 16), reduction="none"))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


@pytest.mark.parametrize("B,M", [(0, 3), (2, 0)])
def test_empty_batches(B, M, capability):
    clip = video(B, 3, 2, 16, 16)
    pred = torch.zeros(B, M, 192, requires_grad=True)
    masked = torch.zeros(B, M, dtype=torch.int64)
    loss = ops.patch_loss(pred, clip, masked, patch_size=(1, 8, 8))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, pred)[0].shape == (B, M, 192)
    assert ops.patch_loss(pred, clip, masked, patch_size=(1, 8, 8), reduction="none").shape == (B, M)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dispatcher_contract(dtype):
    clip = video(2, 3, 2, 16, 16)
    pred, masked = tensors(clip, (1, 8, 8), dtype=dtype)
    options = ([1, 8, 8], [0, 1], True, [0.45] * 3, [0.225] * 3)
    torch.library.opcheck(torch.ops.stmae.patch_loss.default, (pred.requires_grad_(), clip, masked, *options))
    loss, mean, rstd = torch.ops.stmae.patch_loss(pred.detach(), clip, masked, *options)
    torch.library.opcheck(
        torch.ops.stmae.patch_loss_backward.default,
        (loss, pred.detach(), clip, masked, mean, rstd, options[0], options[1], options[3], options[4]),
    )


def test_compiles_without_graph_breaks():
    clip = video(2, 3, 2, 16, 16)
    pred, masked = tensors(clip, (1, 8, 8))

    def loss(pred, clip, masked):
        return ops.patch_loss(pred, clip, masked, patch_size=(1, 8, 8))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(run(compiled, pred, clip, masked), run(loss, pred, clip, masked)))


def test_the_loss_is_float32_under_autocast():
    clip = video(2, 3, 2, 16, 16)
    pred, masked = tensors(clip, (1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.patch_loss(pred, clip, masked, patch_size=(1, 8, 8))
    assert loss.dtype == F32 and torch.equal(loss, ops.patch_loss(pred, clip, masked, patch_size=(1, 8, 8)))


def test_double_backward_is_refused():
    clip = video(2, 3, 2, 16, 16)
    pred, masked = tensors(clip, (1, 8, 8))
    loss = ops.patch_loss(pred.requires_grad_(), clip, masked, patch_size=(1, 8, 8))
    (grad,) = torch.autograd.grad(loss, pred, torch.ones((), requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="patch_loss: double backward is not supported"):
        grad.sum().backward()


CLIP = torch.zeros(2, 3, 2, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(pred=torch.zeros(2, 4, 191)), r"patch_loss: expected pred \[B, M, P\] .*here \[2, \*, 192\].*got \[2, 4, 191\]"),
        (dict(pred=torch.zeros(2, 4, 192).double()), r"patch_loss: expected pred .*got \[2, 4, 192\] float64"),
        (dict(pred=torch.zeros(2, 192, 4).transpose(1, 2)), r"patch_loss: expected pred with a contiguous last dimension"),
        (dict(video=CLIP[0]), r"patch_loss: expected video \[B, C, T, H, W\] .*got \[3, 2, 16, 16\] uint8"),
        (dict(video=CLIP.int()), r"patch_loss: expected video .*got \[2, 3, 2, 16, 16\] int32"),
        (dict(video=CLIP.float().requires_grad_()), r"patch_loss: expected a video that needs no gradient"),
        (dict(video=CLIP[..., :15]), r"patch_loss: expected frames, height and width that are multiples of the patch"),
        (dict(video=CLIP.to("meta")), r"patch_loss: expected all tensors on one device"),
        (dict(masked=torch.zeros(2, 3, dtype=torch.int64)), r"patch_loss: expected masked \[B, M\] int64 .*got \[2, 3\]"),
        (dict(masked=torch.zeros(2, 4)), r"patch_loss: expected masked .*int64.*got \[2, 4\] float32"),
        (dict(masked=torch.zeros(2, 9, dtype=torch.int64)), r"patch_loss: expected masked with at most 8 tokens"),
        (dict(patch_size=(8, 8)), r"patch_loss: expected patch_size to be 3 integers, got \(8, 8\)"),
        (dict(patch_size=(1, 0, 8)), r"patch_loss: expected .*multiples of the patch"),
        (dict(frames=[0, 2]), r"patch_loss: expected frames in \[0, 2\), got \[0, 2\]"),
        (dict(frames=[-1, 0]), r"patch_loss: expected frames in \[0, 2\), got \[-1, 0\]"),
        (dict(mean=[0.5, 0.5]), r"patch_loss: expected mean a finite number or one per channel \(3\), got \[0\."),
        (dict(std=0.0), r"patch_loss: expected std above 0"),
        (dict(reduction="sum"), r"patch_loss: expected reduction 'mean' or 'none', got 'sum'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(pred=torch.zeros(2, 4, 192), video=CLIP, masked=torch.arange(4).repeat(2, 1), patch_size=(1, 8, 8))
    with pytest.raises(ValueError, match=message):
        ops.patch_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    "masked,message",
    [
        ([[0, 1], [3, 8]], r"patch_loss: expected masked in \[0, 8\), got 8 at \[1, 1\]"),
        ([[0, 1], [-5, 8]], r"patch_loss: expected masked in \[0, 8\), got -5 at \[1, 0\]"),
        ([[2, 2], [3, 4]], r"patch_loss: expected masked without repeats in a row, got 2 at \[0, 1\]"),
    ],
)
def test_wrong_ids(masked, message):
    with pytest.raises(RuntimeError, match=message):
        ops.patch_loss(torch.zeros(2, 2, 192), CLIP, torch.tensor(masked), patch_size=(1, 8, 8))
