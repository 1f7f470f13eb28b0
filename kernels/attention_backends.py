"""Other implementations of attention, one adapter each, and which of all `impl="auto"` takes.

Every adapter has the signature of `stmae.ops.attention`, q, k, v [B, N, H, D] and a scale, and gives [B, N, H, D]. A package is
imported when its adapter is first called; whether it is there is looked up once, with this file, without importing it.
"""

import torch
import torch.nn.functional as F

from . import support

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "flash_attn", "xformers")


def sdpa(q, k, v, scale):
    """torch.nn.functional.scaled_dot_product_attention, which wants [B, H, N, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def flash_attn(q, k, v, scale):
    """flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, ...) on [B, N, H, D], half precision only.

    Its backward adds up grad_q with atomics unless it is asked not to.
    """
    import flash_attn as package

    return package.flash_attn_func(q, k, v, softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled())


def xformers(q, k, v, scale):
    """xformers.ops.memory_efficient_attention(query, key, value, attn_bias, p, scale, *, op, ...) on [B, N, H, D]."""
    import xformers.ops as package

    return package.memory_efficient_attention(q, k, v, scale=scale)


ADAPTERS = {"sdpa": sdpa, "flash_attn": flash_attn, "xformers": xformers}
INSTALLED = {name: support.is_installed(name) for name in ("flash_attn", "xformers")}


def unusable(impl, *, device_type, dtype, device_index=None):
    """Why `impl` cannot serve tensors of this device and dtype here, in a few words; None where it can.

    device_index: which GPU; None for the current one.
    """
    if impl == "sdpa":
        return None
    if impl != "triton" and not INSTALLED[impl]:
        return f"{impl} is not installed"
    if device_type != "cuda":
        return f"{impl} needs CUDA tensors, got {device_type}"
    if impl == "triton":
        return support.gpu_problem(device_index)
    if impl == "flash_attn" and dtype not in (torch.float16, torch.bfloat16):
        return f"flash_attn takes float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def choose(impl="auto", *, device_type="cuda", dtype=torch.bfloat16, device_index=None):
    """(implementation, reason) for a request.

    `auto` takes the project's own kernels where they run, then SDPA, and never a package for being installed: those are for
    who asks for them by name, as their numerics and determinism are their own.

    Raises:
        ValueError: an unknown name, or an implementation asked for by name that cannot serve.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention: expected impl one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl != "auto":
        problem = unusable(impl, device_type=device_type, dtype=dtype, device_index=device_index)
        if problem:
            raise ValueError(f"attention: impl={impl!r} cannot be used: {problem}")
        return impl, "asked for"
    problem = unusable("triton", device_type=device_type, dtype=dtype, device_index=device_index)
    if problem is None:
        return "triton", "reads packed projections in place, one packed gradient, the same bits every time"
    return "sdpa", problem
