"""Clips of any sizes in one forward pass: their tokens one after another, [1, total, D], with the offsets of each."""

import itertools
from collections.abc import Sequence

import torch

from stmae.models.config import EncoderConfig, as_pair

Grid = tuple[int, int, int]


def check_clips(name: str, config: EncoderConfig, clips: object) -> list[torch.Tensor]:
    """Clips [C, T, H, W] of a list, with a picture [C, H, W] as a clip of one tubelet, the same in each of its frames.

    Raises:
        ValueError: in the name of ``name``, for what is no list of clips and pictures of one dtype whose sizes are multiples of
            the patch.
    """
    if not isinstance(clips, (list, tuple)):
        raise ValueError(f"{name}: expected the video to be a tensor or a list of clips, got {type(clips).__name__}")
    if not clips:
        raise ValueError(f"{name}: expected videos a list of one clip or more, got an empty one")
    checked: list[torch.Tensor] = []
    C, patch = config.in_channels, (config.tubelet_size, *as_pair(config.patch_size))
    for index, clip in enumerate(clips):
        if not isinstance(clip, torch.Tensor):
            raise ValueError(f"{name}: expected videos[{index}] to be a tensor, got {type(clip).__name__}")
        if clip.dim() == 3:
            clip = clip[:, None].expand(-1, config.tubelet_size, -1, -1)
        if clip.dim() != 4 or clip.shape[0] != C or any(n == 0 or n % p for n, p in zip(clip.shape[1:], patch)):
            raise ValueError(
                f"{name}: expected videos[{index}] [{C}, T, H, W] with T, H and W multiples of the patch {patch}, or a picture "
                f"[{C}, H, W], got {list(clips[index].shape)}"
            )
        if clip.dtype != torch.uint8 and not clip.is_floating_point():
            raise ValueError(f"{name}: expected videos[{index}] uint8 or normalised floating point, got {clip.dtype}")
        if checked and (clip.dtype, clip.device) != (checked[0].dtype, checked[0].device):
            first = f"{checked[0].dtype} on {checked[0].device}"
            raise ValueError(f"{name}: expected videos of one dtype and device, got {first} and {clip.dtype} on {clip.device}")
        checked.append(clip)
    return checked


def grid_of(config: EncoderConfig, clip: torch.Tensor) -> Grid:
    """The patch grid (t, h, w) of a clip [C, T, H, W]."""
    p, q = as_pair(config.patch_size)
    return clip.shape[1] // config.tubelet_size, clip.shape[2] // p, clip.shape[3] // q


def check_ids(name: str, ids: object, count: int) -> list[torch.Tensor]:
    """A list of ``count`` rows of token ids, [K] or [1, K] int64 each, as [K].

    Raises:
        ValueError: anything else.
    """
    if not isinstance(ids, (list, tuple)) or len(ids) != count:
        got = f"{len(ids)}" if isinstance(ids, (list, tuple)) else type(ids).__name__
        raise ValueError(f"{name}: expected a list of ids for each clip, {count} in all, got {got}")
    rows = []
    for index, row in enumerate(ids):
        flat = row[0] if isinstance(row, torch.Tensor) and row.dim() == 2 and row.shape[0] == 1 else row
        if not isinstance(flat, torch.Tensor) or flat.dtype != torch.int64 or flat.dim() != 1:
            got = f"{list(row.shape)} {row.dtype}" if isinstance(row, torch.Tensor) else type(row).__name__
            raise ValueError(f"{name}[{index}]: expected ids [K] int64, got {got}")
        rows.append(flat)
    return rows


def starts(counts: Sequence[int]) -> list[int]:
    """0 and the sums of the first 1, 2, ... counts."""
    return list(itertools.accumulate(counts, initial=0))


def offsets(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """cu_seqlens [S + 1] int32 of sequences of these lengths."""
    return torch.tensor(starts(counts), dtype=torch.int32).to(device, non_blocking=True)


def numbered(rows: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Ids of each clip, numbered through all: those of clip s moved by the tokens of the clips before it, ``counts`` of each."""
    return torch.cat([row + first for row, first in zip(rows, starts(counts))])


def split(x: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """x [1, total, ...] -> a list of [count, ...]."""
    return list(x[0].split(list(counts)))
