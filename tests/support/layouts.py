"""The same values at other places in memory: strides, offsets, overlap, misalignment, next to pages that cannot be read."""

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE


def guarded(size, *, at_end=True, skew=0):
    """`size` bytes as a uint8 tensor that touch an unreadable page, behind it or before it; `skew` bytes away from that page."""
    pages = -(-(size + skew) // PAGE) + 2
    memory = mmap.mmap(-1, pages * PAGE)
    view = ctypes.c_char.from_buffer(memory)
    base = ctypes.addressof(view)
    del view  # the tensor keeps the mapping
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages - 1):
        assert protect(ctypes.c_void_p(base + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    first = (pages - 1) * PAGE - size - skew if at_end else PAGE + skew
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=first) if size else torch.empty(0, dtype=torch.uint8)


def strided(x, strides, *, at_end=True):
    """x with these strides in guarded memory. Values that share memory must be equal."""
    strides = tuple(strides)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
    if not x.numel():
        return x.as_strided(x.shape, strides)
    out = guarded(extent * x.element_size(), at_end=at_end).view(x.dtype).as_strided(x.shape, strides)
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in strides]
    out[tuple(once)].copy_(x[tuple(once)])
    return out


def misaligned(x):
    """x one byte off its elements' boundaries."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    out = torch.frombuffer(memory, dtype=torch.uint8)[1:]
    out.copy_(x.contiguous().view(torch.uint8).flatten())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


def without_storage(x, bytes=0):
    """x whose storage was resized behind its back, as FSDP does with parameters that are sharded."""
    x = x.clone()
    x.untyped_storage().resize_(bytes)
    return x
