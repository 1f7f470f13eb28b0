"""Sections about data: where it is, how clips are cut and augmented, the views of an evaluation."""

import math
from dataclasses import dataclass
from typing import Literal

from stmae.models.config import LARGEST
from stmae.models.field_types import show

from .checks import check_types, require, require_fraction, require_not_negative, require_positive

LARGEST_SIDE = 4096  # pixels, of 'native' frames


@dataclass(kw_only=True)
class DataLocationConfig:
    """Where the videos and the classes' numbers of a data set are, where its list does not say."""

    data_root: str | None = None
    """folder that a list's relative paths start from (null: the list's own), or where Something-Something's videos lie"""
    data_labels: str | None = None
    """numbers of the classes, {class: number} in json or a text file with a class a line; null: class folders in the order of
    their names, Something-Something's labels.json beside its list"""

    def __post_init__(self):
        check_types(self)


@dataclass(kw_only=True)
class SampledClipConfig:
    """Clips: how they are cut from a video and augmented."""

    stride: int = 4
    """every stride-th frame of the video"""
    spacing: Literal["stride", "linspace", "segments"] = "stride"
    """'segments': one frame from each of T equal parts of the video, whatever the stride; 'stride': exactly that;
    'linspace': evenly over T*stride frames, rounded down, as the paper's published code (4.2
    apart, not 4)"""
    short: Literal["loop", "pad", "skip"] = "loop"
    """of a video with fewer frames than a clip reaches over: 'loop': it begins again; 'pad': its last frame is repeated; 'skip':
    it is not used"""
    repeats: int = 4
    """clips taken from one opened video (repeated sampling)"""
    scale: tuple[float, float] = (0.5, 1.0)
    """random resized crop: fraction of the frame's area"""
    aspect: tuple[float, float] = (0.75, 1.3333)
    """random resized crop: width over height"""
    flip: bool = True
    """mirror every second clip (not for data where left and right mean something)"""
    pixels: Literal["exact", "swscale"] = "exact"
    """how a decoded frame becomes a clip's: 'exact', straight from the decoder's planes with nothing rounded on the way;
    'swscale', FFmpeg's RGB, then resized, as before there was a choice. A run that is continued keeps its own"""
    decoder: Literal["pyav", "torchcodec", "auto"] = "pyav"
    """of videos whose pixels are 'swscale'; 'auto': torchcodec where it is installed and works, else PyAV. Both give the same
    frames"""

    def __post_init__(self):
        check_types(self)
        require_positive(self, "stride", "repeats")
        require(self, "scale", lambda value: 0 < value[0] <= value[1] <= 1, "two numbers above 0, at most 1, the smaller first")
        require(self, "aspect", lambda value: 0 < value[0] <= value[1] < math.inf, "two numbers above 0, the smaller first")


@dataclass(kw_only=True)
class ClipConfig(SampledClipConfig):
    """Clips: how they are cut from a video and augmented."""

    size: Literal["fixed", "native"] = "fixed"
    """'fixed': a random resized crop of model.image_size; 'native': the frames in their own aspect ratio, in packed batches"""
    side: tuple[float, float] | None = None
    """of 'native': a clip's frames have at most the area of a square of this side, in pixels, drawn from this range; null: the
    area of model.image_size"""
    frames: int | tuple[int, ...] | str | None = None
    """frames of a clip, or several numbers, of which one is drawn for each clip ('8,16,32'), in packed batches; null:
    model.num_frames"""

    def __post_init__(self):
        super().__post_init__()
        most = f"two numbers above 0, at most {LARGEST_SIDE:,}, the smaller first"
        require(self, "side", lambda value: 0 < value[0] <= value[1] <= LARGEST_SIDE, most)
        if self.side is not None and self.size != "native":
            raise ValueError(f"side: expected null unless size is 'native', got {show(self.side)}")
        for name in ("scale", "aspect"):
            default = type(self).__dataclass_fields__[name].default
            if self.size == "native" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected its default with size 'native', which takes frames as they are and no random resized "
                    f"crop, got {show(getattr(self, name))}"
                )
        if self.frames is not None:
            self.frames = self._frames()

    def _frames(self):
        try:
            numbers = tuple(int(word) for word in self.frames.split(",")) if isinstance(self.frames, str) else self.frames
        except ValueError:
            numbers = ()
        numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        if not numbers or not all(0 < number <= LARGEST["num_frames"] for number in numbers):
            raise ValueError(f"frames: expected a number above 0, or several with commas between them, got {show(self.frames)}")
        return numbers


@dataclass(kw_only=True)
class FinetuneClipConfig(SampledClipConfig):
    """Clips: how they are cut from a video and augmented."""

    repeats: int = 2
    """clips taken from one opened video (repeated sampling)"""
    scale: tuple[float, float] = (0.08, 1.0)
    """random resized crop: fraction of the frame's area"""


@dataclass(kw_only=True)
class AugmentationConfig:
    """Further augmentation of labelled clips; defaults are the paper's."""

    operations: int = 2
    """RandAugment: operations per clip, each with probability one half; 0: none"""
    magnitude: float = 7.0
    """RandAugment: their strength, out of 10"""
    magnitude_std: float = 0.5
    """RandAugment: how much that varies"""
    erasing: float = 0.25
    """probability that a box becomes noise"""
    mixup: float = 0.8
    """mixing of two clips, parameter of the Beta distribution; 0: none"""
    cutmix: float = 1.0
    """a box from another clip, parameter of the Beta distribution; 0: none"""
    label_smoothing: float = 0.1
    """fraction of the target spread over all classes"""

    def __post_init__(self):
        check_types(self)
        require_not_negative(self, "operations", "magnitude_std", "mixup", "cutmix")
        require(self, "magnitude", lambda value: 0 <= value <= 10, "0 to 10")
        require_fraction(self, "erasing", one=True)
        require_fraction(self, "label_smoothing")


@dataclass(kw_only=True)
class ViewConfig:
    """Views of a video in a test, their scores averaged."""

    temporal: int = 1
    """clips, spread evenly over the video"""
    spatial: int = 1
    """crops of each, along the longer side"""
    crop_pct: float = 1.0
    """side of a crop over the frame's shorter side: 0.875 is what resizing to 256 and cropping 224 gives"""

    def __post_init__(self):
        check_types(self)
        require_positive(self, "temporal", "spatial")
        require(self, "crop_pct", lambda value: 0 < value <= 1, "more than 0 and at most 1")
