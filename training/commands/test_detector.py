"""``stmae test detector``: an action detector's mean average precision on AVA's annotations."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch

from stmae import checkpoint
from stmae.models import ActionDetector

from ..config import BoxClipConfig, BoxDataConfig
from ..config.checks import require_device, require_text
from ..config.wording import counted
from ..engine.device import choose_device, choose_precision
from ..engine.outputs import is_results, require_own, write_results
from ..engine.run_folder import weights_file
from ..evaluation.detection import BoxTest, box_map, score_boxes


@dataclass(kw_only=True)
class TestConfig(BoxDataConfig):
    """The test: of what, on what."""

    __test__ = False  # not pytest's

    checkpoint: str
    """a detector: a run's folder, or a model.safetensors"""
    data: str
    """annotations, AVA's csv: lines video,second,x1,y1,x2,y2,action,person"""
    output: str | None = None
    """a JSON file for the results, each class's average precision among them"""
    clips: BoxClipConfig = field(default_factory=BoxClipConfig)
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 autocast, or float32; 'auto': bf16, but float32 on a CPU without bf16 instructions"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "checkpoint", "data", "output")
        require_device(self)


Config = TestConfig


def run(config):
    """Prints the mean average precision; returns it as a dict."""
    if config.output:
        require_own(config.output, is_results("mAP", "average_precision"))
    device = choose_device(config.device)
    dtype, precision = choose_precision(config.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    file = weights_file(config.checkpoint)
    model = checkpoint.load(file)
    if not isinstance(model, ActionDetector):
        raise ValueError(f"{file} holds a {type(model).__name__}, and this test needs a detector: see 'stmae finetune detector'")
    test = BoxTest(config, config.data, model.config.num_classes)
    scored, skipped = score_boxes(model.to(device), test.frames, config.clips, device, autocast)
    for error in skipped:
        print(f"left out of the test: {error}")
    if not scored:
        raise ValueError(f"none of the frames in {config.data} could be tested, {len(test.frames)} in all")
    found, by_class = box_map(test, scored)
    boxes = "detected boxes" if config.test_boxes else "the annotations' own boxes"
    results = {"frames": len(scored), "left_out": len(skipped), "boxes": boxes, **found}
    print(
        f"{counted(len(scored), 'frame')} ({len(skipped)} left out), {precision}, {boxes}: mAP at IoU 0.5 {found['mAP']:.2%} "
        f"over {counted(found['classes'], 'action')}"
    )
    if config.output:
        by_class = {str(label + 1): value for label, value in by_class.items()}  # as the annotations number them
        write_results(config.output, {**results, "average_precision": by_class})
    return results
