"""``stmae data check``: which videos of a data set cannot be used and why, and what the others are like."""

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import ClipConfig, DataLocationConfig
from ..config.checks import require_not_negative, require_positive, require_text
from ..config.sources import absolute
from ..config.wording import counted
from ..data.clip_sampling import clip_indices, clip_span, spaced_clips
from ..data.dataset import length_of, within
from ..data.decode_cost import SLOW, DecodeCost, measured_cost
from ..data.decoders import choose_decoder, open_entry
from ..data.loader import LoaderError, results
from ..data.local_copy import local_copy
from ..data.prepare import PREPARED, prepare_video, prepared_size
from ..data.video import MAX_CLIP_PIXELS, Video, VideoError, printable
from ..data.video_list import find_mixture
from ..engine.outputs import is_list_of, require_own, write_list


@dataclass(kw_only=True)
class CheckConfig(DataLocationConfig):
    """The check: of what, for which clips."""

    data: str
    """videos: a folder, searched recursively, a list file, or Something-Something's json"""
    frames: int = 16
    """of the clips that every video must give"""
    stride: int = 4
    """of the clips that every video must give"""
    short: Literal["loop", "pad", "skip"] = "loop"
    """of a video with fewer frames than a clip reaches over, as clips.short: 'loop' and 'pad': it can be used; 'skip': it
    cannot"""
    decoder: Literal["pyav", "torchcodec", "auto"] = "pyav"
    """of videos; 'auto': torchcodec where it is installed and works, else PyAV. Both give the same frames"""
    every_frame: bool = False
    """decode all of every video, too"""
    tried: int = 2
    """of the slow videos, how many are prepared in a temporary folder, to measure what that gains; 0: none"""
    workers: int = 2
    """processes that decode; 0: none"""
    timeout: float = 600.0
    """seconds that one video may take; 0: no limit"""
    output: str | None = None
    """a list file for the videos that can be used"""
    slow: str | None = None
    """a list file for the slow ones among them, which stmae data prepare takes"""
    strict: bool = False
    """exit with status 1 where any video cannot be used; false: only where none can"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "data", "output", "slow")
        require_positive(self, "frames", "stride")
        require_not_negative(self, "workers", "timeout", "tried")


SHOWN = 10  # of the slow videos
TRIED_PIXELS = 2e9  # of a video that is prepared to see what it gains: a thousand frames of 1080p

Config = CheckConfig
ERRORS = (LoaderError,)


def run(config):
    """Prints what is broken and a summary; returns (usable entries, VideoErrors)."""
    entries = find_mixture(config.data, config.data_root, config.data_labels).entries
    for file in filter(None, (config.output, config.slow)):
        require_own(file, is_list_of("data check"))
    decoder = choose_decoder(config.decoder)
    good, errors, infos = [], [], []
    checked = results(VideoCheck(entries, config), config)
    for entry, result in zip(entries, tqdm(checked, total=len(entries), unit="video", disable=None)):
        if isinstance(result, VideoError):
            errors.append(result)
            tqdm.write(str(result))
        else:
            good.append(entry)
            infos.append(result)
    print(f"{counted(len(entries), 'video')}: {len(good)} can be used, {len(errors)} cannot (decoder: {decoder})")
    if infos:
        moving = [info for info in infos if not info.still]
        timed = [info for info in moving if info.rate > 0]  # a folder of images has no rate
        if len(moving) < len(infos):
            print(f"  images:  {len(infos) - len(moving)}, each a still clip")
        if moving:
            print(f"  frames:  {value_range([info.frames for info in moving], '.0f')}")
            print_short(config, [info.frames for info in moving])
        if timed:
            seconds = [info.frames / info.rate for info in timed]
            print(f"  seconds: {value_range(seconds, '.1f')}, {sum(seconds) / 3600:.2f} hours in all")
            print(f"  rate:    {value_range([info.rate for info in timed], '.4g')} frames a second")
        sizes = [info.size for info in infos]
        most_common = Counter(sizes).most_common(5)
        shown = ", ".join(f"{w}x{h} ({n})" for (h, w), n in most_common)
        print(f"  size:    {shown}" + (f" and {len(set(sizes)) - 5} others" if len(set(sizes)) > 5 else ""))
    costs = [(entry, info) for entry, info in zip(good, infos) if info.cost is not None]
    slow = sorted((pair for pair in costs if pair[1].cost.slow), key=lambda pair: -pair[1].cost.ratio)
    if costs:
        times = [info.cost.milliseconds for _, info in costs]
        print(f"  cost:    {value_range(times, '.3g')} ms of a processor to open one and decode a clip, measured")
    if slow:
        print_slow(slow)
        print_gain(slow, config)
    labels = Counter(entry.label for entry in entries if entry.label >= 0)
    if labels:
        print(f"  labels:  {counted(len(labels), 'class')}, {min(labels.values())} to {max(labels.values())} videos each")
    if any(error.reason.startswith("too short") for error in errors):
        print("  short ones can be used with a smaller stride, or with --clips.short loop or pad")
    if config.output:
        write_list(config.output, map(line_of, good), "data check")
        print(f"  list of the usable ones: {config.output}")
    if config.slow:
        write_list(config.slow, [line_of(entry) for entry, _ in slow], "data check")
        print(f"  list of the slow ones: {config.slow}")
    return good, errors


def print_short(config, lengths):
    """How many of the videos of ``lengths`` frames are shorter than a clip, and what can be done about them."""
    needed = clip_span(config.frames, config.stride)
    short = [length for length in lengths if length < needed]
    if short:
        done = ("begin again" if config.short == "loop" else "repeat their last frame") + f" (--clips.short {config.short})"
        fits = (min(short) - 1) // max(config.frames - 1, 1)
        stride = f"; a stride of {fits} fits all" if fits else ""
        print(f"  short:   {len(short)} have fewer than the {needed} frames of a clip and {done}{stride}")


def exit_status(config, result):
    """Of the command: 1 where no video can be used or, with ``strict``, where one cannot."""
    good, errors = result
    return int(not good or (config.strict and bool(errors)))


def print_slow(slow):
    """Names the worst of ``slow``, [(entry, VideoInfo)], the slowest first."""
    print(f"  slow:    {len(slow)}, which decode {SLOW:g} times the pixels that they would if prepared, or more")
    for entry, info in slow[:SHOWN]:
        cost, (height, width) = info.cost, info.size
        keys = "from its start every time" if cost.gop is None else f"a key frame every {cost.gop:.0f}"
        words = f"{cost.codec} {width}x{height}, {keys}: {cost.ratio:.0f}x the pixels, {cost.milliseconds:.0f} ms a clip"
        print(f"    {printable(entry.path)}: {words}")
    if len(slow) > SHOWN:
        print(f"    and {len(slow) - SHOWN} more (--slow FILE lists all)")


def print_gain(slow, config):
    """What preparing the slow videos would cost and gain, by preparing a few of them here."""
    short = [pair for pair in slow if pair[1].frames * math.prod(pair[1].size) <= TRIED_PIXELS]
    tried, gains = short[:: max(1, len(short) // max(config.tried, 1))][: config.tried], []
    for entry, info in tried:
        with contextlib.suppress(VideoError), tempfile.TemporaryDirectory(prefix="stmae-") as folder:
            gains.append(measure_gain(entry, info, config, os.path.join(folder, "prepared.mp4")))
    if not gains:
        return
    # By the pixels of the sources, which are decoded, and of the results, which are encoded.
    seconds, before, after = (sum(values) for values in list(zip(*gains))[:3])
    old, new = (statistics.median(values) for values in list(zip(*gains))[3:])
    pixels = [info.frames * math.prod(info.size) for _, info in slow]
    small = [info.frames * math.prod(prepared_size(*info.size, PREPARED.short_side)) for _, info in slow]
    part, small_part = (sum(values[slow.index(pair)] for pair in tried) for values in (pixels, small))
    hours, now = seconds / part * sum(pixels) / 3600, sum(info.bytes for _, info in slow) / 1e9
    then = after / small_part * sum(small) / 1e9
    print(f"  prepare: {len(gains)} of them tried: {old:.0f} -> {new:.1f} ms a clip, {before / 1e6:.1f} -> {after / 1e6:.1f} MB")
    print(f"    by pixels all {len(slow)} take {hours:.2g} hours of a processor, {now:.2g} -> {then:.2g} GB (stmae data prepare)")


def measure_gain(entry, info, config, target):
    """(seconds of a processor, bytes before, bytes after, ms of a clip before, after) of preparing a video. Raises VideoError."""
    with local_copy(entry) as copy:
        started = time.process_time()
        prepare_video(copy.path, target, short_side=PREPARED.short_side, gop=PREPARED.gop, crf=PREPARED.crf)
        seconds = time.process_time() - started
    prepared = VideoCheck([entry._replace(path=target, member=None)], config)[0]
    if isinstance(prepared, VideoError):
        raise prepared
    return seconds, info.bytes, os.path.getsize(target), info.cost.milliseconds, prepared.cost.milliseconds


class VideoInfo(NamedTuple):
    """Of one video: its frames, frames a second (NaN: unknown), (height, width), whether it is an image, its size in bytes (0:
    unknown), and its DecodeCost (None: an image, or images)."""

    frames: int
    rate: float
    size: tuple
    still: bool
    bytes: int = 0
    cost: DecodeCost | None = None


class VideoCheck(Dataset):
    """Item i: the VideoInfo of video i, or the VideoError that it raises."""

    def __init__(self, entries, config):
        self.entries, self.config = entries, config
        self.ended = {}  # number -> how it ended its data worker

    reading = staticmethod(lambda number: None)  # see loader.Reading

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        if number in self.ended:
            return VideoError(self.entries[number].path, self.ended[number])
        self.reading(number)
        try:
            return self._check(number)
        finally:
            self.reading(-1)

    def _check(self, number):
        config, entry = self.config, self.entries[number]
        started, cost = time.thread_time(), None
        try:
            with open_entry(entry, config.decoder, "exact" if config.decoder == "pyav" else "swscale") as video:
                opening = time.thread_time() - started
                clips = ClipConfig(stride=config.stride, short=config.short)
                count = length_of(video, config.frames, clips)
                three = [within(video, clip, clips) for clip in spaced_clips(3, count, config.frames, config.stride)]
                if isinstance(video, Video):
                    cost = measured_cost(video, three, config.frames, config.stride, opening)
                else:
                    for clip in three:
                        video.frames(clip)
                if config.every_frame:
                    count = len(video)
                    chunk = max(1, min(64, MAX_CLIP_PIXELS // (video.size[0] * video.size[1])))
                    for start in range(0, count, chunk):
                        video.frames(clip_indices(start, min(chunk, count - start), 1))
                size = 0 if entry.frames else os.stat(video.path).st_size
                return VideoInfo(len(video), video.rate, tuple(video.size), video.still, size, cost)
        except VideoError as error:
            return error


def line_of(entry):
    """The entry as a line of a list, which find_videos reads as the same entry."""
    words = [absolute(entry.path)]
    if entry.frames:
        words.append(str(entry.frames))
    if entry.frames or entry.label >= 0:
        words.append(str(entry.label))
    return " ".join(words)


def value_range(values, form):
    return f"{min(values):{form}} to {max(values):{form}}, median {statistics.median(values):{form}}"
