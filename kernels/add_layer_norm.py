"""add_layer_norm: bound by memory, so what counts is that each tensor passes through it once.

For a float32 stream and a bfloat16 branch the forward moves 12 bytes an element (x 4, branch 2, sum 4, out 2) and the backward 16
(grad_sum 4, grad_out 2, sum 4, grad_x 4, grad_branch 2). A row stays in registers between its statistics and its output. The
gradients of weight and bias are sums over rows in two stages: a program adds up its rows, `sum_rows` the programs.
"""

import torch
import triton
import triton.language as tl

from .launching import launch, one
from .sum_rows import parts_of, sum_rows

_FEWEST_ROWS = 16  # in a part: with fewer, the partial sums would weigh


@triton.jit
def _add_layer_norm(
    x_ptr,  # [rows, D]
    branch_ptr,  # [rows, D] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    sum_ptr,  # [rows, D], None without a branch
    out_ptr,  # [rows, D]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    eps,
    x_row,
    branch_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum = x + branch, out = (sum - mean) rstd weight + bias. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(branch_ptr + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)  # the statistics are those of the sum as it is stored
        tl.store(sum_ptr + row * D + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = centred * rstd * weight + bias
    tl.store(out_ptr + row * D + column, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _add_layer_norm_backward(
    grad_out_ptr,  # [rows, D]
    grad_sum_ptr,  # [rows, D] or None
    sum_ptr,  # [rows, D]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    weight_ptr,  # [D]
    grad_x_ptr,  # [rows, D]
    grad_branch_ptr,  # [rows, D] in the branch's dtype, or None
    partial_ptr,  # [parts, 2, D]: of each program, the sums for weight and bias
    rows,
    rows_in_part,
    grad_out_row,
    grad_sum_row,
    sum_row,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_x = grad_sum + rstd (g - mean(g) - normal mean(g normal)), g = grad_out weight. One program a part of the rows."""
    part = tl.program_id(0)
    first = part * rows_in_part
    last = tl.minimum(first + rows_in_part, rows)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        here = row < last
        mask = here[:, None] & inside[None, :]
        row = row[:, None].to(tl.int64)
        upstream = tl.load(grad_out_ptr + row * grad_out_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(sum_ptr + row * sum_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=here[:, None], other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=here[:, None], other=0.0)
        normal = (x - mean) * rstd
        grad_weight += upstream * normal  # where masked, upstream is zero
        grad_bias += upstream
        g = upstream * weight[None, :]
        of_mean = tl.sum(g, axis=1, keep_dims=True) / D
        of_variance = tl.sum(g * normal, axis=1, keep_dims=True) / D
        grad = (g - of_mean - normal * of_variance) * rstd
        if grad_sum_ptr is not None:
            grad += tl.load(grad_sum_ptr + row * grad_sum_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        where = row * D + column[None, :]
        tl.store(grad_x_ptr + where, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + where, grad.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    partial_ptr += part.to(tl.int64) * (2 * D) + column
    tl.store(partial_ptr, tl.sum(grad_weight, axis=0), mask=inside)
    tl.store(partial_ptr + D, tl.sum(grad_bias, axis=0), mask=inside)


def _matrix(x, D):
    """x [..., D] as [rows, D] with dense rows; a view where its strides allow one."""
    x = x.reshape(-1, D)
    return x if x.stride(1) == 1 or D == 1 else x.contiguous()


def _forward(x, branch, weight, bias, eps, dtype):
    D = x.shape[-1]
    rows = x.numel() // max(D, 1)
    sum = None if branch is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if x.numel():
        x = _matrix(x, D)
        branch = None if branch is None else _matrix(branch, D)
        block = triton.next_power_of_2(D)
        launch(
            _add_layer_norm,
            (rows,),
            x,
            branch,
            weight.contiguous(),
            bias.contiguous(),
            sum,
            out,
            mean,
            rstd,
            eps,
            x.stride(0),
            0 if branch is None else branch.stride(0),
            D=D,
            configs=one(min(16, max(1, block // 512)), BLOCK_D=block),  # 16 elements a thread: two loads in flight of each tensor
        )
    return sum, out, mean, rstd


def add_layer_norm(x, branch, weight, bias, eps, dtype):
    # x, branch [..., D], weight, bias [D] -> sum [..., D] in x's dtype, out [..., D] in dtype, mean, rstd [rows] float32
    return _forward(x, branch, weight, bias, eps, dtype)


def _layer_norm(x, weight, bias, eps, dtype):  # x [..., D], weight, bias [D] -> out [..., D], mean, rstd [rows] float32
    return _forward(x, None, weight, bias, eps, dtype)[1:]


def add_layer_norm_backward(grad_sum, grad_out, sum, mean, rstd, weight, branch_dtype):
    # grad_sum [..., D] or None, grad_out, sum [..., D] -> grad_x, grad_branch [..., D] (empty where grad_x serves), [D], [D]
    D = sum.shape[-1]
    rows = sum.numel() // max(D, 1)
    grad_x = sum.new_empty(sum.shape)
    grad_branch = sum.new_empty(0 if branch_dtype == sum.dtype else sum.shape, dtype=branch_dtype)
    if not sum.numel():
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(weight)
    grad_out, x = _matrix(grad_out, D), _matrix(sum, D)
    grad_sum = None if grad_sum is None else _matrix(grad_sum, D)
    parts, rows_in_part = parts_of(rows, _FEWEST_ROWS)
    partial = sum.new_empty(parts, 2, D, dtype=torch.float32)
    block = triton.next_power_of_2(D)
    launch(
        _add_layer_norm_backward,
        (parts,),
        grad_out,
        grad_sum,
        x,
        mean,
        rstd,
        weight.contiguous(),
        grad_x,
        grad_branch if grad_branch.numel() else None,
        partial,
        rows,
        rows_in_part,
        grad_out.stride(0),
        0 if grad_sum is None else grad_sum.stride(0),
        x.stride(0),
        D=D,
        # 16 elements a thread, of five tensors, fit the 128 registers that leave a multiprocessor two programs of 256 threads.
        configs=one(min(16, max(8, block // 512)), BLOCK_R=max(1, 4096 // block), BLOCK_D=block),
    )
    grad_weight, grad_bias = sum_rows(partial.view(parts, 2 * D), weight.dtype, split=D)
    return grad_x, grad_branch, grad_weight, grad_bias
