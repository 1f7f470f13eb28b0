from collections.abc import Sequence

import torch

from . import checks, library


def patch_loss_varlen(
    pred: torch.Tensor,
    videos: Sequence[torch.Tensor],
    masked: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    patch_size: Sequence[int],
    frames: Sequence[Sequence[int]] | None = None,
    normalize: bool | str = True,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
    reduction: str = "mean",
) -> torch.Tensor:
    """`patch_loss` of videos of any lengths and sizes. Tokens are numbered through all videos, as for `masked_patchify_varlen`.

    Args:
        pred: [sum M, P] float32 or bfloat16, dense in the last dimension; P = u * ph * pw * C.
        videos: S of [C, T, H, W], each with its own sizes and strides, all of one dtype.
        masked: [sum M] int64, the tokens that were predicted, no id twice: those of the first video, of the second, and so on.
        cu_seqlens: [S + 1] int32 or int64 on masked's device, the offsets of the videos in masked.
        patch_size: (u, ph, pw), the frames, rows and columns that one prediction covers.
        frames: for each video which of its frames are predicted, in order; None for all. Their number over u is the grid's t.
        normalize: True or "patch": each target patch is normalised; "channel": each channel of it; False: neither.
        mean, std: one number or one per channel, as for `masked_patchify`.
        reduction: "mean" over all patches, or "none".

    Returns:
        float32, a scalar (0 for no patches), or [sum M] with reduction="none".

    Raises:
        ValueError: wrong shape, dtype, device or stride, a frame that is not there, a size that is no multiple of the patch.
        RuntimeError: an id out of its video's range or repeated, offsets that do not ascend or have another total (on CPUs; see
            STMAE_DEBUG for GPUs).
    """
    op = "patch_loss_varlen"
    patch_size = checks.integers(op, "patch_size", patch_size, 3)
    videos = checks.videos(op, videos)
    C = videos[0].shape[0]
    frames = [range(video.shape[1]) for video in videos] if frames is None else frames
    if not isinstance(frames, Sequence) or len(frames) != len(videos):
        raise ValueError(f"{op}: expected frames of each video, {len(videos)} in all, got {frames!r}")
    chosen = [checks.integers(op, f"frames[{s}]", own) for s, own in enumerate(frames)]
    for s, (video, own) in enumerate(zip(videos, chosen)):
        if any(not 0 <= i < video.shape[1] for i in own):
            raise ValueError(f"{op}: expected frames[{s}] in [0, {video.shape[1]}), got {own}")
        checks.grid_tokens(op, (len(own), *video.shape[2:]), patch_size)
    P = patch_size[0] * patch_size[1] * patch_size[2] * C
    if not isinstance(normalize, bool) and normalize not in ("patch", "channel"):
        raise ValueError(f"{op}: expected normalize True, False, 'patch' or 'channel', got {normalize!r}")
    by_channel = normalize == "channel"
    if normalize and P // (C if by_channel else 1) < 2:
        raise ValueError(f"{op}: expected at least 2 values to normalise, got {P // (C if by_channel else 1)}")
    checks.tensor(op, "pred", pred, "[sum M, P]", (None, P))
    checks.rows(op, "pred", pred)
    checks.tensor(op, "masked", masked, "[sum M]", (pred.shape[0],), (torch.int64,))
    checks.offsets(op, "cu_seqlens", cu_seqlens, masked.shape[0], "masked", len(videos) + 1)
    own_devices = {f"videos[{s}]": video for s, video in enumerate(videos)}
    checks.same_device(op, pred=pred, masked=masked, cu_seqlens=cu_seqlens, **own_devices)
    if reduction not in ("mean", "none"):
        raise ValueError(f"{op}: expected reduction 'mean' or 'none', got {reduction!r}")
    mean, std = checks.channels(op, "mean", mean, C), checks.channels(op, "std", std, C)
    all_frames, counts = [i for own in chosen for i in own], [len(own) for own in chosen]
    kind = 2 if by_channel else int(bool(normalize))
    loss = _op(pred, videos, masked.contiguous(), cu_seqlens, patch_size, all_frames, counts, kind, mean, std)[0]
    return loss if reduction == "none" else loss.sum() / max(1, loss.numel())


def _fake(pred, videos, masked, cu_seqlens, patch_size, frames, frame_counts, normalize, mean, std):
    statistics = (*masked.shape, len(mean)) if normalize == 2 else masked.shape
    return tuple(pred.new_empty(shape, dtype=torch.float32) for shape in (masked.shape, statistics, statistics))


def _backward_fake(
    grad_loss, pred, videos, masked, cu_seqlens, patch_mean, patch_rstd, patch_size, frames, frame_counts, mean, std
):
    return pred.new_empty(pred.shape)


def _setup_context(ctx, inputs, output):
    pred, videos, masked, cu_seqlens, ctx.patch_size, ctx.frames, ctx.frame_counts, _, ctx.mean, ctx.std = inputs
    loss, patch_mean, patch_rstd = output
    ctx.save_for_backward(pred, masked, cu_seqlens, patch_mean, patch_rstd, *videos)
    ctx.mark_non_differentiable(patch_mean, patch_rstd)


def _backward(ctx, grad_loss, *_):
    pred, masked, cu_seqlens, patch_mean, patch_rstd, *videos = ctx.saved_tensors
    constants = ctx.patch_size, ctx.frames, ctx.frame_counts, ctx.mean, ctx.std
    grad_pred = _backward_op(grad_loss.contiguous(), pred, videos, masked, cu_seqlens, patch_mean, patch_rstd, *constants)
    return grad_pred, *(None,) * 9


_op = library.define(
    "patch_loss_varlen",
    "(Tensor pred, Tensor[] videos, Tensor masked, Tensor cu_seqlens, int[] patch_size, int[] frames, int[] frame_counts,"
    " int normalize, float[] mean, float[] std) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels="patch_loss",
)
_backward_op = library.define(
    "patch_loss_varlen_backward",
    "(Tensor grad_loss, Tensor pred, Tensor[] videos, Tensor masked, Tensor cu_seqlens, Tensor patch_mean, Tensor patch_rstd,"
    " int[] patch_size, int[] frames, int[] frame_counts, float[] mean, float[] std) -> Tensor",
    fake=_backward_fake,
    kernels="patch_loss",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
