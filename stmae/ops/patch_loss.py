from collections.abc import Sequence

import torch

from . import checks, library


def patch_loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    *,
    patch_size: Sequence[int],
    frames: Sequence[int] | None = None,
    normalize: bool | str = True,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
    reduction: str = "mean",
) -> torch.Tensor:
    """Mean squared error of predicted patches against the video's, which are read inside the kernel and never stored.

    For each masked token, target = the P pixels of its patch in the order (frame, row, column, channel); normalised,
    (target - m) / sqrt(var + 1e-6) with the patch's own mean m and unbiased variance (MAE-ST, section 3.2), or, by channel,
    (target - m) / (sqrt(var) + 1e-6) with those of each channel of the patch (VideoMAE).

    Args:
        pred: [B, M, P] float32 or bfloat16, dense in the last dimension; P = u * ph * pw * C.
        video: [B, C, T, H, W], any strides. uint8 is normalised, (x / 255 - mean) / std; floating is taken as it is.
        masked: [B, M] int64 in [0, N), the tokens that were predicted, no id twice in a row.
        patch_size: (u, ph, pw), the frames, rows and columns that one prediction covers.
        frames: which frames of the video are predicted, in order; None for all. Their number over u is the grid's t.
        normalize: True or "patch": each target patch is normalised; "channel": each channel of it; False: neither.
        mean, std: one number or one per channel, as for `masked_patchify`.
        reduction: "mean" over all patches, or "none".

    Returns:
        float32, a scalar (0 for an empty batch), or [B, M] with reduction="none".

    Raises:
        ValueError: wrong shape, dtype, device or stride, a frame that is not there, a size that is no multiple of the patch.
        RuntimeError: an id out of range or repeated (on CPUs; see STMAE_DEBUG for GPUs).
    """
    op = "patch_loss"
    checks.video(op, video)
    B, C, T, H, W = video.shape
    patch_size = checks.integers(op, "patch_size", patch_size, 3)
    frames = list(range(T)) if frames is None else checks.integers(op, "frames", frames)
    if any(not 0 <= i < T for i in frames):
        raise ValueError(f"{op}: expected frames in [0, {T}), got {frames}")
    N = checks.grid_tokens(op, (len(frames), H, W), patch_size)
    P = patch_size[0] * patch_size[1] * patch_size[2] * C
    if not isinstance(normalize, bool) and normalize not in ("patch", "channel"):
        raise ValueError(f"{op}: expected normalize True, False, 'patch' or 'channel', got {normalize!r}")
    by_channel = normalize == "channel"
    if normalize and P // (C if by_channel else 1) < 2:
        raise ValueError(f"{op}: expected at least 2 values to normalise, got {P // (C if by_channel else 1)}")
    checks.tensor(op, "pred", pred, "[B, M, P]", (B, None, P))
    checks.rows(op, "pred", pred)
    checks.ids(op, "masked", masked, B, N)
    checks.tensor(op, "masked", masked, "[B, M]", (B, pred.shape[1]), (torch.int64,))
    checks.same_device(op, pred=pred, video=video, masked=masked)
    if reduction not in ("mean", "none"):
        raise ValueError(f"{op}: expected reduction 'mean' or 'none', got {reduction!r}")
    mean, std = checks.channels(op, "mean", mean, C), checks.channels(op, "std", std, C)
    loss = _op(pred, video, masked.contiguous(), patch_size, frames, 2 if by_channel else int(bool(normalize)), mean, std)[0]
    return loss if reduction == "none" else loss.sum() / max(1, loss.numel())


def _fake(pred, video, masked, patch_size, frames, normalize, mean, std):
    statistics = (*masked.shape, video.shape[1]) if normalize == 2 else masked.shape
    return tuple(pred.new_empty(shape, dtype=torch.float32) for shape in (masked.shape, statistics, statistics))


def _backward_fake(grad_loss, pred, video, masked, patch_mean, patch_rstd, patch_size, frames, mean, std):
    return pred.new_empty(pred.shape)


def _setup_context(ctx, inputs, output):
    pred, video, masked, ctx.patch_size, ctx.frames, _, ctx.mean, ctx.std = inputs
    loss, patch_mean, patch_rstd = output
    ctx.save_for_backward(pred, video, masked, patch_mean, patch_rstd)
    ctx.mark_non_differentiable(patch_mean, patch_rstd)


def _backward(ctx, grad_loss, *_):
    grad_pred = _backward_op(grad_loss.contiguous(), *ctx.saved_tensors, ctx.patch_size, ctx.frames, ctx.mean, ctx.std)
    return grad_pred, None, None, None, None, None, None, None


_op = library.define(
    "patch_loss",
    "(Tensor pred, Tensor video, Tensor masked, int[] patch_size, int[] frames, int normalize, float[] mean, float[] std)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels="patch_loss",
)
_backward_op = library.define(
    "patch_loss_backward",
    "(Tensor grad_loss, Tensor pred, Tensor video, Tensor masked, Tensor patch_mean, Tensor patch_rstd, int[] patch_size,"
    " int[] frames, float[] mean, float[] std) -> Tensor",
    fake=_backward_fake,
    kernels="patch_loss",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
