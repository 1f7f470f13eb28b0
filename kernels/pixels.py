"""What the kernels that read video share: normalisation by channel, with its work taken off the single value."""

import triton
import triton.language as tl


@triton.jit
def channel_constants(e, first, mean_scale, C: tl.constexpr):
    """Scale and shift that normalise values whose channels are (first + e) % C.

    Args:
        e: a vector of constants, the place of a value in its piece. first: the channel of a piece's first value, in [0, C): one
        number or a vector. mean_scale: of each channel 1 / (255 std) and -mean / std.

    For each of the C values that e % C has, the constants are chosen once for a piece; which of them a value takes is known
    when the kernel is compiled.
    """
    scale = tl.zeros_like(e + first).to(tl.float32)
    shift = scale
    for i in tl.static_range(C):
        s = mean_scale[0]
        t = mean_scale[1]
        for c in tl.static_range(1, C):
            here = (first + i == c) | (first + i == c + C)
            s = tl.where(here, mean_scale[2 * c], s)
            t = tl.where(here, mean_scale[2 * c + 1], t)
        scale = tl.where(e % C == i, s, scale)
        shift = tl.where(e % C == i, t, shift)
    return scale, shift


def mean_scale(mean, std):
    """The numbers that make (x / 255 - mean) / std of a byte x by one multiplication and one addition, channel by channel."""
    return tuple(x for m, s in zip(mean, std) for x in (1 / (255 * s), -m / s))


def is_channels_last(video):
    """Whether video [B, C, T, H, W] has dense rows of interleaved channels, as decoders write frames."""
    C = video.shape[1]
    return C > 1 and video.stride(1) == 1 and video.stride(4) == C
