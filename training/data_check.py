"""``stmae data check``: which videos of a data set cannot be used and why, and what the others are like."""

import statistics
from collections import Counter
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .config import CheckConfig
from .listing import find_videos
from .sampling import clip_indices, clip_span, spaced_clips
from .video import Video, VideoError

Config = CheckConfig


def run(config):
    """Prints what is broken and a summary; returns (usable entries, VideoErrors)."""
    entries = find_videos(config.data)
    loader = DataLoader(Examination(entries, config), batch_size=None, num_workers=config.workers, collate_fn=unchanged)
    good, errors, facts = [], [], []
    for entry, result in zip(entries, tqdm(loader, total=len(entries), unit="video", disable=None)):
        if isinstance(result, VideoError):
            errors.append(result)
            tqdm.write(str(result))
        else:
            good.append(entry)
            facts.append(result)
    print(f"{len(entries)} videos: {len(good)} can be used, {len(errors)} cannot")
    if facts:
        lengths, seconds, rates, sizes = zip(*facts)
        print(f"  frames:  {spread(lengths, '.0f')}")
        print(f"  seconds: {spread(seconds, '.1f')}, {sum(seconds) / 3600:.2f} hours in all")
        print(f"  rate:    {spread(rates, '.4g')} frames a second")
        commonest = Counter(sizes).most_common(5)
        shown = ", ".join(f"{w}x{h} ({n})" for (h, w), n in commonest)
        print(f"  size:    {shown}" + (f" and {len(set(sizes)) - 5} others" if len(set(sizes)) > 5 else ""))
    labels = Counter(entry.label for entry in entries if entry.label >= 0)
    if labels:
        print(f"  labels:  {len(labels)} classes, {min(labels.values())} to {max(labels.values())} videos each")
    if config.output:
        lines = [f"{Path(entry.path).resolve()}" + (f" {entry.label}" if entry.label >= 0 else "") for entry in good]
        Path(config.output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"  list of the usable ones: {config.output}")
    return good, errors


class Examination(Dataset):
    """Item i: (frames, seconds, rate, (height, width)) of video i, or the VideoError that it raises."""

    def __init__(self, entries, config):
        self.entries, self.config = entries, config

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        config = self.config
        try:
            with Video(self.entries[number].path) as video:
                count = len(video)
                needed = clip_span(config.frames, config.stride)
                if count < needed:
                    reason = f"too short: {count} frames, a clip of {config.frames} at stride {config.stride} needs {needed}"
                    raise VideoError(video.path, reason)
                if config.every_frame:
                    for start in range(0, count, 64):
                        video.frames(clip_indices(start, min(64, count - start), 1))
                else:
                    for clip in spaced_clips(3, count, config.frames, config.stride):
                        video.frames(clip)
                return count, count / video.rate, video.rate, video.size
        except VideoError as error:
            return error


def unchanged(item):
    """Instead of PyTorch's own conversion, which turns tuples into lists."""
    return item


def spread(values, form):
    return f"{min(values):{form}} to {max(values):{form}}, median {statistics.median(values):{form}}"
