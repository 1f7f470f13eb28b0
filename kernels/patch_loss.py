import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from .launching import launch, one
from .pixels import channel_constants, is_channels_last, mean_scale
from .sequences import strides_of, video_of, video_table

# The P values of a patch are taken in two pieces, P0 the largest power of two in P and P1 what remains (768 = 512 + 256): one
# tile of 1024 would mask a quarter of its lanes. P1 is 0 where P0 is all.
#
# What is worked out for a value, its place and its channel, is worked out for E = 8 neighbours at once, where they are neighbours
# in the video, too: in a row of interleaved channels of a multiple of 8 bytes.


@triton.jit
def _rows(masked_ptr, M, N, masked_b, masked_m, BLOCK_M: tl.constexpr):
    """The program's tile of masked patches, of one clip: (b, m, whether m < M, token, whether it is one of the video's)."""
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < M
    token = tl.load(masked_ptr + b * masked_b + m.to(tl.int64) * masked_m, mask=there, other=-1)
    valid = (token >= 0) & (token < N)
    return b, m, there, tl.where(valid, token, 0).to(tl.int32), valid


@triton.jit
def _pred(pred_ptr, b, m, there, pred_b, pred_m, pred_p, P: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    e = FIRST + tl.arange(0, WIDTH)
    where = pred_ptr + (b * pred_b + m.to(tl.int64) * pred_m)[:, None] + e[None, :].to(tl.int64) * pred_p
    return tl.load(where, mask=there[:, None] if FIRST + WIDTH <= P else there[:, None] & (e < P)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _target(
    video_ptr,
    token,
    valid,
    b,
    video_b,
    video_c,
    video_t,
    video_h,
    video_w,
    mean_scale,
    FRAMES: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Values FIRST : FIRST + WIDTH of the patches of `token`, in the order (frame, row, column, channel).

    0 beyond P, anything in a row that is not valid. STEP: by how much the frames advance, 0 where unevenly. E > 1: columns and
    channels are dense, and E neighbours lie in one row.
    """
    e = FIRST + tl.arange(0, WIDTH)
    it = token // (TH * TW)
    ih = (token // TW % TH * PH).to(tl.int64)
    iw = (token % TW * PW).to(tl.int64)
    run: tl.constexpr = PW * C
    if E > 1:
        piece = e // E
        u = piece // (run // E * PH)
        offset = (piece // (run // E) % PH).to(tl.int64) * video_h + (piece % (run // E) * E + e % E)
    else:
        u = e // (run * PH)
        offset = (e // run % PH).to(tl.int64) * video_h + (e // C % PW).to(tl.int64) * video_w + (e % C).to(tl.int64) * video_c
    where = (b * video_b + ih * video_h + iw * video_w)[:, None] + offset[None, :]
    for i in tl.static_range(U):  # the frame list is a constant of the kernel: a table in memory would have to be uploaded
        if STEP > 0:
            frame = FRAMES[0] + (it * U + i) * STEP
        else:
            frame = tl.zeros_like(it)
            for f in tl.static_range(len(FRAMES)):
                frame = tl.where(it * U + i == f, FRAMES[f], frame)
        if U == 1:
            where += (frame.to(tl.int64) * video_t)[:, None]
        else:
            where += tl.where(u == i, 1, 0)[None, :] * (frame.to(tl.int64) * video_t)[:, None]
    mask = valid[:, None] if FIRST + WIDTH <= P else valid[:, None] & (e < P)[None, :]
    x = tl.load(video_ptr + where, mask=mask, other=0).to(tl.float32)
    if video_ptr.dtype.element_ty == tl.uint8:
        scale, shift = channel_constants(e % 8, e // 8 * 8 % C, mean_scale, C)
        x = x * scale[None, :] + shift[None, :]
        if FIRST + WIDTH > P:
            x = tl.where((e < P)[None, :], x, 0.0)
    return x


@triton.jit
def _target_varlen(
    table_ptr,
    frames_ptr,
    id,
    valid,
    S,
    mean_scale,
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXEL: tl.constexpr,
    STEPS: tl.constexpr,
    P: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As _target, of tokens that are numbered through a list of videos: see sequences.py for the table and the list of frames."""
    entry, token, _ = video_of(table_ptr, id.to(tl.int64), S, STEPS)
    address, video_c, video_t, video_h, video_w = strides_of(entry, C, COLUMN, ALIGNED)
    grid_h = tl.load(entry + 6).to(tl.int32)
    grid_w = tl.load(entry + 7).to(tl.int32)
    first_frame = tl.load(entry + 8)
    it = token // (grid_h * grid_w)
    ih = (token // grid_w % grid_h * PH).to(tl.int64)
    iw = (token % grid_w * PW).to(tl.int64)
    pixels = address.to(tl.pointer_type(PIXEL)) + (ih * video_h + iw * video_w)
    if ALIGNED and PW * COLUMN % 16 == 0:
        pixels = tl.multiple_of(pixels, 16)
    e = FIRST + tl.arange(0, WIDTH)
    inside = e < P
    run: tl.constexpr = PW * C
    u = e // (run * PH)
    where = pixels[:, None] + (e // run % PH).to(tl.int64)[None, :] * video_h[:, None]
    if CHANNELS_LAST:
        where += (e % run)[None, :]
    else:
        where += (e // C % PW).to(tl.int64)[None, :] * video_w[:, None] + (e % C).to(tl.int64)[None, :] * video_c[:, None]
    for i in tl.static_range(U):
        frame = tl.load(frames_ptr + first_frame + it * U + i).to(tl.int64) * video_t
        if U == 1:
            where += frame[:, None]
        else:
            where += tl.where(u == i, 1, 0)[None, :] * frame[:, None]
    mask = valid[:, None] if FIRST + WIDTH <= P else valid[:, None] & inside[None, :]
    x = tl.load(where, mask=mask, other=0).to(tl.float32)
    if where.dtype.element_ty == tl.uint8:
        scale, shift = channel_constants(e % 8, e // 8 * 8 % C, mean_scale, C)
        x = x * scale[None, :] + shift[None, :]
        if FIRST + WIDTH > P:
            x = tl.where(inside[None, :], x, 0.0)
    return x


@triton.jit
def _of_channel(i: tl.constexpr, C: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Which of values FIRST : FIRST + WIDTH are channel i's, as a row."""
    e = FIRST + tl.arange(0, WIDTH)
    return ((e % C == i) & (e < P))[None, :]


@triton.jit
def _normalised(
    x, mean_ptr, rstd_ptr, row, there, BY_CHANNEL: tl.constexpr, C: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr
):
    """(x - m) r, by the m and r that the forward kept."""
    if BY_CHANNEL:
        for i in tl.static_range(C):
            mean = tl.load(mean_ptr + row * C + i, mask=there, other=0.0)
            rstd = tl.load(rstd_ptr + row * C + i, mask=there, other=0.0)
            x = tl.where(_of_channel(i, C, P, FIRST, x.shape[1]), (x - mean[:, None]) * rstd[:, None], x)
        return x
    else:
        mean = tl.load(mean_ptr + row, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)
        return (x - mean[:, None]) * rstd[:, None]


@triton.jit
def _of_patch(x, mean, FIRST: tl.constexpr, P: tl.constexpr):
    """x - mean, 0 beyond the patch's end."""
    x -= mean[:, None]
    if FIRST + x.shape[1] > P:
        x = tl.where((FIRST + tl.arange(0, x.shape[1]) < P)[None, :], x, 0.0)
    return x


@triton.jit
def _patch_loss(
    pred_ptr,
    video_ptr,
    masked_ptr,
    loss_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
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
    table_ptr,
    frames_ptr,
    S,
    FRAMES: tl.constexpr,
    STEP: tl.constexpr,
    NORMALIZE: tl.constexpr,  # 0: not, 1: by the patch's mean and variance, 2: by each channel's
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    E: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    VARLEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXEL: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """loss = mean over a patch of (pred - (x - m) r)^2, m and r its mean and 1 / sqrt(unbiased variance + 1e-6), or those of each
    channel, r = 1 / (sqrt(unbiased variance) + 1e-6).

    A program holds complete patches in registers: the target is read once, its mean and variance are taken in two passes.

    Args:
        pred_ptr: [B, M, P]. video_ptr: [B, C, T, H, W]. masked_ptr: [B, M] int64. loss_ptr: [B, M] float32, mean_ptr,
        rstd_ptr: [B, M] float32 or by channel [B, M, C], dense.
    """
    P: tl.constexpr = U * PH * PW * C
    b, m, there, token, valid = _rows(masked_ptr, M, N, masked_b, masked_m, BLOCK_M)
    if VARLEN:
        x0 = _target_varlen(
            table_ptr, frames_ptr, token, valid, S, mean_scale,
            C, U, PH, PW, CHANNELS_LAST, COLUMN, ALIGNED, PIXEL, STEPS, P, 0, P0,
        )  # fmt: skip
    else:
        x0 = _target(
            video_ptr, token, valid, b, video_b, video_c, video_t, video_h, video_w, mean_scale,
            FRAMES, STEP, C, U, PH, PW, TH, TW, E, P, 0, P0,
        )  # fmt: skip
    x1 = x0
    if P1 > 0:
        if VARLEN:
            x1 = _target_varlen(
                table_ptr, frames_ptr, token, valid, S, mean_scale,
                C, U, PH, PW, CHANNELS_LAST, COLUMN, ALIGNED, PIXEL, STEPS, P, P0, P1,
            )  # fmt: skip
        else:
            x1 = _target(
                video_ptr, token, valid, b, video_b, video_c, video_t, video_h, video_w, mean_scale,
                FRAMES, STEP, C, U, PH, PW, TH, TW, E, P, P0, P1,
            )  # fmt: skip
    row = b * M + m
    if NORMALIZE == 2:
        for i in tl.static_range(C):
            own0 = _of_channel(i, C, P, 0, P0)
            own1 = _of_channel(i, C, P, P0, P1 if P1 > 0 else P0)
            mean = tl.sum(tl.where(own0, x0, 0.0), axis=1)
            if P1 > 0:
                mean += tl.sum(tl.where(own1, x1, 0.0), axis=1)
            mean /= P // C
            x0 = tl.where(own0, x0 - mean[:, None], x0)
            squares = tl.sum(tl.where(own0, x0 * x0, 0.0), axis=1)
            if P1 > 0:
                x1 = tl.where(own1, x1 - mean[:, None], x1)
                squares += tl.sum(tl.where(own1, x1 * x1, 0.0), axis=1)
            rstd = tl.where(valid, 1.0 / (tl.sqrt(squares / (P // C - 1)) + 1e-6), 0.0)
            x0 = tl.where(own0, x0 * rstd[:, None], x0)
            if P1 > 0:
                x1 = tl.where(own1, x1 * rstd[:, None], x1)
            tl.store(mean_ptr + row * C + i, mean, mask=there)
            tl.store(rstd_ptr + row * C + i, rstd, mask=there)
        scale = tl.where(valid, 1.0, 0.0)
    else:
        if NORMALIZE == 1:
            mean = tl.sum(x0, axis=1)
            if P1 > 0:
                mean += tl.sum(x1, axis=1)
            mean /= P
            x0 = _of_patch(x0, mean, 0, P)
            squares = tl.sum(x0 * x0, axis=1)
            if P1 > 0:
                x1 = _of_patch(x1, mean, P0, P)
                squares += tl.sum(x1 * x1, axis=1)
            rstd = 1.0 / tl.sqrt(squares / (P - 1) + 1e-6)
        else:
            mean = tl.zeros([BLOCK_M], tl.float32)
            rstd = mean + 1.0
        scale = tl.where(valid, rstd, 0.0)  # the target of a patch that is not the video's is 0
        tl.store(mean_ptr + row, mean, mask=there)
        tl.store(rstd_ptr + row, scale, mask=there)
    # Beyond the patch's end prediction and target are both 0.
    error = _pred(pred_ptr, b, m, there, pred_b, pred_m, pred_p, P, 0, P0) - x0 * scale[:, None]
    loss = tl.sum(error * error, axis=1)
    if P1 > 0:
        error = _pred(pred_ptr, b, m, there, pred_b, pred_m, pred_p, P, P0, P1) - x1 * scale[:, None]
        loss += tl.sum(error * error, axis=1)
    tl.store(loss_ptr + row, loss / P, mask=there)


@triton.jit
def _store_grad(where, there, grad, P: tl.constexpr, FIRST: tl.constexpr):
    e = FIRST + tl.arange(0, grad.shape[1])
    mask = there[:, None] if FIRST + grad.shape[1] <= P else there[:, None] & (e < P)[None, :]
    tl.store(where[:, None] + e[None, :], grad.to(where.dtype.element_ty), mask=mask)


@triton.jit
def _patch_loss_backward(
    grad_loss_ptr,
    pred_ptr,
    video_ptr,
    masked_ptr,
    mean_ptr,
    rstd_ptr,
    grad_pred_ptr,
    M,
    N,
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
    table_ptr,
    frames_ptr,
    S,
    FRAMES: tl.constexpr,
    STEP: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    E: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    VARLEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXEL: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """grad_pred = grad_loss 2 / P (pred - (x - m) r), with the target made again from the video and the saved m and r.

    Args:
        grad_loss_ptr: [B, M]. pred_ptr: [B, M, P]. video_ptr: [B, C, T, H, W]. masked_ptr: [B, M] int64.
        mean_ptr, rstd_ptr: [B, M] float32 or by channel [B, M, C], dense. grad_pred_ptr: [B, M, P], dense.
    """
    P: tl.constexpr = U * PH * PW * C
    b, m, there, token, valid = _rows(masked_ptr, M, N, masked_b, masked_m, BLOCK_M)
    row = b * M + m
    grad = tl.load(grad_loss_ptr + b * grad_b + m.to(tl.int64) * grad_m, mask=there, other=0.0) * (2.0 / P)
    where = grad_pred_ptr + row * P
    pred = _pred(pred_ptr, b, m, there, pred_b, pred_m, pred_p, P, 0, P0)
    if VARLEN:
        x = _target_varlen(
            table_ptr, frames_ptr, token, valid, S, mean_scale,
            C, U, PH, PW, CHANNELS_LAST, COLUMN, ALIGNED, PIXEL, STEPS, P, 0, P0,
        )  # fmt: skip
    else:
        x = _target(
            video_ptr, token, valid, b, video_b, video_c, video_t, video_h, video_w, mean_scale,
            FRAMES, STEP, C, U, PH, PW, TH, TW, E, P, 0, P0,
        )  # fmt: skip
    x = _normalised(x, mean_ptr, rstd_ptr, row, there, BY_CHANNEL, C, P, 0)
    _store_grad(where, there, grad[:, None] * (pred - x), P, 0)
    if P1 > 0:
        pred = _pred(pred_ptr, b, m, there, pred_b, pred_m, pred_p, P, P0, P1)
        if VARLEN:
            x = _target_varlen(
                table_ptr, frames_ptr, token, valid, S, mean_scale,
                C, U, PH, PW, CHANNELS_LAST, COLUMN, ALIGNED, PIXEL, STEPS, P, P0, P1,
            )  # fmt: skip
        else:
            x = _target(
                video_ptr, token, valid, b, video_b, video_c, video_t, video_h, video_w, mean_scale,
                FRAMES, STEP, C, U, PH, PW, TH, TW, E, P, P0, P1,
            )  # fmt: skip
        x = _normalised(x, mean_ptr, rstd_ptr, row, there, BY_CHANNEL, C, P, P0)
        _store_grad(where, there, grad[:, None] * (pred - x), P, P0)


_VALUES = 2048  # of the first piece, in a program: 32 in each of 128 threads stay in registers


def _pieces(P):
    """768 -> (512, 256): see the top of this file."""
    first = 1 << (P.bit_length() - 1)
    rest = P - first
    return first, triton.next_power_of_2(rest) if rest > 0 else 0


@functools.lru_cache(256)
def _constants(grid, patch_size, C, frames, channels_last):
    """The constants of both kernels and their configuration."""
    u, ph, pw = patch_size
    P0, P1 = _pieces(u * ph * pw * C)
    tiles = one(4 if P0 <= 2048 else 8, BLOCK_M=max(1, _VALUES // P0))
    step = frames[1] - frames[0] if len(frames) > 1 else 1
    if step <= 0 or frames != tuple(range(frames[0], frames[0] + step * len(frames), step)):
        step = 0
    run = pw * C
    E = min(8, run & -run) if channels_last else 1
    constants = dict(FRAMES=frames, STEP=step, C=C, U=u, PH=ph, PW=pw, TH=grid[1], TW=grid[2], E=E, P0=P0, P1=P1)
    return constants | dict(configs=tiles) | _DENSE


_NO_TABLE = None, None, 0
_DENSE = dict(VARLEN=False, CHANNELS_LAST=False, COLUMN=0, ALIGNED=False, PIXEL=tl.uint8, STEPS=0)


def _varlen(videos, patch_size, frames, frame_counts):
    """(number of tokens, table, list of frames, constants) of a list of videos."""
    u, ph, pw = patch_size
    ends = list(itertools.accumulate(frame_counts))
    own = [frames[end - count : end] for end, count in zip(ends, frame_counts)]
    table, listed, shared = video_table(videos, patch_size, own)
    shared["COLUMN"] = shared.pop("WIDTH")
    P0, P1 = _pieces(u * ph * pw * shared["C"])
    tiles = one(4 if P0 <= 2048 else 8, BLOCK_M=max(1, _VALUES // P0))
    unused = dict(FRAMES=(0,), STEP=1, TH=1, TW=1, E=1)
    N = sum(count // u * (x.shape[2] // ph) * (x.shape[3] // pw) for x, count in zip(videos, frame_counts))
    return N, table, listed, dict(U=u, PH=ph, PW=pw, P0=P0, P1=P1, VARLEN=True, configs=tiles) | shared | unused


def _problem(video, patch_size, frames):
    _, C, _, H, W = video.shape
    u, ph, pw = patch_size
    grid = len(frames) // u, H // ph, W // pw
    return math.prod(grid), _constants(grid, tuple(patch_size), C, tuple(frames), is_channels_last(video))


def patch_loss(pred, video, masked, patch_size, frames, normalize, mean, std):
    # pred [B, M, P], video [B, C, T, H, W], masked [B, M] -> loss [B, M], patch_mean, patch_rstd [B, M] or by channel [B, M, C]
    statistics = (*masked.shape, video.shape[1]) if normalize == 2 else masked.shape
    loss, patch_mean, patch_rstd = (
        torch.empty(shape, dtype=torch.float32, device=pred.device) for shape in (masked.shape, statistics, statistics)
    )
    if pred.numel():
        N, constants = _problem(video, patch_size, frames)
        B, M = masked.shape
        launch(
            _patch_loss,
            lambda tiles: (triton.cdiv(M, tiles["BLOCK_M"]) * B,),
            pred,
            video,
            masked,
            loss,
            patch_mean,
            patch_rstd,
            M,
            N,
            *pred.stride(),
            *video.stride(),
            *masked.stride(),
            mean_scale(mean, std),
            *_NO_TABLE,
            NORMALIZE=normalize,
            **constants,
        )
    return loss, patch_mean, patch_rstd


def patch_loss_backward(grad_loss, pred, video, masked, patch_mean, patch_rstd, patch_size, frames, mean, std):
    # grad_loss [B, M] -> grad_pred [B, M, P] in pred's dtype
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel():
        N, constants = _problem(video, patch_size, frames)
        B, M = masked.shape
        launch(
            _patch_loss_backward,
            lambda tiles: (triton.cdiv(M, tiles["BLOCK_M"]) * B,),
            grad_loss,
            pred,
            video,
            masked,
            patch_mean.contiguous(),
            patch_rstd.contiguous(),
            grad_pred,
            M,
            N,
            *grad_loss.stride(),
            *pred.stride(),
            *video.stride(),
            *masked.stride(),
            mean_scale(mean, std),
            *_NO_TABLE,
            BY_CHANNEL=patch_mean.dim() == 3,
            **constants,
        )
    return grad_pred


def patch_loss_varlen(pred, videos, masked, cu_seqlens, patch_size, frames, frame_counts, normalize, mean, std):
    # pred [sum M, P], videos S of [C, T, H, W], masked [sum M] -> loss, patch_mean, patch_rstd [sum M] or by channel [sum M, C]
    statistics = (*masked.shape, len(mean)) if normalize == 2 else masked.shape
    loss, patch_mean, patch_rstd = (
        torch.empty(shape, dtype=torch.float32, device=pred.device) for shape in (masked.shape, statistics, statistics)
    )
    if pred.numel():
        M = masked.shape[0]
        N, table, listed, constants = _varlen(videos, patch_size, frames, frame_counts)
        launch(
            _patch_loss,
            lambda tiles: (triton.cdiv(M, tiles["BLOCK_M"]),),
            pred,
            None,
            masked,
            loss,
            patch_mean,
            patch_rstd,
            M,
            N,
            0,
            *pred.stride(),
            *(0,) * 5,
            0,
            *masked.stride(),
            mean_scale(mean, std),
            table,
            listed,
            len(videos),
            NORMALIZE=normalize,
            **constants,
        )
    return loss, patch_mean, patch_rstd


def patch_loss_varlen_backward(
    grad_loss, pred, videos, masked, cu_seqlens, patch_mean, patch_rstd, patch_size, frames, frame_counts, mean, std
):  # grad_loss [sum M] -> grad_pred [sum M, P] in pred's dtype
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel():
        M = masked.shape[0]
        N, table, listed, constants = _varlen(videos, patch_size, frames, frame_counts)
        launch(
            _patch_loss_backward,
            lambda tiles: (triton.cdiv(M, tiles["BLOCK_M"]),),
            grad_loss,
            pred,
            None,
            masked,
            patch_mean.contiguous(),
            patch_rstd.contiguous(),
            grad_pred,
            M,
            N,
            0,
            *grad_loss.stride(),
            0,
            *pred.stride(),
            *(0,) * 5,
            0,
            *masked.stride(),
            mean_scale(mean, std),
            table,
            listed,
            len(videos),
            BY_CHANNEL=patch_mean.dim() == 2,
            **constants,
        )
    return grad_pred
