"""How much of attention's tiles lies beyond the ends of sequences of unequal lengths, by the tiles that a launch takes."""

import math

import pytest

from stmae.kernels import attention_tiles

EVERY_LENGTH = range(64, 1569)
OF_CLIPS = (64, 156, 196, 392, 784, 1568)  # tokens of clips and pictures at 224 and 112 pixels, and of the visible ones of 1568


def walked(length, block):
    """Rows that a program of the kernels for sequences walks over: tiles, and what is left in halves of one."""
    left = length % block
    half = max(block // 2, 16)
    return length - left + (half if 0 < left <= half else block if left else 0)


def wasted(kernel, target, D, lengths):
    """The fraction of the scores of all tiles that are of no query or no key."""
    mean = sum(lengths) // len(lengths)
    _, _, tiles = attention_tiles.ordered(kernel, target, D, mean, mean)[0]
    own, other = (tiles["BLOCK_M"], tiles["BLOCK_N"])[:: -1 if kernel == "grad_kv" else 1]
    computed = sum(math.ceil(length / own) * own * walked(length, other) for length in lengths)
    return 1 - sum(length**2 for length in lengths) / computed


@pytest.mark.parametrize("lengths", [EVERY_LENGTH, OF_CLIPS], ids=["every length", "of clips"])
@pytest.mark.parametrize("target", attention_tiles.TILES)
def test_less_than_a_tenth_is_wasted_at_ragged_ends(target, lengths):
    for kernel in attention_tiles.OPERATIONS:
        for D in attention_tiles.HEAD_DIMS:
            assert 0 <= wasted(kernel, target, D, lengths) < 0.1, (kernel, D)
