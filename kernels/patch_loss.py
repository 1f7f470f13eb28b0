import torch
import triton
import triton.language as tl

from .launching import launch, one


@triton.jit
def _target(
    video_ptr,
    token,
    valid,
    b,
    e,
    TH,
    TW,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    mean_scale,
    FRAMES: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The pixels [tokens, e] of the patches of `token`, e in the order (frame, row, column, channel); 0 where masked off.

    With dense columns and channels, neighbouring e are neighbouring bytes, and are loaded as such.
    """
    token = tl.where(valid, token, 0).to(tl.int32)
    it = token // (TH * TW)
    ih = (token // TW % TH * PH).to(tl.int64)
    iw = (token % TW * PW).to(tl.int64)
    run: tl.constexpr = PW * C
    c = e % C
    u = e // (run * PH)
    if CHANNELS_LAST:
        offset = e // run % PH * video_h + e % run
    else:
        offset = e // run % PH * video_h + e // C % PW * video_w + c.to(tl.int64) * video_c
    where = (b * video_b + ih * video_h + iw * video_w)[:, None] + offset[None, :]
    for i in tl.static_range(U):  # the frame list is a constant of the kernel: a table in memory would have to be uploaded
        frame = tl.zeros_like(it)
        for f in tl.static_range(len(FRAMES)):
            frame = tl.where(it * U + i == f, FRAMES[f], frame)
        where += tl.where(u == i, 1, 0)[None, :] * (frame.to(tl.int64) * video_t)[:, None]
    mask = valid[:, None] & (e < U * PH * run)[None, :]
    x = tl.load(video_ptr + where, mask=mask, other=0).to(tl.float32)
    if video_ptr.dtype.element_ty == tl.uint8:
        scale = tl.zeros_like(e).to(tl.float32)
        shift = scale
        for i in tl.static_range(C):
            scale = tl.where(c == i, mean_scale[2 * i], scale)
            shift = tl.where(c == i, mean_scale[2 * i + 1], shift)
        x = tl.where(mask, x * scale[None, :] + shift[None, :], 0.0)
    return x


@triton.jit
def _patch_loss(
    pred_ptr,
    video_ptr,
    masked_ptr,
    loss_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    M,
    N,
    TH,
    TW,
    pred_b,
    pred_m,
    pred_p,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    masked_b,
    masked_m,
    mean_scale,
    FRAMES: tl.constexpr,
    NORMALIZE: tl.constexpr,  # 0: not, 1: by the patch's mean and variance, 2: by each channel's
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """loss = mean over a patch of (pred - (x - m) r)^2, m and r its mean and 1 / sqrt(unbiased variance + 1e-6), or those of each
    channel, r = 1 / (sqrt(unbiased variance) + 1e-6).

    A program holds whole patches in registers: the target is read once, its mean and variance are taken in two passes.
    """
    P: tl.constexpr = U * PH * PW * C
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_P)
    b = (row // M).to(tl.int64)
    m = (row % M).to(tl.int64)
    token = tl.load(masked_ptr + b * masked_b + m * masked_m, mask=row < rows, other=-1)
    valid = (token >= 0) & (token < N)
    inside = (row < rows)[:, None] & (e < P)[None, :]
    pred = tl.load(pred_ptr + (b * pred_b + m * pred_m)[:, None] + e[None, :].to(tl.int64) * pred_p, mask=inside, other=0.0)
    x = _target(
        video_ptr,
        token,
        valid,
        b,
        e,
        TH,
        TW,
        video_b,
        video_c,
        video_t,
        video_h,
        video_w,
        mean_scale,
        FRAMES,
        C,
        U,
        PH,
        PW,
        CHANNELS_LAST,
    )
    if NORMALIZE == 2:
        for i in tl.static_range(C):
            own = inside & (e % C == i)[None, :]
            channel_mean = tl.sum(tl.where(own, x, 0.0), axis=1) / (P // C)
            x = tl.where(own, x - channel_mean[:, None], x)
            channel_rstd = 1.0 / (tl.sqrt(tl.sum(tl.where(own, x * x, 0.0), axis=1) / (P // C - 1)) + 1e-6)
            x = tl.where(own, x * channel_rstd[:, None], x)
            tl.store(mean_ptr + row * C + i, channel_mean, mask=row < rows)
            tl.store(rstd_ptr + row * C + i, channel_rstd, mask=row < rows)
    elif NORMALIZE == 1:
        mean = tl.sum(x, axis=1) / P
        x = tl.where(inside, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / (P - 1) + 1e-6)
        x *= rstd[:, None]
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        rstd = mean + 1.0
    error = tl.where(inside, pred.to(tl.float32) - x, 0.0)
    tl.store(loss_ptr + row, tl.sum(error * error, axis=1) / P, mask=row < rows)
    if NORMALIZE != 2:
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _patch_loss_backward(
    grad_loss_ptr,
    pred_ptr,
    video_ptr,
    masked_ptr,
    mean_ptr,
    rstd_ptr,
    grad_pred_ptr,
    rows,
    M,
    N,
    TH,
    TW,
    grad_b,
    grad_m,
    pred_b,
    pred_m,
    pred_p,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    masked_b,
    masked_m,
    mean_scale,
    FRAMES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """grad_pred = grad_loss 2 / P (pred - (x - m) r), with the target made again from the video and the saved m and r."""
    P: tl.constexpr = U * PH * PW * C
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_P)
    b = (row // M).to(tl.int64)
    m = (row % M).to(tl.int64)
    token = tl.load(masked_ptr + b * masked_b + m * masked_m, mask=row < rows, other=-1)
    valid = (token >= 0) & (token < N)
    inside = (row < rows)[:, None] & (e < P)[None, :]
    pred = tl.load(pred_ptr + (b * pred_b + m * pred_m)[:, None] + e[None, :].to(tl.int64) * pred_p, mask=inside, other=0.0)
    x = _target(
        video_ptr,
        token,
        valid,
        b,
        e,
        TH,
        TW,
        video_b,
        video_c,
        video_t,
        video_h,
        video_w,
        mean_scale,
        FRAMES,
        C,
        U,
        PH,
        PW,
        CHANNELS_LAST,
    )
    if BY_CHANNEL:
        for i in tl.static_range(C):
            mean = tl.load(mean_ptr + row * C + i, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row * C + i, mask=row < rows, other=0.0)
            x = tl.where((e % C == i)[None, :], (x - mean[:, None]) * rstd[:, None], x)
    else:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x = (x - mean[:, None]) * rstd[:, None]
    grad = tl.load(grad_loss_ptr + b * grad_b + m * grad_m, mask=row < rows, other=0.0) * (2.0 / P)
    grad_pred = grad[:, None] * (pred.to(tl.float32) - x)
    where = grad_pred_ptr + row[:, None].to(tl.int64) * P + e[None, :]
    tl.store(where, grad_pred.to(grad_pred_ptr.dtype.element_ty), mask=inside)


def _problem(video, patch_size, frames, mean, std):
    _, C, _, H, W = video.shape
    u, ph, pw = patch_size
    P = u * ph * pw * C
    # 2048 values in 128 threads: 16 in a thread, of the prediction and of the target, stay in registers.
    width = triton.next_power_of_2(P)
    tiles = one(4 if width <= 4096 else 8, BLOCK_M=max(1, 2048 // width), BLOCK_P=width)
    channels_last = C > 1 and video.stride(1) == 1 and video.stride(4) == C
    constants = dict(FRAMES=tuple(frames), C=C, U=u, PH=ph, PW=pw, CHANNELS_LAST=channels_last, configs=tiles)
    grid = len(frames) // u, H // ph, W // pw
    normalisation = tuple(x for m, s in zip(mean, std) for x in (1 / (255 * s), -m / s))
    return grid, normalisation, constants


def patch_loss(pred, video, masked, patch_size, frames, normalize, mean, std):
    # pred [B, M, P], video [B, C, T, H, W], masked [B, M] -> loss [B, M], patch_mean, patch_rstd [B, M] or by channel [B, M, C]
    statistics = (*masked.shape, video.shape[1]) if normalize == 2 else masked.shape
    loss, patch_mean, patch_rstd = (
        torch.empty(shape, dtype=torch.float32, device=pred.device) for shape in (masked.shape, statistics, statistics)
    )
    if pred.numel():
        (t, h, w), normalisation, constants = _problem(video, patch_size, frames, mean, std)
        rows = masked.numel()
        launch(
            _patch_loss,
            lambda tiles: (triton.cdiv(rows, tiles["BLOCK_M"]),),
            pred,
            video,
            masked,
            loss,
            patch_mean,
            patch_rstd,
            rows,
            masked.shape[1],
            t * h * w,
            h,
            w,
            *pred.stride(),
            *video.stride(),
            *masked.stride(),
            normalisation,
            NORMALIZE=normalize,
            **constants,
        )
    return loss, patch_mean, patch_rstd


def patch_loss_backward(grad_loss, pred, video, masked, patch_mean, patch_rstd, patch_size, frames, mean, std):
    # grad_loss [B, M] -> grad_pred [B, M, P] in pred's dtype
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel():
        (t, h, w), normalisation, constants = _problem(video, patch_size, frames, mean, std)
        rows = masked.numel()
        launch(
            _patch_loss_backward,
            lambda tiles: (triton.cdiv(rows, tiles["BLOCK_M"]),),
            grad_loss,
            pred,
            video,
            masked,
            patch_mean.contiguous(),
            patch_rstd.contiguous(),
            grad_pred,
            rows,
            masked.shape[1],
            t * h * w,
            h,
            w,
            *grad_loss.stride(),
            *pred.stride(),
            *video.stride(),
            *masked.stride(),
            normalisation,
            BY_CHANNEL=patch_mean.dim() == 3,
            **constants,
        )
    return grad_pred
