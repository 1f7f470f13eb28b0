from collections.abc import Sequence

import torch

from . import checks, library


def masked_patchify(
    video: torch.Tensor,
    keep: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position: torch.Tensor | None,
    *,
    mean: float | Sequence[float] = 0.45,
    std: float | Sequence[float] = 0.225,
) -> torch.Tensor:
    """Embed the visible patches of a video, and only those, straight from its bytes.

    out[b, i] = sum_{c,u,p,q} x[b, c, patch(keep[b, i]), u, p, q] * weight[:, c, u, p, q] + bias + position[keep[b, i]]

    what `Conv3d` with a stride of one patch, then a gather, then the sum would give (MAE-ST, section 3.1), without the
    patches that are thrown away and without a floating copy of the video.

    Args:
        video: [B, C, T, H, W], any strides (a decoder's [T, H, W, C] frames are a permuted view). uint8 is normalised in
            the kernel, (x / 255 - mean) / std; float32, bfloat16 or (on GPUs) float16 is taken as
            it is. It gets no gradient.
        keep: [B, K] int64 in [0, N), no id twice in a row.
        weight: [D, C, pt, ph, pw], as of Conv3d. Its dtype (or autocast's) is that of the product; sums are float32.
        bias: [D] or None.
        position: [N, D] or None.
        mean, std: one number or one per channel, in units of [0, 1] intensity. Defaults: MAE-ST's 0.45 and 0.225.

    Returns:
        [B, K, D] in the dtype that weight and position promote to.

    Raises:
        ValueError: wrong shape, dtype or device, or a frame size that is no multiple of the patch.
        RuntimeError: an id out of range or repeated (on CPUs; see STMAE_DEBUG for GPUs).
    """
    op = "masked_patchify"
    checks.video(op, video)
    B, C, T, H, W = video.shape
    checks.tensor(op, "weight", weight, "[D, C, pt, ph, pw]", (None, C, None, None, None))
    D, _, pt, ph, pw = weight.shape
    N = checks.grid_tokens(op, (T, H, W), (pt, ph, pw))
    checks.ids(op, "keep", keep, B, N)
    if bias is not None:
        checks.tensor(op, "bias", bias, "[D]", (D,))
    if position is not None:
        checks.tensor(op, "position", position, "[N, D]", (N, D))
    checks.same_device(op, video=video, keep=keep, weight=weight, bias=bias, position=position)
    mean, std = checks.channels(op, "mean", mean, C), checks.channels(op, "std", std, C)
    weight, bias = checks.autocast(op, weight, bias)
    if position is not None:
        dtype = torch.promote_types(weight.dtype, position.dtype)
        if dtype not in (weight.dtype, torch.float32):
            weight = weight.to(dtype)
        position = position.to(dtype).contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    return _op(video, keep.contiguous(), weight.contiguous(), bias, position, mean, std)


def _fake(video, keep, weight, bias, position, mean, std):
    return (weight if position is None else position).new_empty(*keep.shape, weight.shape[0])


def _backward_fake(grad_out, video, keep, weight, bias, position, mean, std):
    return tuple(weight.new_empty(0) if x is None else torch.empty_like(x) for x in (weight, bias, position))


def _setup_context(ctx, inputs, output):
    video, keep, weight, bias, position, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(video, keep, weight, bias, position)


def _backward(ctx, grad_out):
    video, keep, weight, bias, position = ctx.saved_tensors
    bias = bias if ctx.needs_input_grad[3] else None  # nothing is computed for what is frozen
    position = position if ctx.needs_input_grad[4] else None
    grad_weight, grad_bias, grad_position = _backward_op(
        grad_out.contiguous(), video, keep, weight, bias, position, ctx.mean, ctx.std
    )
    return None, None, grad_weight, None if bias is None else grad_bias, None if position is None else grad_position, None, None


_op = library.define(
    "masked_patchify",
    "(Tensor video, Tensor keep, Tensor weight, Tensor? bias, Tensor? position, float[] mean, float[] std) -> Tensor",
    fake=_fake,
    kernels="masked_patchify",
)
_backward_op = library.define(
    "masked_patchify_backward",
    "(Tensor grad_out, Tensor video, Tensor keep, Tensor weight, Tensor? bias, Tensor? position, float[] mean, float[] std)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernels="masked_patchify",
)
_op = library.differentiable(_op, _backward, _setup_context)
_backward_op = library.not_twice_differentiable(_backward_op)
