"""Clips of any shapes for packed batches, which lie in a batch's memory one after another."""

import math

import numpy as np
import torch

from .clip_sampling import random_clip
from .clip_shapes import is_picture, native_crop
from .dataset import NOTES, RandomClips, ViewClips, length_of, short_note, within
from .decoders import open_entry
from .outage import PATIENCE


class PackedClips(RandomClips):
    """Random clips of the videos ``entries`` with their masks, for pre-training; indexed by (epoch, video number, shapes), as a
    PackedBatchSampler gives them.

    An item is a dict of lists, one entry a clip: ``clips`` uint8 [T, H, W, C], ``keep`` int64 [K], ``masked`` int64 [M] (see
    ``stmae.masking.Mask``); and ``skipped`` and ``short``, as of RandomClips. A batch has the same lists, longer.

    shapes: a ClipShapes. sample_mask: called with a patch grid (t, h, w), generator=... and visible=..., gives the Mask
    of one clip; visible: see ``ClipShapes.visible``.
    """

    def __init__(self, entries, clips, *, shapes, seed, sample_mask, patience=PATIENCE):
        super().__init__(entries, clips, frames=None, size=(), seed=seed, patience=patience)
        self.shapes, self.sample_mask = shapes, sample_mask

    def __getitem__(self, key):
        ((first, end),) = self.places([key])
        memory = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._layout(end - first).items()}
        return self.joined(memory, [key], [self.fill(key, memory)])

    def _layout(self, tokens):
        return {"pixels": ((tokens * self.shapes.token_bytes,), torch.uint8), "ids": ((tokens,), torch.int64)}

    def batch_layout(self, sampler):
        return self._layout(sampler.capacity)

    def _starts(self, key):
        """Where the clips of an item begin in it, and its end, in tokens."""
        sizes = [int(self.shapes.tokens(frames, area)) for frames, area, _ in key[2]]
        return [0, *np.cumsum(sizes).tolist()]

    def places(self, keys):
        ends = np.cumsum([0, *(self._starts(key)[-1] for key in keys)]).tolist()
        return list(zip(ends, ends[1:]))

    def at(self, memory, place):
        first, end = place
        size = self.shapes.token_bytes
        return {"pixels": memory["pixels"][first * size : end * size], "ids": memory["ids"][first:end]}

    def joined(self, memory, keys, notes):
        batch = {
            "clips": [],
            "keep": [],
            "masked": [],
            **{name: [note for item in notes for note in item[name]] for name in NOTES},
        }
        for key, place, item in zip(keys, self.places(keys), notes):
            out = self.at(memory, place)
            for start, (size, visible, hidden) in zip(self._starts(key), item["sizes"]):
                batch["clips"].append(self._pixels(out, start, size))
                batch["keep"].append(out["ids"][start : start + visible])
                batch["masked"].append(out["ids"][start + visible : start + visible + hidden])
        return batch

    def _pixels(self, out, start, size):
        """The clip uint8 [T, H, W, C] of this ``size`` that begins at token ``start``."""
        first = start * self.shapes.token_bytes
        return out["pixels"][first : first + int(np.prod(size))].view(size)

    def _read(self, epoch, number, out, drawn):
        entry, shapes, settings = self.entries[number], self.shapes, self.clips
        self.raise_if_left_out(entry)
        starts = self._starts((epoch, number, drawn))
        if is_picture(entry):  # in the place of a video, too
            lengths = [shapes.tubelet] * len(drawn)
        else:
            lengths = [frames for frames, _, _ in drawn]
        rngs = [np.random.default_rng([self.seed, epoch, number, r, 0]) for r in range(len(drawn))]
        clips, masks = [], []
        with open_entry(entry, settings.decoder, settings.pixels) as video:
            indices = []
            for rng, frames in zip(rngs, lengths):
                length = length_of(video, frames, settings)
                wanted = random_clip(rng, length, frames, settings.stride, settings.spacing)
                indices.append(within(video, wanted, settings))
            states = [rng.bit_generator.state for rng in rngs]

            def crops(height, width):
                """The clips' places and masks are known when their video's frames are."""
                for rng, state in zip(rngs, states):
                    rng.bit_generator.state = state
                made, masks[:] = zip(*(self._crop(*own, height, width) for own in zip(rngs, drawn, lengths)))
                sizes = [(frames, *crop.size, 3) for frames, crop in zip(lengths, made)]
                clips[:] = [self._pixels(out, start, size).numpy() for start, size in zip(starts, sizes)]
                return list(made)

            video.clips(indices, crops, clips)
            short = short_note(entry.path, video, max(lengths), settings)
        sizes = []
        for start, clip, mask in zip(starts, clips, masks):
            ids = torch.cat(mask)
            out["ids"][start : start + len(ids)] = ids
            sizes.append((clip.shape, len(mask.keep), len(mask.masked)))
        return {"short": short, "sizes": sizes}

    def _crop(self, rng, drawn, length, height, width):
        """(Crop, Mask) of a clip of frames of this size. Where no mask of so many frames is as small as was drawn, as of a narrow
        strip that few blocks fit into, it is a smaller crop that costs no more with any mask."""
        shapes, (frames, area, cost) = self.shapes, drawn
        for most in (area, max(1, cost // (2 * (length // shapes.tubelet)))):
            crop = shapes.crop(rng, height, width, most)
            grid = length // shapes.tubelet, *(n // p for n, p in zip(crop.size, shapes.patch))
            visible = shapes.visible(frames // shapes.tubelet, area, cost, math.prod(grid))
            mask = self.sample_mask(grid, generator=torch.Generator().manual_seed(int(rng.integers(2**63))), visible=visible)
            if visible is None or math.prod(grid) + len(mask.keep) <= cost:
                break
        return crop, mask


class NativeViews(ViewClips):
    """Deterministic views in their video's own aspect ratio, of at most the area of the model's frames; a picture is a clip of
    one tubelet. Items are as of ViewClips, with ``clips`` uint8 [temporal, T, H, W, C], the shape of each video's own."""

    def __init__(self, entries, clips, model, **options):
        super().__init__(entries, clips, frames=model.num_frames, size=model.image_size, **options)
        if self.spatial != 1 or self.crop_pct != 1:
            raise ValueError(
                f"views: expected one spatial view and crop_pct 1 of frames of native size, got {self.spatial} and "
                f"{self.crop_pct:g}"
            )
        self.tubelet, self.patch, self.area = model.tubelet_size, model.patch_size, math.prod(model.grid[1:])

    def frames_of(self, entry):
        return self.tubelet if is_picture(entry) else self.frames

    def crops(self, height, width):
        return [native_crop(height, width, self.area, self.patch)]


def evaluation_views(entries, clips, model, **options):
    """The views of an evaluation by a model of the configuration ``model``: NativeViews or ViewClips, as ``clips.size`` says."""
    if clips.size == "native":
        return NativeViews(entries, clips, model, **options)
    return ViewClips(entries, clips, frames=model.num_frames, size=model.image_size, **options)
