import torch
import triton
import triton.language as tl

from .launching import launch, one
from .sequences import sequence

_LARGEST_TILE = 4096


@triton.jit
def _sort_keys(noise_ptr, token, N, stride_n):
    """float32 noise as uint32 in the same order; -0 equals 0, and NaN is the largest, as for torch.argsort."""
    x = tl.load(noise_ptr + token.to(tl.int64) * stride_n, mask=token < N, other=0.0)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(x == x, key, 0xFFFFFFFF)


@triton.jit
def _random_masking(
    noise_ptr,
    keep_ptr,
    masked_ptr,
    N,
    num_keep,
    stride_b,
    stride_n,
    cu_ptr,
    cu_keep_ptr,
    VARLEN: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The num_keep smallest of a row, without sorting it. One program a row.

    The num_keep-th smallest value is found bit by bit: it is the largest threshold that fewer than num_keep values lie
    below. Ties at it are filled up in order of position; prefix sums then give each token its place in either list.

    VARLEN: one program a sequence. N and num_keep are those of all, offsets in cu_ptr and cu_keep_ptr [S + 1], and ids are
    numbered through all sequences.
    """
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if VARLEN:
        most_masked = N - num_keep
        begin, N = sequence(cu_ptr, b, N)
        first_kept, num_keep = sequence(cu_keep_ptr, b, num_keep)
        noise_ptr += begin * stride_n
        keep_ptr += first_kept
    else:
        begin = 0
        noise_ptr += b * stride_b
        keep_ptr += b * num_keep
        masked_ptr += b * (N - num_keep)
    if ONE_TILE:
        keys = _sort_keys(noise_ptr, lane, N, stride_n)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        if ONE_TILE:
            below = tl.sum(((keys < candidate) & (lane < N)).to(tl.int32))
        else:
            count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, N, BLOCK):
                token = start + lane
                count += ((_sort_keys(noise_ptr, token, N, stride_n) < candidate) & (token < N)).to(tl.int32)
            below = tl.sum(count)
        threshold = tl.where(below < num_keep, candidate, threshold)
        bit = bit >> 1

    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        token = start + lane
        count += ((_sort_keys(noise_ptr, token, N, stride_n) < threshold) & (token < N)).to(tl.int32)
    ties_kept = num_keep - tl.sum(count)

    kept_before = tl.zeros([], tl.int32)
    ties_before = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        token = start + lane
        inside = token < N
        key = _sort_keys(noise_ptr, token, N, stride_n)
        tie = ((key == threshold) & inside).to(tl.int32)
        tie_rank = ties_before + tl.cumsum(tie, axis=0)  # counts this one, too
        kept = ((key < threshold) & inside) | ((tie == 1) & (tie_rank <= ties_kept))
        place = kept_before + tl.cumsum(kept.to(tl.int32), axis=0)
        if VARLEN:
            tl.store(keep_ptr + place - 1, begin + token, mask=kept)
            at = begin - first_kept + token - place
            tl.store(masked_ptr + at, begin + token, mask=inside & ~kept & (at >= 0) & (at < most_masked))
        else:
            tl.store(keep_ptr + place - 1, token.to(tl.int64), mask=kept)
            tl.store(masked_ptr + token - place, token.to(tl.int64), mask=inside & ~kept)
        kept_before += tl.sum(kept.to(tl.int32))
        ties_before += tl.sum(tie)


def random_masking(noise, num_keep):  # [B, N] float32 -> [B, K], [B, N - K] int64
    B, N = noise.shape
    keep = torch.empty(B, num_keep, dtype=torch.int64, device=noise.device)
    masked = torch.empty(B, N - num_keep, dtype=torch.int64, device=noise.device)
    if B and N:
        block = min(triton.next_power_of_2(N), _LARGEST_TILE)
        tiles = one(8 if block >= 2048 else 4, BLOCK=block)
        arguments = noise, keep, masked, N, num_keep, *noise.stride(), None, None, False, block >= N
        launch(_random_masking, (B,), *arguments, configs=tiles)
    return keep, masked


def random_masking_varlen(noise, cu_seqlens, cu_keep, total_keep):
    # noise [sum N] float32, offsets [S + 1] -> [sum K], [sum N - sum K] int64
    N, S = noise.shape[0], cu_seqlens.shape[0] - 1
    keep = torch.empty(total_keep, dtype=torch.int64, device=noise.device)
    masked = torch.empty(N - total_keep, dtype=torch.int64, device=noise.device)
    if S and N:
        block = min(max(128, triton.next_power_of_2(N // S)), _LARGEST_TILE)
        tiles = one(8 if block >= 2048 else 4, BLOCK=block)
        offsets = cu_seqlens.contiguous(), cu_keep.contiguous()
        launch(
            _random_masking, (S,), noise, keep, masked, N, total_keep, 0, noise.stride(0), *offsets, True, False, configs=tiles
        )
    return keep, masked
