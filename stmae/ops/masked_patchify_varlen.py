from collections.abc import Sequence

import torch

from . import checks, library


def masked_patchify_varlen(
    videos: Sequence[torch.Tensor],
    keep: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position: torch.Tensor | None,
    *,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
) -> torch.Tensor:
    """`masked_patchify` of videos of any lengths and sizes: their visible patches, embedded, one video after another.

    Tokens are numbered through all videos: patch i of video s is the number of patches of the videos before it, plus i. On CPUs
    the output has the bits of each video by itself.

    Args:
        videos: S of [C, T, H, W], each with its own sizes and strides, all of one dtype: uint8, normalised in the kernel, or
            floating, taken as it is. They get no gradient.
        keep: [sum K] int64 in [0, sum N), no id twice: the visible patches of the first video, those of the second, and so on.
        cu_seqlens: [S + 1] int32 or int64 on keep's device, the offsets of the videos in keep: from 0, ascending, up to sum K.
        weight: [D, C, pt, ph, pw], as of Conv3d. Its dtype (or autocast's) is that of the product; sums are float32.
        bias: [D] or None.
        position: [sum N, D] or None.
        mean, std: one number or one per channel, as for `masked_patchify`.

    Returns:
        [sum K, D] in the dtype that weight and position promote to.

    Raises:
        ValueError: wrong shape, dtype or device, or a frame size that is no multiple of the patch.
        RuntimeError: an id out of its video's range or repeated, offsets that do not ascend or have another total (on CPUs; see
            STMAE_DEBUG for GPUs).
    """
    op = "masked_patchify_varlen"
    checks.tensor(op, "weight", weight, "[D, C, pt, ph, pw]", (None,) * 5)
    D, C, *patch = weight.shape
    videos = checks.videos(op, videos, C)
    N = sum(checks.grid_tokens(op, tuple(video.shape[1:]), patch) for video in videos)
    checks.tensor(op, "keep", keep, "[sum K]", (None,), (torch.int64,))
    checks.offsets(op, "cu_seqlens", cu_seqlens, keep.shape[0], "keep", len(videos) + 1)
    if bias is not None:
        checks.tensor(op, "bias", bias, "[D]", (D,))
    if position is not None:
        checks.tensor(op, "position", position, "[sum N, D]", (N, D))
    own = {f"videos[{s}]": video for s, video in enumerate(videos)}
    checks.same_device(op, keep=keep, cu_seqlens=cu_seqlens, weight=weight, bias=bias, position=position, **own)
    mean, std = checks.channels(op, "mean", mean, C), checks.channels(op, "std", std, C)
    weight, bias = checks.autocast(op, weight, bias)
    if position is not None:
        dtype = torch.promote_types(weight.dtype, position.dtype)
        if dtype not in (weight.dtype, torch.float32):
            weight = weight.to(dtype)
        position = position.to(dtype).contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    return _op(videos, keep.contiguous(), cu_seqlens, weight.contiguous(), bias, position, mean, std)


def _fake(videos, keep, cu_seqlens, weight, bias, position, mean, std):
    return (weight if position is None else position).new_empty(keep.shape[0], weight.shape[0])


def _backward_fake(grad_out, videos, keep, cu_seqlens, weight, bias, position, mean, std):
    return tuple(weight.new_empty(0) if x is None else torch.empty_like(x) for x in (weight, bias, position))


def _setup_context(ctx, inputs, output):
    videos, keep, cu_seqlens, weight, bias, position, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(keep, cu_seqlens, weight, bias, position, *videos)


def _backward(ctx, grad_out):
    keep, cu_seqlens, weight, bias, position, *videos = ctx.saved_tensors
    bias = bias if ctx.needs_input_grad[4] else None  # nothing is computed for what is frozen
    position = position if ctx.needs_input_grad[5] else None
    grad_weight, grad_bias, grad_position = _backward_op(
        grad_out.contiguous(), videos, keep, cu_seqlens, weight, bias, position, ctx.mean, ctx.std
    )
    grad_bias, grad_position = None if bias is None else grad_bias, None if position is None else grad_position
    return None, None, None, grad_weight, grad_bias, grad_position, None, None


_op = library.define(
    "masked_patchify_varlen",
    "(Tensor[] videos, Tensor keep, Tensor cu_seqlens, Tensor weight, Tensor? bias, Tensor? position, float[] mean, float[] std)"
    " -> Tensor",
    fake=_fake,
    kernels="masked_patchify_varlen",
)
_backward_op = library.define(
    "masked_patchify_varlen_backward",
    "(Tensor grad_out, Tensor[] videos, Tensor keep, Tensor cu_seqlens, Tensor weight, Tensor? bias, Tensor? position,"
    " float[] mean, float[] std) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="masked_patchify_varlen",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
