"""The one rule for comparing floating-point results.

A kernel may err as much as plain PyTorch errs at the same precision, times a small factor: with `exact` computed by the
reference in float64 and `plain` by the reference in the kernel's own dtype,

    max |kernel - exact|  <=  factor * max |plain - exact|  +  2 eps * max |exact|

where eps is the spacing of the dtype that the kernel's result is stored in, at 1. The second term is the rounding of the
result itself, for where plain PyTorch happens to be exact.
"""

import torch


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_good_as(plain, exact, kernel, *, factor=2.0, name="result"):
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    assert kernel.dtype == plain.dtype, f"{name}: dtype {kernel.dtype}, expected {plain.dtype}"
    kernel_error = largest(kernel.double() - exact)
    allowed = factor * largest(plain.double() - exact) + 2 * torch.finfo(kernel.dtype).eps * largest(exact)
    ratio = kernel_error / allowed if allowed else float("inf")
    # NaN fails, too
    assert kernel_error <= allowed, f"{name}: error {kernel_error:.3e} exceeds {allowed:.3e}, {ratio:.2f} times what is allowed"
