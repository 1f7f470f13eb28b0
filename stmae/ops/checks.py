"""What the ops check before they compute, and what they say when it does not hold."""

import os

import torch

DEBUG = os.environ.get("STMAE_DEBUG", "0") not in ("", "0")


def describe(x):
    if isinstance(x, torch.Tensor):
        return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return f"{type(x).__name__} {x!r}"


def tensor(op, name, x, expected, shape, dtypes=None):
    """x must be a tensor of this shape (None: any size) and one of these dtypes (None: what this device's kernels take)."""
    if isinstance(x, torch.Tensor):
        dtypes = floating(x) if dtypes is None else dtypes
        fits = x.dim() == len(shape) and all(want is None or size == want for size, want in zip(x.shape, shape))
        if fits and x.dtype in dtypes:
            return
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes) if dtypes else "float32 or bfloat16"
    wanted = ", ".join("*" if want is None else str(want) for want in shape)
    raise ValueError(f"{op}: expected {name} {expected} {kinds} (here [{wanted}]), got {describe(x)}")


def floating(x):
    if x.device.type == "cpu":
        return (torch.float32, torch.bfloat16)
    return (torch.float32, torch.bfloat16, torch.float16)


def same_device(op, **tensors):
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: expected all tensors on one device, got " + ", ".join(f"{n} on {d}" for n, d in devices.items()))


def rows(op, name, x):
    """The last dimension must lie densely in memory; the others may have any stride."""
    if x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{op}: expected {name} with a contiguous last dimension, got strides {tuple(x.stride())}; call {name}.contiguous()"
        )


def dense_rows(x):
    """A gradient as the kernels read it: autograd may hand over an expanded one, whose last stride is 0."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def channels(op, name, value, count):
    """mean or std: one number, or one per channel, as a list of `count` floats."""
    values = [float(value)] * count if isinstance(value, (int, float)) else [float(x) for x in value]
    if len(values) == 1:
        values = values * count
    if len(values) != count:
        raise ValueError(f"{op}: expected {name} one number or one per channel ({count}), got {len(values)}")
    if name == "std" and any(x <= 0 for x in values):
        raise ValueError(f"{op}: expected std above 0, got {value}")
    return values


def video(op, x):
    if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected a video that needs no gradient (it gets none), got requires_grad=True; detach it")
    tensor(op, "video", x, "[B, C, T, H, W]", (None,) * 5, (torch.uint8, torch.float32, torch.bfloat16))


def ids(op, name, x, batch, limit):
    """Token ids [B, K] below `limit`, each at most once in a row. The CPU kernels check the values; on a GPU that would stop
    the device, so an id out of range is ignored there, and STMAE_DEBUG=1 has it checked here."""
    tensor(op, name, x, "[B, K]", (batch, None), (torch.int64,))
    if x.shape[1] > limit:
        raise ValueError(f"{op}: expected {name} with at most {limit} tokens, got {describe(x)}")
    if DEBUG and x.device.type != "cpu" and not torch.compiler.is_compiling() and x.numel():
        ordered = x.sort(dim=1).values
        if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= limit or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"{op}: expected {name} in [0, {limit}) without repeats in a row, got {describe(x)} that has others")


def autocast(*tensors):
    """Floating tensors in autocast's dtype where autocast is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)


def grid_tokens(op, clip, patch):
    """How many patches a clip (T, H, W) has; each side must be a multiple of the patch's."""
    if any(p <= 0 or s % p or s == 0 for s, p in zip(clip, patch)):
        raise ValueError(
            f"{op}: expected frames, height and width that are multiples of the patch {tuple(patch)}, got {tuple(clip)}"
        )
    return (clip[0] // patch[0]) * (clip[1] // patch[1]) * (clip[2] // patch[2])


def linear_layer(op, x, weight, bias, prefix=""):
    """x [..., K], weight [N, K], bias [N] or None; parameters may have another floating dtype than x."""
    if not isinstance(x, torch.Tensor) or x.dim() < 1:
        raise ValueError(f"{op}: expected x [..., K] float32 or bfloat16, got {describe(x)}")
    tensor(op, "x", x, "[..., K]", tuple(x.shape))
    tensor(op, f"{prefix}weight", weight, "[N, K]", (None, x.shape[-1]))
    if bias is not None:
        tensor(op, f"{prefix}bias", bias, "[N]", (weight.shape[0],))
    same_device(op, **{"x": x, f"{prefix}weight": weight, f"{prefix}bias": bias})
