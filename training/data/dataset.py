"""Videos as clips: uint8 all the way, R clips from one opened file, broken files replaced, absent ones waited for.

What a sample holds is a pure function of (seed, epoch, video number, repeat): frame choice, crop, flip and mask all come
from a generator seeded with these, never from a worker's own random state, nor from what it found broken before. So the number of
workers changes nothing, and a run resumes in mid-epoch exactly, with files that are damaged in part too.
"""

import functools
import re

import numpy as np
import torch
from torch.utils.data import Dataset

from ..config.sources import absolute, is_url
from ..config.wording import counted
from .clip_sampling import clip_span, random_clip, spaced_clips
from .decoders import open_entry
from .outage import LASTING, PATIENCE, DataAwayError, PatientReader, was_read
from .randaugment import rand_augment
from .transforms import Crop, random_crop, random_erasing, view_box
from .video import VideoError, printable

SUBSTITUTES = 200  # samples tried in the place of a broken one before the run stops


class RandomClips(Dataset):
    """Random clips of the videos ``entries``, for training; indexed by (epoch, video number).

    An item is a dict: ``clips`` uint8 [R, T, H, W, C], what ``extras`` adds for each clip, ``skipped``, a list of
    (path, reason) of the broken videos that were passed over to find it, and ``short``, a list of (path, what is done about it)
    where the video has fewer frames than a clip reaches over.

    clips: a ClipConfig; frames, size: of a clip, T and (H, W). patience: seconds to wait for data that are away.

    A batch is a dict of tensors [B * R, ...] by the names of an item's. How items lie in its memory is said by ``batch_layout``,
    ``places``, ``at`` and ``joined``, which a data set of other batches overrides.
    """

    def __init__(self, entries, clips, *, frames, size, seed, patience=PATIENCE):
        self.entries, self.clips, self.frames, self.size, self.seed = entries, clips, frames, tuple(size), seed
        self.patient = PatientReader(patience)
        self.left_out = frozenset()  # absolute paths of videos that are treated as broken
        # (videos, weight) of the lists that ``entries`` are from, see batch_sampler.VideoOrder.
        self.lists = [(len(entries), 1.0)]

    reading = staticmethod(lambda number: None)  # see loader.Reading

    def extras(self, rng, entry):
        """{name: tensor [1, ...]} that goes with a clip."""
        raise NotImplementedError

    def augment(self, rng, clip):
        """The clip uint8 [T, h, w, C], cropped and mirrored already, augmented further."""
        return clip

    def raise_if_left_out(self, entry):
        """Raises VideoError for one of ``left_out``."""
        if self.left_out and absolute(entry.path) in self.left_out:
            raise VideoError(entry.path, "left out, as left_out.txt in the run's folder says")

    def __len__(self):
        return len(self.entries)

    @functools.cached_property
    def layout(self):
        """{name: (shape, dtype)} of the tensors of an item."""
        extras = self.extras(np.random.default_rng(0), self.entries[0])
        shapes = {name: ((self.clips.repeats, *value.shape[1:]), value.dtype) for name, value in extras.items()}
        return {"clips": ((self.clips.repeats, self.frames, *self.size, 3), torch.uint8), **shapes}

    def __getitem__(self, key):
        out = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.layout.items()}
        return {**out, **self.fill(key, out)}

    def batch_layout(self, sampler):
        """{name: (shape, dtype)} of a micro-batch's memory."""
        return {name: ((sampler.videos, *shape), dtype) for name, (shape, dtype) in self.layout.items()}

    def places(self, keys):
        """Where each item of a micro-batch lies in its memory, for ``at``."""
        return range(len(keys))

    def at(self, memory, place):
        """The tensors of an item, for ``fill``."""
        return {name: value[place] for name, value in memory.items()}

    def joined(self, memory, keys, notes):
        """The micro-batch that lies in ``memory``, with what ``fill`` gave for its items in one list for each name."""
        lists = {name: [note for item in notes for note in item[name]] for name in NOTES}
        return {**{name: value.flatten(0, 1) for name, value in memory.items()}, **lists}

    def fill(self, key, out):
        """Writes the tensors of item ``key`` to ``out``, which has the ``layout``. Returns the rest: ``skipped``, ``short``."""
        return self.patient(functools.partial(self._sample, key, out))

    def _sample(self, key, out):
        epoch, first, *shapes = key
        number, errors = first, []
        for attempt in range(SUBSTITUTES + 1):
            if attempt:  # another video instead, drawn by the same key so that every run draws the same
                number = self._any_of_the_list(number, np.random.default_rng([self.seed, epoch, first, attempt, 1]))
            try:
                self.reading(number)
                notes = self._read(epoch, number, out, *shapes)
            except VideoError as error:  # not remembered: another clip of the same video may be readable, or it may come back
                self.patient.raise_if_away(error)
                errors.append(error)
            else:
                was_read(self.entries[number])
                return {"skipped": [(error.path, error.reason) for error in errors], **notes}
            finally:
                self.reading(-1)
        self.patient.raise_if_all_away(errors)
        raise RuntimeError(f"{SUBSTITUTES + 1} videos in a row could not be read, the last: {errors[-1]}; see 'stmae data check'")

    def _any_of_the_list(self, number, rng):
        """A video of the list that video ``number`` is of, so that its weight stays."""
        start = 0
        for videos, _ in self.lists:
            if number < start + videos:
                break
            start += videos
        return start + int(rng.integers(videos))

    def _read(self, epoch, number, out):
        """Fills ``out`` with clips of one video; returns what is noted of it: ``short``, its ``short_note``."""
        entry = self.entries[number]
        self.raise_if_left_out(entry)
        settings = self.clips
        rngs = [np.random.default_rng([self.seed, epoch, number, r, 0]) for r in range(settings.repeats)]
        with open_entry(entry, settings.decoder, settings.pixels) as video:
            length = length_of(video, self.frames, settings)
            wanted = [random_clip(rng, length, self.frames, settings.stride, settings.spacing) for rng in rngs]
            drawn = [rng.bit_generator.state for rng in rngs]

            def crops(height, width):
                for rng, state in zip(rngs, drawn):
                    rng.bit_generator.state = state
                return [
                    random_crop(rng, height, width, self.size, settings.scale, settings.aspect, settings.flip) for rng in rngs
                ]

            indices = [within(video, clip, settings) for clip in wanted]
            video.clips(indices, crops, out["clips"].numpy())  # one pass for all repeats
            short = short_note(entry.path, video, self.frames, settings)
        for r, (rng, clip) in enumerate(zip(rngs, out["clips"])):
            augmented = self.augment(rng, clip)
            if augmented is not clip:
                clip.copy_(augmented)
            for name, value in self.extras(rng, entry).items():
                out[name][r] = value[0]
        return {"short": short}


class PretrainClips(RandomClips):
    """Adds each clip's mask: ``keep`` int64 [R, K] and ``masked`` int64 [R, M] (see ``stmae.masking.Mask``).

    sample_mask: called with generator=..., gives the Mask of one clip, such as ``functools.partial(make_mask, "random", 1, grid,
        0.9)``.
    """

    def __init__(self, entries, clips, *, frames, size, seed, sample_mask, patience=PATIENCE):
        super().__init__(entries, clips, frames=frames, size=size, seed=seed, patience=patience)
        self.sample_mask = sample_mask

    def extras(self, rng, entry):
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self.sample_mask(generator=generator)._asdict()


class LabelledClips(RandomClips):
    """Adds each clip's ``label`` int64 [R]; clips are augmented by ``randaugment`` and ``erasing`` too, where they are set.

    augmentation: an AugmentationConfig.
    """

    def __init__(self, entries, clips, *, frames, size, seed, augmentation, patience=PATIENCE):
        super().__init__(entries, clips, frames=frames, size=size, seed=seed, patience=patience)
        self.augmentation = augmentation

    def augment(self, rng, clip):
        clip = rand_augment(rng, clip, self.augmentation.operations, self.augmentation.magnitude, self.augmentation.magnitude_std)
        return random_erasing(rng, clip, self.augmentation.erasing)

    def extras(self, rng, entry):
        return {"label": torch.tensor([entry.label])}


class ViewClips(Dataset):
    """Deterministic views for evaluation: ``temporal`` clips spread over the video times ``spatial`` crops along the longer side.
    A single clip lies at ``start``, from 0 (the video's start) to 1 (its end). ``crop_pct``: see ViewConfig.

    Item i is a dict: ``clips`` uint8 [temporal * spatial, T, H, W, C] (temporal outermost), ``label`` int, ``number`` i.
    A video that cannot be read raises VideoError: an evaluation never puts another in its place. Data that are away are waited
    for, ``patience`` seconds at the longest; then it raises DataAwayError.
    """

    def __init__(self, entries, clips, *, frames, size, temporal=1, spatial=1, start=0.5, crop_pct=1.0, patience=PATIENCE):
        self.entries, self.clips, self.frames, self.size = entries, clips, frames, tuple(size)
        self.patient = PatientReader(patience)
        self.temporal, self.spatial, self.start, self.crop_pct = temporal, spatial, start, crop_pct

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        entry = self.entries[number]
        return self.patient.read(entry, functools.partial(self._read, number, entry))

    def frames_of(self, entry):
        """T of its clips."""
        return self.frames

    def crops(self, height, width):
        """The ``spatial`` Crops of frames of this height and width."""
        positions = [0.5] if self.spatial == 1 else [i / (self.spatial - 1) for i in range(self.spatial)]
        return [Crop(view_box(height, width, self.size, position, self.crop_pct), self.size) for position in positions]

    def _read(self, number, entry):
        settings, frames, clips = self.clips, self.frames_of(entry), []
        with open_entry(entry, settings.decoder, settings.pixels) as video:
            length = length_of(video, frames, settings)
            wanted = spaced_clips(self.temporal, length, frames, settings.stride, settings.spacing, self.start)

            def crops(height, width):
                made = self.crops(height, width) * self.temporal
                clips[:] = np.empty((len(made), frames, *made[0].size, 3), np.uint8)
                return made

            video.clips([within(video, clip, settings) for clip in wanted for _ in range(self.spatial)], crops, clips)
        return {"clips": torch.from_numpy(clips[0].base), "label": entry.label, "number": number}


def length_of(video, frames, clips):
    """How many frames there are to take a clip from: of a still, and of a video too short for one, as many as it needs. Raises
    VideoError for too short a video where ``clips.short`` is 'skip'."""
    needed = clip_span(frames, clips.stride, clips.spacing)
    if video.still or (len(video) < needed and clips.short != "skip"):
        return needed
    if len(video) < needed:
        reason = f"too short: {counted(len(video), 'frame')}, a clip of {frames} at stride {clips.stride} needs {needed}"
        raise VideoError(video.path, reason)
    return len(video)


def within(video, indices, clips):
    """Frame numbers ``indices`` (int64), those beyond the end of a short video as ``clips.short`` says: from its beginning on, or
    its last."""
    if video.still:
        return indices
    return indices % len(video) if clips.short == "loop" else np.minimum(indices, len(video) - 1)


def short_note(path, video, frames, clips):
    """[(path, what is done about it)] where the video has fewer frames than a clip needs, else []."""
    needed = clip_span(frames, clips.stride, clips.spacing)
    if video.still or len(video) >= needed:
        return []
    done = "it begins again" if clips.short == "loop" else "its last frame is repeated"
    return [(printable(path), f"{counted(len(video), 'frame')}, and a clip needs {needed}: {done}")]


class ReadableViews(Dataset):
    """The items of a ViewClips, with {"error": VideoError} in the place of one that cannot be read, so that a loader goes on."""

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return len(self.views)

    def __getitem__(self, number):
        try:
            return self.views[number]
        except VideoError as error:
            return {"error": error}


NOTES = ("skipped", "short")  # of an item: lists, and no tensors


def worker_died(error):
    """Whether this error is torch's message that a data worker was killed. It comes from a signal handler, so anywhere."""
    return re.search(r"DataLoader worker \(pid", str(error)) is not None


def as_video(clips):
    """uint8 [B, T, H, W, C] -> [B, C, T, H, W], a view: what the model and its kernels take, with no copy."""
    return clips.permute(0, 4, 1, 2, 3)


def require_readable(entries, frames, clips):
    """Find one video that can give a clip, so that a data set with none is an error before training starts.

    Returns the list of VideoError passed over on the way to it. Raises ValueError when there is none, DataAwayError where a
    server does not answer.
    """
    errors = []
    for entry in entries:
        try:
            with open_entry(entry, clips.decoder) as video:
                (clip,) = spaced_clips(1, length_of(video, frames, clips), frames, clips.stride, clips.spacing)
                video.frames(within(video, clip, clips))
            was_read(entry)
            return errors
        except VideoError as error:
            if is_url(error.file) and error.errno not in (None, *LASTING):
                raise DataAwayError(f"{error}") from error
            errors.append(error)
    shown = "".join(f"\n  {error}" for error in errors[:10])
    more = f"\n  ... and {len(errors) - 10} more" if len(errors) > 10 else ""
    raise ValueError(f"none of the videos can be used, {len(entries)} in all:{shown}{more}")
