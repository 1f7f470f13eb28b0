import torch
import triton
import triton.language as tl

from .launching import launch, one


@triton.jit
def _inverse_ids(
    ids_ptr, inverse_ptr, clear_ptr, N, K, D, stride_b, stride_k, CLEAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """inverse[b, ids[b, j]] = j, -1 elsewhere; one program a row. CLEAR zeroes clear[b, j] where no token leads back to j."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    ids_ptr += b * stride_b
    inverse_ptr += b * N
    for start in range(0, N, BLOCK):
        tl.store(inverse_ptr + start + lane, -1, mask=start + lane < N)
    tl.debug_barrier()  # the next stores go over these, from other threads
    for start in range(0, K, BLOCK):
        j = start + lane
        token = tl.load(ids_ptr + j.to(tl.int64) * stride_k, mask=j < K, other=-1)
        tl.store(inverse_ptr + token, j, mask=(token >= 0) & (token < N))
    if CLEAR:
        tl.debug_barrier()
        clear_ptr += b * K * D
        column = tl.arange(0, BLOCK_D)
        for start in range(0, K, BLOCK):
            j = start + lane
            token = tl.load(ids_ptr + j.to(tl.int64) * stride_k, mask=j < K, other=-1)
            back = tl.load(inverse_ptr + token, mask=(token >= 0) & (token < N), other=-1)
            lost = (back != j) & (j < K)
            if tl.sum(lost.to(tl.int32)) > 0:  # only ever for invalid ids
                for first in range(0, D, BLOCK_D):
                    where = clear_ptr + j[:, None].to(tl.int64) * D + first + column[None, :]
                    zero = tl.zeros([BLOCK, BLOCK_D], clear_ptr.dtype.element_ty)
                    tl.store(where, zero, mask=lost[:, None] & (first + column < D)[None, :])


def inverse_ids(ids, num_tokens, clear=None):
    """ids [B, K] -> [B, N] int32: which j has ids[b, j] == n, or -1. Ids outside [0, N) are left out.

    With it a scatter becomes a gather: every row of the result is written once, by one program, with no atomics.
    clear: a contiguous [B, K, D] to be gathered back into; rows that no token leads to are zeroed.
    """
    B, K = ids.shape
    inverse = torch.empty(B, num_tokens, dtype=torch.int32, device=ids.device)
    if B and num_tokens:
        D = 0 if clear is None else clear.shape[2]
        launch(
            _inverse_ids,
            (B,),
            ids,
            inverse,
            clear,
            num_tokens,
            K,
            D,
            *ids.stride(),
            clear is not None,
            configs=one(4, BLOCK=512, BLOCK_D=8),
        )
    return inverse
