"""What the ops check before they compute, and their error messages."""

import math
import operator
import os

import torch

from stmae.kernels import support

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
        if fits and x.layout == torch.strided and x.dtype in dtypes:
            return
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes) if dtypes else "float32 or bfloat16"
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    raise ValueError(f"{op}: expected {name} {expected} {kinds} (here [{sizes}]), got {describe(x)}")


def floating(x):
    if x.device.type == "cpu":
        return (torch.float32, torch.bfloat16)
    return (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(x):
    """Whether the ops that plain torch could serve, too, have kernels where x is. The meta device, where nothing is computed, is
    taken for a GPU."""
    device = x.device
    return device.type in ("cpu", "meta") or (device.type == "cuda" and support.gpu_problem(device.index) is None)


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
    """mean or std: one number, or one per channel, as a list of `count` finite floats."""
    try:
        values = [float(value)] if not isinstance(value, str) and not hasattr(value, "__len__") else [float(x) for x in value]
    except (TypeError, ValueError):
        values = []
    if len(values) == 1:
        values = values * count
    if len(values) != count or not all(math.isfinite(x) for x in values):
        raise ValueError(f"{op}: expected {name} a finite number or one per channel ({count}), got {value!r}")
    if name == "std" and any(x <= 0 for x in values):
        raise ValueError(f"{op}: expected std above 0, got {value!r}")
    return values


def integers(op, name, values, count=None):
    """A sequence of `count` ints (None: any number), as a list."""
    try:
        result = [operator.index(x) for x in values]
    except TypeError:
        result = None
    if result is None or count not in (None, len(result)):
        raise ValueError(f"{op}: expected {name} to be {count or ''} integers, got {values!r}".replace("  ", " "))
    return result


def video(op, x):
    if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected a video that needs no gradient (it gets none), got requires_grad=True; detach it")
    dtypes = (torch.uint8, *floating(x)) if isinstance(x, torch.Tensor) else (torch.uint8, torch.float32, torch.bfloat16)
    tensor(op, "video", x, "[B, C, T, H, W]", (None,) * 5, dtypes)
    if x.shape[1] == 0:
        raise ValueError(f"{op}: expected video with at least one channel, got {describe(x)}")


def videos(op, values, channels=None):
    """A list of one video [C, T, H, W] or more, of one dtype and number of channels and of any sizes and strides."""
    if isinstance(values, torch.Tensor) or not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{op}: expected videos a list of one tensor [C, T, H, W] or more, got {describe(values)}")
    for s, x in enumerate(values):
        name = f"videos[{s}]"
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: expected {name} that needs no gradient (it gets none), got requires_grad=True; detach it")
        first = values[0] if s else x
        dtypes = (torch.uint8, *floating(x)) if isinstance(x, torch.Tensor) else (torch.uint8, torch.float32, torch.bfloat16)
        channels = channels if not s or channels is not None else first.shape[0]
        tensor(op, name, x, "[C, T, H, W]", (channels, None, None, None), (first.dtype,) if s else dtypes)
        if x.shape[0] == 0:
            raise ValueError(f"{op}: expected {name} with at least one channel, got {describe(x)}")
    return list(values)


def ids(op, name, x, batch, limit):
    """Token ids [B, K] below `limit`, each at most once in a row. The CPU kernels check the values; on a GPU that would stop
    the device, so an id out of range is ignored there, and STMAE_DEBUG=1 has it checked here."""
    tensor(op, name, x, "[B, K]", (batch, None), (torch.int64,))
    if x.shape[1] > limit:
        raise ValueError(f"{op}: expected {name} with at most {limit} tokens, got {describe(x)}")
    if DEBUG and x.device.type != "cpu" and not torch.compiler.is_compiling() and x.numel():
        if x.device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: the values of {name} cannot be checked while a CUDA graph is captured; unset STMAE_DEBUG")
        ordered = x.sort(dim=1).values
        if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= limit or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"{op}: expected {name} in [0, {limit}) without repeats in a row, got {describe(x)} that has others")


def offsets(op, name, x, total, rows, count=None):
    """Offsets [S + 1] of sequences that lie one after another in `total` rows. The CPU kernels check the values; on a GPU that
    would stop the device, and STMAE_DEBUG=1 has them checked here."""
    tensor(op, name, x, "[S + 1]", (count,), (torch.int32, torch.int64))
    if x.shape[0] == 0:
        raise ValueError(f"{op}: expected {name} [S + 1], got {describe(x)}")
    if DEBUG and x.device.type != "cpu" and not torch.compiler.is_compiling():
        if x.device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: the values of {name} cannot be checked while a CUDA graph is captured; unset STMAE_DEBUG")
        if x[0] != 0 or x[-1] != total or (x[1:] < x[:-1]).any():
            raise ValueError(f"{op}: expected {name} from 0, ascending, up to the {total} rows of {rows}, got others")


def autocast_dtype(op, x):
    """The dtype that autocast asks for on x's device; None where autocast is off."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):  # "meta", for instance, has none
        return None
    dtype = torch.get_autocast_dtype(device)
    if dtype not in floating(x):
        raise ValueError(f"{op}: expected autocast to bfloat16 on {device}, got {str(dtype).removeprefix('torch.')}")
    return dtype


def autocast(op, *tensors):
    """Floating tensors in autocast's dtype where autocast is on for their device."""
    dtype = autocast_dtype(op, tensors[0])
    if dtype is None:
        return tensors
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


def matrix(x):
    """[..., K] as [M, K]; with K = 0, where torch cannot infer M, too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def output_mask(op, flags, possible):
    """Which gradients a backward op is asked for: one flag per input, and none for an input that is not there."""
    if len(flags) != len(possible) or any(flag and not can for flag, can in zip(flags, possible)):
        raise ValueError(
            f"{op}: expected output_mask with {len(possible)} flags, true only for what was given, got {list(flags)}"
        )


def gradient_dtype(op, name, dtype):
    """What a backward op is asked to return a gradient in."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{op}: expected {name} float32 or bfloat16, got {str(dtype).removeprefix('torch.')}")
