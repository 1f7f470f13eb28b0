"""How long and how large each clip of a packed batch is: drawn by seed and place in the order, before a file is opened.

A draw gives a clip's frames and the most patches that each of them may have, its *area*. What a clip of native size then has
follows from its video's aspect ratio: a patch grid (h, w) with h * w at most the area, see ``native_grid``. So how many tokens a
batch holds at most is known when it is filled, and depends on nothing that is in the files.

What has an image's name is a clip of one tubelet.
"""

import functools
import math

import numpy as np
import torch

from stmae.masking import TokenCounts, visible_counts

from ..config.sources import suffix_of
from .images import IMAGE_EXTENSIONS
from .transforms import Crop, random_crop, view_box

QUANTILES = 32  # of the visible tokens of masks of unequal numbers, of which each clip is given one
DRAWS = 512  # masks that they are of
SEARCHED = 256  # patches: of larger areas a quarter is enough for any mask


class ClipShapes:
    """The shapes of clips that a pre-training run draws.

    model: a MaskedAutoencoderConfig. clips: a ClipConfig, whose ``repeats`` clips are drawn for a sample. pictures: whether there
    are any among the videos.

    Raises ValueError for a shape of which the model's masks keep nothing or everything.
    """

    def __init__(self, model, clips, *, pictures=False):
        self.model, self.repeats, self.native = model, clips.repeats, clips.size == "native"
        self.patch = model.patch_size
        self.tubelet, self.frames = model.tubelet_size, clips.frames or (model.num_frames,)
        self.settings = clips
        self.slices = sorted({*([1] if pictures else []), *(frames // self.tubelet for frames in self.frames)})
        if self.native:
            whole = math.sqrt(math.prod(model.image_size))
            self.sides = clips.side or (whole, whole)
            self.areas = tuple(int(side**2 / math.prod(self.patch) + 1e-9) for side in self.sides)
        else:
            self.areas = (math.prod(model.grid[1:]),) * 2
        for slices in self.slices:
            smallest = fewest_tokens(self.areas[0]) if self.native else self.areas[0]
            if slices * smallest < 2:
                raise ValueError(f"masking: expected clips of two tokens or more, may get one of {slices * smallest}")
            try:
                self.counts(slices, smallest)
            except ValueError as error:
                raise ValueError(f"of the smallest clip that may be drawn: {error}") from error

    @property
    def token_bytes(self):
        """Of the uint8 pixels of a patch."""
        return self.model.in_channels * self.tubelet * math.prod(self.patch)

    def draw(self, seed, epoch, pictures):
        """(frames, areas, costs) int64 [samples, repeats] of the samples of an epoch. pictures: bool [samples].

        A clip's cost is the tokens that the encoder and the decoder see, K + (K + M), at most. Of ``multi_block`` it is drawn as
        those of its masks are distributed, and the mask is then drawn for it: see ``visible``."""
        rng = np.random.default_rng([seed, epoch, 0, 2])  # another stream than those of the order and of the samples
        size = (len(pictures), self.repeats)
        frames = np.array(self.frames)[rng.integers(len(self.frames), size=size)]
        frames = np.where(pictures[:, None], self.tubelet, frames)
        areas = np.full(size, self.areas[0])
        if self.native:
            areas = (rng.uniform(*self.sides, size=size) ** 2 / math.prod(self.patch) + 1e-9).astype(np.int64)
        quantiles = rng.integers(QUANTILES, size=size) if self._fractions is not None else 0
        return frames, areas, self._costs(frames // self.tubelet, areas, quantiles)

    def tokens(self, frames, areas):
        """N at most."""
        return frames // self.tubelet * areas

    def _costs(self, slices, areas, quantiles):
        """K + (K + M), at most, of clips of these shapes, integers or arrays; of ``multi_block`` with the visible tokens of these
        of its quantiles."""
        if self._fractions is None:
            return self._table[slices, areas - self.areas[0]]
        tokens = slices * areas
        return tokens + np.clip(np.rint(self._fractions[slices, quantiles] * tokens).astype(np.int64), 1, tokens - 1)

    def visible(self, slices, area, cost, tokens):
        """How many of a clip's ``tokens`` are visible at most, which was drawn with ``slices``, ``area`` and ``cost``: the part
        that was drawn, so that it costs no more. None: as the mask strategy says."""
        return None if self._fractions is None else max(1, (cost - slices * area) * tokens // (slices * area))

    def counts(self, slices, area):
        """The TokenCounts of a clip of ``slices`` time slices and ``area`` patches in each; of ``multi_block`` those expected."""
        tokens = slices * area
        if self._fractions is not None:
            visible = min(max(round(self._fractions[slices].mean() * tokens), 1), tokens - 1)
            return TokenCounts(tokens, visible, tokens - visible, tokens - visible)
        return self.model.token_counts(grid=(slices, 1, area))

    def cost(self, slices, area):
        """Tokens that the encoder and the decoder see of it, K + (K + M), expected."""
        counts = self.counts(slices, area)
        return 2 * counts.visible + counts.reconstructed

    @property
    def standard_cost(self):
        """Of a sample whose clips have the model's own size."""
        t, h, w = self.model.grid
        return self.repeats * self.cost(t, h * w)

    @functools.cached_property
    def _table(self):
        """Costs [time slices, areas], 0 where none are drawn."""
        lowest, highest = self.areas
        table = np.zeros((max(self.frames) // self.tubelet + 1, highest - lowest + 1), np.int64)
        for slices in self.slices:
            for area in range(lowest, highest + 1):
                table[slices, area - lowest] = self.cost(slices, area)
        return table

    @functools.cached_property
    def _fractions(self):
        """Of ``multi_block``: visible tokens over all, [time slices, QUANTILES] ascending, in masks of the model's frames that
        were drawn for this: the highest of each QUANTILES-th part of them. None: of other strategies."""
        if self.model.mask_strategy != "multi_block":
            return None
        generator, (t, h, w) = torch.Generator().manual_seed(0), self.model.grid
        fractions = np.zeros((max(*self.slices, t) + 1, QUANTILES))
        for slices in sorted({*self.slices, t}):
            counts = visible_counts((slices, h, w), self.model.blocks, DRAWS, generator).numpy()
            fractions[slices] = counts[DRAWS // QUANTILES - 1 :: DRAWS // QUANTILES] / (slices * h * w)
        return fractions

    @functools.cached_property
    def most_tokens(self):
        """N of the largest clip."""
        return max(self.frames) // self.tubelet * self.areas[1]

    @functools.cached_property
    def most_cost(self):
        """Of a sample, of the most."""
        return self.repeats * max(int(self._costs(slices, self.areas[1], QUANTILES - 1)) for slices in self.slices)

    @property
    def what_costs_most(self):
        """In words."""
        return f"what a video's {'clip costs' if self.repeats == 1 else f'{self.repeats} clips cost'} at most"

    def mean(self, of_clip):
        """Of a video's clips, the mean of of_clip(time slices, area) over what is drawn."""
        areas = range(self.areas[0], self.areas[1] + 1)
        weights = np.ones(1)
        if self.native and self.sides[0] < self.sides[1]:
            edges = np.sqrt(np.array([*areas, self.areas[1] + 1]) * math.prod(self.patch))
            weights = np.diff(edges.clip(*self.sides)) / (self.sides[1] - self.sides[0])
        slices = [frames // self.tubelet for frames in self.frames]
        return float(np.mean([np.dot([of_clip(n, area) for area in areas], weights) for n in slices]))

    @functools.cached_property
    def mean_cost(self):
        """Of a sample of a video, expected."""
        return self.repeats * self.mean(self.cost)

    @functools.cached_property
    def tokens_per_cost(self):
        """N over cost, at most: how many tokens there can be in a micro-batch of some cost."""
        areas = np.arange(self.areas[0], self.areas[1] + 1)
        return max(float((slices * areas / self._costs(slices, areas, 0)).max()) for slices in self.slices)

    def crop(self, rng, height, width, area):
        """A random Crop of frames of this height and width, as of a clip of this ``area``."""
        settings = self.settings
        if not self.native:
            return random_crop(rng, height, width, self.model.image_size, settings.scale, settings.aspect, settings.flip)
        return native_crop(height, width, area, self.patch, rng.random(), bool(settings.flip and rng.random() < 0.5))


def native_crop(height, width, area, patch, position=0.5, flip=False):
    """The Crop that keeps the aspect ratio of frames, in ``native_grid``'s size. What the grid does not reach, less than a patch
    as a rule, is left out; position: in [0, 1], where the box lies along that side."""
    h, w = native_grid(height, width, area, patch)
    size = (h * patch[0], w * patch[1])
    return Crop(view_box(height, width, size, position), size, flip)


@functools.lru_cache(maxsize=4096)
def native_grid(height, width, area, patch):
    """(h, w) in patches, h * w <= ``area``, for frames of this height and width: where the fraction of the frame that a box of
    this shape keeps, squared, times the fraction of the area that it uses is largest. It uses more than a quarter, for else a
    grid twice as high and wide would be better.
    """
    aspect = width / patch[1] * patch[0] / height  # of the frame, in patches
    best = (0.0, 0, 1, 1)
    for h in range(1, area + 1):
        widest = area // h
        for w in {min(widest, max(1, math.floor(h * aspect))), min(widest, max(1, math.ceil(h * aspect)))}:
            kept = min(aspect * h / w, w / (aspect * h))
            best = max(best, (kept**2 * h * w / area, h * w, h, w))
    return best[2:]


@functools.lru_cache
def fewest_tokens(area):
    """The least h * w that ``native_grid`` gives for an ``area``, whatever the frame; of large ones its bound.

    A grid that is best for a frame is best for one of its own shape, too: to that one its score is nearest to its highest."""
    tokens = area // 4 + 1
    while area <= SEARCHED and tokens < area:
        for h in range(1, tokens + 1):
            if tokens % h == 0 and math.prod(native_grid(h, tokens // h, area, (1, 1))) <= tokens:
                return tokens
        tokens += 1
    return tokens


def is_picture(entry):
    """Whether an Entry's name is that of an image: a clip of one tubelet."""
    return not entry.frames and suffix_of(entry.path) in IMAGE_EXTENSIONS
