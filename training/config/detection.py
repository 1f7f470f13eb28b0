"""The configuration of fine-tuning an action detector, on AVA or on data written as AVA is."""

from dataclasses import dataclass, field
from typing import Literal

from stmae.models.config import as_pair

from .checks import (
    check_types,
    require,
    require_fraction,
    require_not_negative,
    require_positive,
    require_seed,
    require_text,
)
from .training import FinetuneOptimizerConfig, RunConfig


@dataclass(kw_only=True)
class BoxClipConfig:
    """Clips around a frame with boxes: how they are cut from a video and augmented."""

    stride: int = 4
    """every stride-th frame"""
    fps: float = 30.0
    """frames a second that the stride counts, whatever the video has: SlowFast takes AVA's frames at 30 a second"""
    start_second: float = 0.0
    """second of the annotations at which the video files start: 900 where each was cut to its annotated 15 minutes"""
    crop_pct: tuple[float, float] = (0.7, 0.875)
    """random crop: its side over the frame's shorter side. A test takes the middle, as high as the frame"""
    flip: bool = True
    """mirror every second clip and its boxes"""
    pixels: Literal["exact", "swscale"] = "exact"
    """as clips.pixels of pre-training"""
    decoder: Literal["pyav", "torchcodec", "auto"] = "pyav"
    """as clips.decoder of pre-training"""

    def __post_init__(self):
        check_types(self)
        require_positive(self, "stride", "fps")
        require_not_negative(self, "start_second")
        expected = "two numbers above 0 and at most 1, the smaller first"
        require(self, "crop_pct", lambda value: 0 < value[0] <= value[1] <= 1, expected)


@dataclass(kw_only=True)
class DetectorConfig:
    """The detector; the encoder's shape comes from the checkpoint."""

    num_classes: int = 80
    """actions that the annotations number, from 1"""
    dropout: float = 0.0
    """before the head"""
    drop_path: float = 0.2
    """stochastic depth of the last block, growing from 0 in the first"""
    roi_size: int = 7
    """cells along a side of what RoIAlign takes of a box"""
    num_frames: int | None = None
    """frames of a clip; null: as pre-trained. Positions are interpolated"""
    image_size: int | tuple[int, int] | None = None
    """frame height and width; null: as pre-trained. Positions are interpolated"""

    def __post_init__(self):
        check_types(self)
        require_positive(self, "num_classes", "roi_size", "num_frames")
        require_fraction(self, "dropout", "drop_path")
        require(self, "image_size", lambda value: min(as_pair(value)) > 0, "more than 0")


@dataclass(kw_only=True)
class BoxDataConfig:
    """Where the videos are, and what a test counts."""

    data_root: str
    """folder of the videos, named as in the annotations: VIDEO.mp4, VIDEO.mkv, ..."""
    test_boxes: str | None = None
    """csv of detected persons, lines video,second,x1,y1,x2,y2,,score; null: a test takes the annotations' own boxes, which
    makes its result higher than one with a detector's"""
    box_threshold: float = 0.8
    """score from which a detected person counts"""
    excluded: str | None = None
    """csv of frames that a test leaves out, lines video,second (ava_val_excluded_timestamps_v2.2.csv)"""
    classes: str | None = None
    """label map of the actions that a test counts (ava_action_list_v2.2_for_activitynet_2019.pbtxt: 60 of 80); null: all"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "data_root", "test_boxes", "excluded", "classes")
        require_fraction(self, "box_threshold", one=True)


@dataclass(kw_only=True)
class DetectionConfig(BoxDataConfig):
    """The run: what is read, what is written."""

    data: str
    """annotations, AVA's csv: lines video,second,x1,y1,x2,y2,action,person"""
    output: str
    """folder of the run; the same command again continues what is there"""
    checkpoint: str
    """pre-trained weights, a classifier's or a detector's: a run's folder, a file, or a Hugging Face repository (owner/name)"""
    random_weights: bool = False
    """take only the checkpoint's shape, to see what pre-training is worth"""
    test_data: str | None = None
    """annotations to test on before, after, and every run.evaluate_every steps"""
    seed: int = 0
    """of the head, the order and the crops"""
    layer_decay: float = 0.75
    """each layer's learning rate is this times the next one's"""
    clips: BoxClipConfig = field(default_factory=BoxClipConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "data", "output", "checkpoint", "test_data")
        require_seed(self)
        require(self, "layer_decay", lambda value: 0 < value <= 1, "more than 0, at most 1")
        if self.run.cuda_graph:
            raise ValueError(
                "run.cuda_graph: expected false for a detector: only a pre-training step launches the same every time"
            )
