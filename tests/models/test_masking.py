"""Masking strategies: how many tokens are kept, and which."""

import pytest
import torch

from stmae import reference
from stmae.masking import (
    STRATEGIES,
    make_mask,
    num_keep,
    num_reconstructed,
    reconstructed,
    sample_noise,
    sample_phase,
    token_counts,
)

GRID = (8, 14, 14)


def masks(strategy, batch, grid, ratio, seed=0):
    """[B, t, h, w] bool, True where masked."""
    noise = sample_noise(strategy, batch, grid, ratio, generator=torch.Generator().manual_seed(seed))
    keep, masked = reference.random_masking(noise, num_keep(strategy, grid, ratio))
    assert torch.equal(torch.cat([keep, masked], dim=1).sort(dim=1).values, torch.arange(noise.shape[1]).expand_as(noise))
    return torch.zeros(noise.shape, dtype=torch.bool).scatter(1, masked, True).view(batch, *grid)


@pytest.mark.parametrize(
    "strategy, grid, ratio, expected",
    [
        ("random", GRID, 0.9, 156),
        ("random", (20, 14, 14), 0.9, 391),  # 3920 * (1 - 0.9) is 391.99999999999994
        ("random", GRID, 0.75, 392),
        ("block", GRID, 0.75, 392),
        ("tube", GRID, 0.9, 160),  # 20 tubes of 8; int(N * (1 - ratio)) = 156 would tear one
        ("tube", (8, 7, 5), 0.5, 144),
        ("frame", GRID, 0.75, 2 * 196),
        ("frame", GRID, 0.875, 196),
        ("frame", GRID, 0.9, 196),
    ],
)
def test_number_of_kept_tokens(strategy, grid, ratio, expected):
    assert num_keep(strategy, grid, ratio) == expected
    mask = masks(strategy, 3, grid, ratio)
    assert (~mask).flatten(1).sum(1).tolist() == [expected] * 3


def test_tube_masks_the_same_places_in_every_time_slice():
    mask = masks("tube", 16, GRID, 0.9)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert not torch.equal(mask[0], mask[1])


def test_frame_masks_whole_time_slices():
    mask = masks("frame", 16, GRID, 0.75).flatten(2)
    assert torch.equal(mask.all(2), mask.any(2))
    assert len({tuple(row.tolist()) for row in mask.all(2)}) > 4


@pytest.mark.parametrize("strategy", ["tube", "frame"])
def test_equal_random_numbers_tear_no_tube_or_frame(strategy, monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: (rand(*size, **options) * 3).floor() / 3)
    mask = masks(strategy, 16, GRID, 0.6)
    complete = mask[:, :1].expand_as(mask) if strategy == "tube" else mask[:, :, :1, :1].expand_as(mask)
    assert torch.equal(mask, complete)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_place_is_sometimes_masked_and_sometimes_kept(strategy):
    mask = masks(strategy, 400, (4, 5, 6), 0.75)
    assert mask.any(0).all()
    assert (~mask).any(0).all()
    fraction = mask.float().mean(0)  # 400 draws: a standard deviation of 0.02
    assert fraction.min() > 0.65 and fraction.max() < 0.85


def test_blocks_hang_together():
    def neighbours(mask):
        """Fraction of masked tokens' neighbours, along all three axes, that are masked, too."""
        pairs = [(mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1]), (mask[..., 1:], mask[..., :-1])]
        return sum((a & b).sum() for a, b in pairs) / sum((a | b).sum() for a, b in pairs)

    block, random = masks("block", 32, GRID, 0.75), masks("random", 32, GRID, 0.75)
    assert neighbours(random) < 0.65  # 0.75^2 / (1 - 0.25^2) = 0.6
    assert neighbours(block) > 0.8


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.99])
def test_blocks_reach_every_ratio_exactly(ratio):
    mask = masks("block", 4, (4, 6, 5), ratio)
    assert (~mask).flatten(1).sum(1).tolist() == [int(120 * (1 - ratio))] * 4


def test_the_first_block_is_a_box():
    noise = sample_noise("block", 16, GRID, 0.75, generator=torch.Generator().manual_seed(1))
    largest = []
    for order in noise.argsort(dim=1, descending=True):  # token ids, those masked first in front
        places = torch.stack([order // 196, order // 14 % 14, order % 14])
        extent = places.cummax(dim=1).values - places.cummin(dim=1).values + 1
        count = torch.arange(1, order.numel() + 1)
        largest.append(int(count[(extent.prod(0) == count) & (count < order.numel())].max()))
    # By chance two or three neighbours are a box; a complete first block, where the border does not cut it, has dozens of tokens.
    assert sorted(largest)[8] > 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_generator_reproduces_the_noise(strategy):
    a, b, c = (sample_noise(strategy, 2, (4, 3, 5), 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.float32 and a.shape == (2, 60) and a.is_contiguous()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_batch_is_fine(strategy):
    assert sample_noise(strategy, 0, (4, 3, 5), 0.5).shape == (0, 60)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ratios_outside_zero_and_one_are_refused(strategy, ratio):
    with pytest.raises(ValueError, match="mask ratio between 0 and 1"):
        num_keep(strategy, GRID, ratio)
    with pytest.raises(ValueError, match="mask ratio between 0 and 1"):
        sample_noise(strategy, 2, GRID, ratio)


@pytest.mark.parametrize(
    "strategy, grid, ratio, word",
    [
        ("random", (2, 2, 2), 0.9, "nothing"),
        ("block", (2, 2, 2), 0.9, "nothing"),
        ("random", (2, 2, 2), 1e-17, "everything"),
        ("tube", (8, 2, 2), 0.2, "everything"),
        ("frame", (4, 9, 9), 0.2, "everything"),
    ],
)
def test_ratios_that_keep_nothing_or_everything_are_refused(strategy, grid, ratio, word):
    with pytest.raises(ValueError, match=f"got {ratio}, with which '{strategy}' keeps {word}"):
        num_keep(strategy, grid, ratio)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="strategy of random, tube, frame, block, got 'cube'"):
        num_keep("cube", GRID, 0.5)
    with pytest.raises(ValueError, match="patch grid"):
        num_keep("random", (8, 0, 14), 0.5)
    with pytest.raises(ValueError, match="batch size of at least 0, got -1"):
        sample_noise("random", -1, GRID, 0.5)


# --- running cells: what the decoder reconstructs ---


def decoder_masks(strategy, batch, grid, ratio, decoder_ratio, seed=0):
    """masked and reconstructed [B, t, h, w] bool."""
    noise = sample_noise(strategy, batch, grid, ratio, generator=torch.Generator().manual_seed(seed))
    _, masked = reference.random_masking(noise, num_keep(strategy, grid, ratio))
    phase = sample_phase(batch, generator=torch.Generator().manual_seed(seed))
    chosen = reconstructed(masked, noise, grid, decoder_ratio, phase=phase)
    assert (chosen.diff(dim=1) > 0).all() and chosen.shape[1] == num_reconstructed(masked.shape[1], decoder_ratio)
    empty = torch.zeros(noise.shape, dtype=torch.bool)
    return (empty.scatter(1, ids, True).view(batch, *grid) for ids in (masked, chosen))


def cell_pattern(grid, decoder_ratio, start):
    """[t, h, w] bool, True where shown: a queue of four, hidden ones first, that runs by one place in each time slice."""
    queue = [False] * int(4 * decoder_ratio) + [True] * (4 - int(4 * decoder_ratio))
    pattern = torch.zeros(grid, dtype=torch.bool)
    for t in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                pattern[t, y, x] = queue[(2 * (y % 2) + x % 2 + t + start) % 4]
    return pattern


@pytest.mark.parametrize("decoder_ratio", [0.25, 0.5, 0.75])
def test_with_tubes_the_decoder_sees_the_running_cells_exactly(decoder_ratio):
    masked, chosen = decoder_masks("tube", 32, GRID, 0.9, decoder_ratio)
    patterns = [cell_pattern(GRID, decoder_ratio, start) for start in range(4)]
    starts = [[start for start in range(4) if torch.equal(one & patterns[start], other)] for one, other in zip(masked, chosen)]
    assert all(len(found) == 1 for found in starts)
    assert {found[0] for found in starts} == {0, 1, 2, 3}


@pytest.mark.parametrize("decoder_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [GRID, (3, 5, 7)])
def test_the_decoder_sees_the_cells_but_for_a_few(strategy, grid, decoder_ratio):
    masked, chosen = decoder_masks(strategy, 16, grid, 0.6, decoder_ratio)
    assert not (chosen & ~masked).any()
    patterns = torch.stack([cell_pattern(grid, decoder_ratio, start) for start in range(4)])
    agreeing = ((chosen[:, None] == (masked[:, None] & patterns)) | ~masked[:, None]).flatten(2).float().mean(2)
    assert (agreeing.amax(1) > (0.95 if grid == GRID else 0.85)).all()


def test_every_place_is_reconstructed_equally_often():
    masked, chosen = decoder_masks("random", 2000, (4, 4, 6), 0.75, 0.5)
    fraction = (chosen.float().sum(0) / masked.float().sum(0)).flatten()
    assert fraction.min() > 0.44 and fraction.max() < 0.56  # 1500 draws each: a standard deviation of 0.013


def test_no_decoder_mask_is_all_that_is_masked():
    masked = torch.arange(5).expand(2, -1)
    assert reconstructed(masked, torch.rand(2, 8), (2, 2, 2), 0, phase=torch.zeros(2).long()) is masked
    assert num_reconstructed(1, 0.75) == 1 and num_reconstructed(0, 0.5) == 0  # something to learn from, where there is
    for ratio in (0.1, 1, -0.25, float("nan")):
        with pytest.raises(ValueError, match="decoder mask ratio of 0, 0.25, 0.5 or 0.75, got"):
            num_reconstructed(8, ratio)


def test_the_phase_starts_the_pattern_and_the_noise_does_not():
    noise = sample_noise("tube", 4, GRID, 0.9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise, noise.round())  # no bits beside the permutation
    masked = make_mask("tube", 4, GRID, 0.9, noise=noise).masked
    for start in range(4):
        chosen = make_mask("tube", 4, GRID, 0.9, noise=noise, decoder_ratio=0.5, phase=torch.full((4,), start)).masked
        shown = cell_pattern(GRID, 0.5, start).flatten()
        assert all(torch.equal(one[shown[one]], other) for one, other in zip(masked, chosen))
    zero = make_mask("tube", 4, GRID, 0.9, noise=noise, decoder_ratio=0.5, phase=torch.zeros(4).long())
    assert all(torch.equal(a, b) for a, b in zip(make_mask("tube", 4, GRID, 0.9, noise=noise, decoder_ratio=0.5), zero))
    for phase in (torch.zeros(3).long(), torch.zeros(4), 1):
        with pytest.raises(ValueError, match=r"expected phase \[4\] \(B\) int64, got"):
            make_mask("tube", 4, GRID, 0.9, noise=noise, decoder_ratio=0.5, phase=phase)


@pytest.mark.parametrize("strategy, other", [("tube", "random"), ("tube", "frame"), ("frame", "tube"), ("frame", "block")])
def test_noise_that_would_tear_tubes_or_slices_is_refused(strategy, other):
    noise = sample_noise(other, 2, GRID, 0.75)
    with pytest.raises(ValueError, match=f"as strategy '{strategy}' does, got noise with which keeping .* keeps parts of some"):
        make_mask(strategy, 2, GRID, 0.75, noise=noise)
    own = sample_noise(strategy, 2, GRID, 0.75)
    for ratio in (0.25, 0.5, 0.8):  # of another ratio, it is what sample_noise would draw for this one
        counts = token_counts(strategy, GRID, ratio)
        mask = make_mask(strategy, 2, GRID, ratio, noise=own)
        assert (mask.keep.shape[1], mask.masked.shape[1]) == (counts.visible, counts.masked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_counts_are_those_of_the_masks(strategy):
    for decoder_ratio in (0, 0.25, 0.75):
        counts = token_counts(strategy, GRID, 0.8, decoder_ratio)
        mask = make_mask(strategy, 1, GRID, 0.8, decoder_ratio=decoder_ratio)
        assert counts == (1568, mask.keep.shape[1], 1568 - mask.keep.shape[1], mask.masked.shape[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_default_dtype_changes_no_mask(strategy):
    def draw():
        noise = sample_noise(strategy, 2, GRID, 0.75, generator=torch.Generator().manual_seed(5))
        return noise, *make_mask(strategy, 2, GRID, 0.75, decoder_ratio=0.5, generator=torch.Generator().manual_seed(5))

    expected = draw()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            got = draw()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected))
