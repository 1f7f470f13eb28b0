"""Which patches the encoder sees and which the decoder reconstructs: the masking strategies of the paper's ablation.

A strategy is a way of drawing noise ``[B, N]`` such that keeping the ``num_keep`` smallest entries of each
row gives the mask. So one kernel (``stmae.ops.random_masking``) serves them all, and a stored noise tensor
reproduces a mask exactly. Where the decoder leaves tokens out, a stored ``phase`` [B] selects the pattern.

``make_mask`` is the one function that makes a ``Mask``, ``token_counts`` the one that counts its tokens.

Source: Feichtenhofer et al., "Masked Autoencoders As Spatiotemporal Learners", section 3 and figure 4
(random "agnostic", space-only = tube, time-only = frame, block).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stmae import ops as _kernels

STRATEGIES = ("random", "tube", "frame", "block")  # with one number of visible tokens for a grid
ALL_STRATEGIES = (*STRATEGIES, "multi_block")  # with which every clip has its own

_BLOCK_AREA = (0.1, 0.4)  # of the frame, per block
_BLOCK_ASPECT = (0.3, 1 / 0.3)  # height : width, log-uniform, as in BEiT's block-wise masking
_MASKS_TO_CHOOSE_FROM = (16, 32)  # of multi_block with a number of visible tokens: at a time, and how often
_MAX_BLOCKS = 1000  # reached only by ratios close to 1, where the rest is filled in raster order


class Mask(NamedTuple):
    """Which tokens of each clip the encoder sees and which are reconstructed: token ids in [0, N), ascending in each row.

    keep: [B, K] int64, the visible tokens.
    masked: [B, M] int64, those to be reconstructed: all others or, with a decoder mask, some of them. None is in ``keep``.
    """

    keep: torch.Tensor
    masked: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Mask":
        """The mask on ``device``."""
        return Mask(self.keep.to(device, non_blocking=non_blocking), self.masked.to(device, non_blocking=non_blocking))


class Blocks(NamedTuple):
    """What ``multi_block`` masks: ``number`` blocks, each with a fraction of a frame's patches in ``scale``, a height over width
    in ``aspect`` and a fraction of the time slices in ``length``, ranges from which they are drawn, anew for each block."""

    number: int = 8
    scale: tuple[float, float] = (0.15, 0.15)
    aspect: tuple[float, float] = (0.75, 1.5)
    length: tuple[float, float] = (1.0, 1.0)


class TokenCounts(NamedTuple):
    """tokens: ``N``; visible: ``K``; masked: N - K; reconstructed: ``M``, all of the masked unless there is a decoder mask."""

    tokens: int
    visible: int
    masked: int
    reconstructed: int


def token_counts(strategy: str, grid: tuple[int, int, int], ratio: float, decoder_ratio: float = 0.0) -> TokenCounts:
    """How many tokens a mask of this kind has.

    Args:
        strategy: one of ``STRATEGIES``.
        grid: (t, h, w), the patch grid.
        ratio: masked fraction, in (0, 1).
        decoder_ratio: fraction of the masked tokens that is not reconstructed: 0, 0.25, 0.5 or 0.75.

    Raises:
        ValueError: as ``num_keep`` and ``num_reconstructed``.
    """
    tokens, visible = math.prod(grid), num_keep(strategy, grid, ratio)
    return TokenCounts(tokens, visible, tokens - visible, num_reconstructed(tokens - visible, decoder_ratio))


def make_mask(
    strategy: str,
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    *,
    decoder_ratio: float = 0.0,
    noise: torch.Tensor | None = None,
    phase: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    ops: Any = _kernels,
) -> Mask:
    """The mask of a batch of ``B`` clips.

    Args:
        strategy, grid, ratio, decoder_ratio: as for ``token_counts``.
        batch: ``B``.
        noise: [B, N] float32, as ``sample_noise`` draws it; default: drawn here.
        phase: [B] int64 in [0, 4), as ``sample_phase`` draws it; default: drawn with the noise, 0 for noise that is given. Of use
            to a decoder mask only.
        generator: source of what is drawn here.
        device: where the mask lies; default: the noise's device.
        ops: ``stmae.ops`` or ``stmae.reference``.

    Raises:
        ValueError: noise or phase of another shape or dtype; noise with which this ratio would keep parts of tubes or time
            slices, as it was drawn by another strategy (on CPUs; elsewhere with STMAE_DEBUG=1); and as ``token_counts``.
        RuntimeError: NaN in the noise (on CPUs).
    """
    count = num_keep(strategy, grid, ratio)
    if noise is None:
        noise = sample_noise(strategy, batch, grid, ratio, generator=generator, device=device)
        drawn = True
    elif not isinstance(noise, torch.Tensor):
        raise ValueError(f"make_mask: expected noise to be a tensor, got {type(noise).__name__}")
    elif tuple(noise.shape) != (batch, math.prod(grid)):
        raise ValueError(f"make_mask: expected noise [{batch}, {math.prod(grid)}] (B, N), got {list(noise.shape)}")
    else:
        drawn = False
    keep, masked = ops.random_masking(noise, count)
    if not drawn:
        _check_strategy(strategy, grid, keep)
    if num_reconstructed(masked.shape[1], decoder_ratio) < masked.shape[1]:
        if phase is None and drawn:
            phase = sample_phase(batch, generator=generator, device=noise.device)
        elif phase is None:
            phase = torch.zeros(batch, dtype=torch.int64, device=noise.device)
        masked = reconstructed(masked, noise, grid, decoder_ratio, phase=phase)
    return Mask(keep, masked)


def make_masks(
    strategy: str,
    grids: Sequence[tuple[int, int, int]],
    ratios: Sequence[float],
    *,
    decoder_ratio: float = 0.0,
    blocks: Blocks | None = None,
    noise: Sequence[torch.Tensor] | None = None,
    phase: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    ops: Any = _kernels,
) -> list[Mask]:
    """The masks of clips of any grids, each with its own number of visible tokens: ``Mask(keep [K], masked [M])`` of each.

    Args:
        strategy: one of ``ALL_STRATEGIES``.
        grids: (t, h, w) of each clip.
        ratios: masked fraction of each; ``multi_block`` does not use them.
        decoder_ratio: as for ``make_mask``.
        blocks: of ``multi_block``.
        noise: [N] float32 of each, as ``sample_noise`` draws it; default: drawn here. Not for ``multi_block``.
        phase, generator, device, ops: as for ``make_mask``, ``phase`` [S].

    Raises:
        ValueError, RuntimeError: as ``make_mask``.
    """
    if strategy == "multi_block":
        if noise is not None:
            raise ValueError("make_masks: expected no noise with strategy 'multi_block', whose blocks it cannot say")
        return [multi_block(grid, blocks or Blocks(), generator=generator, device=device) for grid in grids]
    counts = [num_keep(strategy, grid, ratio) for grid, ratio in zip(grids, ratios, strict=True)]
    tokens, drawn = [math.prod(grid) for grid in grids], noise is None
    if noise is None:
        noise = [
            sample_noise(strategy, 1, grid, ratio, generator=generator, device=device)[0] for grid, ratio in zip(grids, ratios)
        ]
    if len(noise) != len(grids) or not all(isinstance(x, torch.Tensor) and x.shape == (n,) for x, n in zip(noise, tokens)):
        raise ValueError(f"make_masks: expected noise of {tokens} tokens, one tensor [N] a clip, got others")
    first = list(itertools.accumulate(tokens, initial=0))
    cu_seqlens = torch.tensor(first).to(noise[0].device, non_blocking=True)
    keep, masked = ops.random_masking_varlen(torch.cat(list(noise)), cu_seqlens, counts)
    kept = keep.split(counts)
    hidden = masked.split([n - count for n, count in zip(tokens, counts)])
    masks = [Mask(k - start, m - start) for k, m, start in zip(kept, hidden, first)]
    if not drawn:
        for grid, mask in zip(grids, masks):
            _check_strategy(strategy, grid, mask.keep[None])
    if decoder_ratio == 0:
        return masks
    if phase is None:
        phase = sample_phase(len(grids), generator=generator) if drawn else torch.zeros(len(grids), dtype=torch.int64)
    phase = phase.to(keep.device)
    chosen = zip(masks, noise, grids, phase.split(1), strict=True)
    return [
        Mask(mask.keep, reconstructed(mask.masked[None], own[None], grid, decoder_ratio, phase=at)[0])
        for mask, own, grid, at in chosen
    ]


def multi_block(
    grid: tuple[int, int, int],
    blocks: Blocks,
    *,
    visible: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """V-JEPA's mask of one clip: masked is the union of some blocks, ``Mask(keep [K], masked [M])``. Where the blocks cover all
    they are drawn anew, and after a hundred times one token is left visible.

    In V-JEPA all blocks of a batch have one size; here each is drawn for itself. A block lies within the clip.

    Args:
        grid: (t, h, w), the patch grid, of two tokens or more.
        blocks: how many and how large.
        visible: for a batch that is filled before its masks are drawn, how many tokens may be visible: of several masks, the one
            that leaves most of those that leave no more; where of hundreds none did, the one that leaves fewest.
        generator: source of randomness.
        device: where the mask lies; default: the generator's device, or torch's default device.

    Source: Bardes et al. 2024, "Revisiting Feature Prediction for Learning Visual Representations from Video", section 3.3.
    """
    tokens = math.prod(grid)
    if tokens < 2:
        raise ValueError(f"masking: expected a grid of two tokens or more, got {grid[0]}x{grid[1]}x{grid[2]}")
    masks, rounds, most = (1, 100, tokens) if visible is None else (*_MASKS_TO_CHOOSE_FROM, visible)
    flat, fewest = torch.arange(tokens) > 0, tokens  # all but one masked, where blocks always cover all
    for _ in range(rounds):
        drawn = ~_union_of_blocks(masks, grid, blocks, generator, device).flatten(1)
        counts = drawn.sum(dim=1).tolist()
        fitting = [index for index, count in enumerate(counts) if 0 < count <= most]
        if fitting:
            flat = ~drawn[max(fitting, key=counts.__getitem__)]
            break
        for count, row in zip(counts, drawn):
            if 0 < count < fewest:
                flat, fewest = ~row, count
    keep, masked = (~flat).nonzero()[:, 0], flat.nonzero()[:, 0]
    target = device if device is not None or generator is None else generator.device
    return Mask(keep, masked) if target is None else Mask(keep.to(target), masked.to(target))


def visible_counts(grid: tuple[int, int, int], blocks: Blocks, masks: int, generator: torch.Generator) -> torch.Tensor:
    """How many tokens each of so many ``masks`` of ``multi_block`` leaves visible, of a clip of this patch grid: [masks] int64,
    ascending, one or more of each."""
    hidden = _union_of_blocks(masks, grid, blocks, generator, None).flatten(1)
    return (~hidden).sum(dim=1).clamp(min=1).sort().values


def _union_of_blocks(
    masks: int,
    grid: tuple[int, int, int],
    blocks: Blocks,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> torch.Tensor:
    """What the blocks of so many ``masks`` cover: [masks, t, h, w] bool, on the CPU."""
    source = generator.device if generator is not None else device
    draw = torch.rand(masks, blocks.number, 6, generator=generator, device=source, dtype=torch.float32)
    u = draw.cpu().double().movedim(2, 0)
    area = _between(blocks.scale, u[1]) * (grid[1] * grid[2])
    ratio = _between([math.log(x) for x in blocks.aspect], u[2]).exp()
    limits = torch.tensor(grid).view(3, 1, 1)
    sizes = torch.stack([_between(blocks.length, u[0]) * grid[0], (area * ratio).sqrt(), (area / ratio).sqrt()]).round()
    sizes = torch.minimum(sizes.clamp(min=1), limits)
    first = torch.minimum((u[3:] * (limits - sizes + 1)).floor(), limits - sizes)
    index = torch.arange(max(grid))
    along = ((index >= first[..., None]) & (index < (first + sizes)[..., None])).float()  # [3, masks, blocks, max(grid)]
    t, h, w = (own[..., :n] for own, n in zip(along, grid))
    frames = (h[..., None] * w[..., None, :]).flatten(2)  # [masks, blocks, h * w]
    return (t.transpose(1, 2) @ frames > 0).view(masks, *grid)  # by how many blocks each token is covered


def _between(bounds: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    return bounds[0] + x * (bounds[1] - bounds[0])


def num_keep(strategy: str, grid: tuple[int, int, int], ratio: float) -> int:
    """Number of tokens that stay visible, of the ``N = t * h * w`` in ``grid``.

    ``random`` and ``block`` keep ``int(N * (1 - ratio))``, truncated in double precision exactly as mae_st
    does it (3920 tokens at 0.9 keep 391, not 392). ``tube`` and ``frame`` mask ``int(n * ratio)`` of the
    ``n = h * w`` tubes or ``n = t`` time slices and keep the others complete, as VideoMAE does (8x14x14 at 0.9: 20
    tubes, 160 tokens).

    Raises:
        ValueError: unknown strategy, a ratio outside (0, 1), or one that keeps nothing or everything.
    """
    t, h, w = _check(strategy, grid, ratio)
    tokens = t * h * w
    if strategy == "tube":
        keep = t * (h * w - int(h * w * ratio))
    elif strategy == "frame":
        keep = h * w * (t - int(t * ratio))
    else:
        keep = int(tokens * (1 - ratio))
    if not 0 < keep < tokens:
        raise ValueError(
            f"masking: expected a ratio that keeps some and masks some of the tokens of grid "
            f"{t}x{h}x{w}, {tokens} in all, got {ratio}, with which '{strategy}' keeps {'nothing' if keep == 0 else 'everything'}"
        )
    return keep


def sample_noise(
    strategy: str,
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Noise ``[B, N]`` float32 whose ``num_keep(strategy, grid, ratio)`` smallest entries per row are the
    tokens to keep.

    Args:
        strategy: ``random``: any tokens; ``tube``: the same positions in every time slice; ``frame``: complete time
            slices; ``block``: what is masked is a union of random space-time boxes, the last one cut to give
            the exact count.
        batch: ``B``, each row drawn by itself.
        grid: ``(t, h, w)``, the patch grid; token index is ``(it * h + ih) * w + iw``.
        ratio: masked fraction. Only ``block`` draws differently for it, but every strategy checks it.
        generator: source of randomness; the noise is drawn on its device, then moved to ``device``.
        device: where the result lies; default: the generator's device, or torch's default device.

    Raises:
        ValueError: as ``num_keep``, or a negative ``batch``.
    """
    t, h, w = _check(strategy, grid, ratio)
    keep = num_keep(strategy, grid, ratio)
    if batch < 0:
        raise ValueError(f"masking: expected a batch size of at least 0, got {batch}")
    source = generator.device if generator is not None else device
    if strategy == "random":
        noise = torch.rand(batch, t * h * w, generator=generator, device=source, dtype=torch.float32)
        return noise if device is None else noise.to(device)
    # Two tubes or time slices with equal noise would be torn apart at the cut, and float32 noise does
    # collide; a permutation cannot.
    if strategy == "tube":
        noise = _permutation(batch, h * w, generator, source)[:, None].expand(batch, t, h * w)
    elif strategy == "frame":
        noise = _permutation(batch, t, generator, source)[:, :, None].expand(batch, t, h * w)
    else:
        noise = _block_noise(batch, (t, h, w), t * h * w - keep, generator, source)
    noise = noise.reshape(batch, t * h * w)
    return noise if device is None else noise.to(device)


def sample_phase(
    batch: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Where the running cells of each clip's decoder mask start: [B] int64 in [0, 4).

    Args:
        batch: ``B``.
        generator: source of randomness; drawn on its device, then moved to ``device``.
        device: where the result lies; default: the generator's device, or torch's default device.
    """
    source = generator.device if generator is not None else device
    phase = torch.randint(0, 4, (batch,), generator=generator, device=source)
    return phase if device is None else phase.to(device)


def num_reconstructed(num_masked: int, decoder_ratio: float) -> int:
    """How many of the masked tokens the decoder reconstructs: all but ``int(num_masked * decoder_ratio)``, and at least one.

    Raises:
        ValueError: a ratio that is not 0, 0.25, 0.5 or 0.75: cells of four positions have no others.
    """
    if decoder_ratio not in (0, 0.25, 0.5, 0.75):
        raise ValueError(f"masking: expected a decoder mask ratio of 0, 0.25, 0.5 or 0.75, got {decoder_ratio}")
    return max(min(num_masked, 1), num_masked - int(num_masked * decoder_ratio))


def reconstructed(
    masked: torch.Tensor, noise: torch.Tensor, grid: tuple[int, int, int], decoder_ratio: float, *, phase: torch.Tensor
) -> torch.Tensor:
    """The tokens of ``masked`` [B, M] that the decoder reconstructs, [B, num_reconstructed(M, decoder_ratio)], ascending:
    running-cell masking (VideoMAE V2, arXiv 2303.16727, section 3.2, after Qing et al., arXiv 2207.11660).

    Every 2x2 cell of positions hides ``4 * decoder_ratio`` of its four, and those that are hidden move on by one from a time
    slice to the next, so that over four slices each position is seen equally often. ``phase`` is where the pattern starts.

    With tubes over a multiple of four slices this is the pattern exactly. Otherwise the pattern leaves a few masked tokens
    more or less from clip to clip, and for an equal number in each, the ones with the lowest noise make up the difference:
    any of them, where the noise is random. Unlike in VideoMAE V2, tokens that the encoder saw are not decoded a second time.

    Args:
        masked: int64, ascending, as ``random_masking`` gives it.
        noise: [B, N], what the mask was made of.
        grid: (t, h, w), the patch grid.
        decoder_ratio: fraction of the masked tokens that is left out: 0, 0.25, 0.5 or 0.75.
        phase: [B] int64 in [0, 4).

    Raises:
        ValueError: a phase of another shape or dtype, and as ``num_reconstructed``.
    """
    count = num_reconstructed(masked.shape[1], decoder_ratio)
    if count == masked.shape[1]:
        return masked
    if not isinstance(phase, torch.Tensor) or phase.dtype != torch.int64 or tuple(phase.shape) != (masked.shape[0],):
        got = f"{list(phase.shape)} {phase.dtype}" if isinstance(phase, torch.Tensor) else type(phase).__name__
        raise ValueError(f"masking: expected phase [{masked.shape[0]}] (B) int64, got {got}")
    _, h, w = grid
    time, row, column = masked // (h * w), masked // w % h, masked % w
    hidden = (row % 2 * 2 + column % 2 + time + phase[:, None]) % 4 < int(4 * decoder_ratio)
    by_noise = noise.gather(1, masked).argsort(dim=1, stable=True)
    by_pattern = hidden.gather(1, by_noise).byte().argsort(dim=1, stable=True)
    return masked.gather(1, by_noise.gather(1, by_pattern)[:, :count]).sort(dim=1).values


def _check(strategy: str, grid: tuple[int, int, int], ratio: float) -> tuple[int, int, int]:
    if strategy == "multi_block":
        raise ValueError(
            "masking: expected a strategy with one number of visible tokens for a grid, got 'multi_block', with which every clip "
            "has its own: see make_masks, and the model's forward for a list of clips"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"masking: expected a strategy of {', '.join(STRATEGIES)}, got {strategy!r}")
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"masking: expected a patch grid (t, h, w) of positive sizes, got {tuple(grid)}")
    if not 0 < ratio < 1:  # also refuses NaN
        raise ValueError(f"masking: expected a mask ratio between 0 and 1 (exclusive), got {ratio}")
    t, h, w = grid
    return t, h, w


def _permutation(batch: int, size: int, generator: torch.Generator | None, device: torch.device | str | None) -> torch.Tensor:
    """A random permutation of 0..size-1 in each row: [B, size] float32 (exact up to 2**24)."""
    return torch.rand(batch, size, generator=generator, device=device, dtype=torch.float32).argsort(dim=1).float()


def _check_strategy(strategy: str, grid: tuple[int, int, int], keep: torch.Tensor) -> None:
    """Raises ValueError where keep [B, K] has parts of tubes or time slices, in which the strategy keeps or masks all tokens."""
    if strategy not in ("tube", "frame") or torch.compiler.is_compiling():
        return
    if keep.device.type != "cpu" and not _kernels.checks.DEBUG:  # there, the check would make the device wait
        return
    t, h, w = grid
    visible = torch.zeros(keep.shape[0], t, h * w, dtype=torch.bool, device=keep.device)
    visible.flatten(1).scatter_(1, keep, True)
    along = 1 if strategy == "tube" else 2
    if bool((visible.any(dim=along) != visible.all(dim=along)).any()):
        parts = {"tube": "tubes", "frame": "time slices"}[strategy]
        raise ValueError(
            f"make_mask: expected noise that keeps or masks complete {parts}, as strategy '{strategy}' does, got noise with "
            f"which keeping {keep.shape[1]} of {t * h * w} tokens keeps parts of some; draw it with "
            f"sample_noise('{strategy}', ...)"
        )


def _block_noise(
    batch: int, grid: tuple[int, int, int], num_masked: int, generator: torch.Generator | None, device: torch.device | str | None
) -> torch.Tensor:
    """Noise [B, N]: tokens of the first block highest, of the second next, ..., tokens in no block lowest.

    Within a block the noise grows or, in half of the rows, falls with the token index: masking the
    ``num_masked`` highest masks complete blocks and, of the block in which the count is reached, a contiguous
    end, late or early in time as often as not. Blocks may hang over the grid's border, where they are cut, so
    that each covers a corner as often as the middle.
    """
    t, h, w = grid
    tokens = t * h * w
    index = torch.arange(tokens, device=device)
    it, ih, iw = index // (h * w), index // w % h, index % w
    block = torch.full((batch, tokens), -1, device=device)  # in which block a token was first covered
    for number in range(_MAX_BLOCKS):
        if bool(((block >= 0).sum(dim=1) >= num_masked).all()):
            break
        draw = torch.rand(batch, 6, generator=generator, device=device, dtype=torch.float32)
        area = (_BLOCK_AREA[0] + draw[:, 0] * (_BLOCK_AREA[1] - _BLOCK_AREA[0])) * (h * w)
        low, high = math.log(_BLOCK_ASPECT[0]), math.log(_BLOCK_ASPECT[1])
        aspect = (low + draw[:, 1] * (high - low)).exp()
        depth = 1 + (draw[:, 2] * t).floor()
        height = (area * aspect).sqrt().round().clamp(1, h)
        width = (area / aspect).sqrt().round().clamp(1, w)
        covered = torch.ones_like(block, dtype=torch.bool)
        for position, extent, size, draw_index in ((it, depth, t, 3), (ih, height, h, 4), (iw, width, w, 5)):
            start = ((draw[:, draw_index] * (size + extent - 1)).floor() - extent + 1)[:, None]
            covered = covered & (position >= start) & (position < start + extent[:, None])
        block = torch.where(covered & (block < 0), number, block)
    # An integer rank per token: distinct, and exact in float32.
    backwards = torch.rand(batch, 1, generator=generator, device=device, dtype=torch.float32) < 0.5
    within = torch.where(backwards, tokens - 1 - index, index)
    order = torch.where(block >= 0, _MAX_BLOCKS - block, 0) * tokens + within
    return order.argsort(dim=1).argsort(dim=1).float()
