"""``stmae probe``: what frozen features are worth: nearest neighbours, a linear and an attentive classifier on them."""

from dataclasses import dataclass

import torch

from stmae import checkpoint
from stmae.models import VideoClassifier, VideoClassifierConfig

from ..config import EncodingConfig
from ..config.checks import require_positive, require_seed, require_text
from ..config.wording import counted
from ..data.video_list import find_train_and_test
from ..engine.device import choose_device
from ..engine.outputs import is_results, require_own, write_results
from ..engine.run_folder import weights_file
from ..evaluation.features import encode, encode_tokens
from ..evaluation.probes import attentive, knn, linear

KINDS = ("knn", "linear", "attentive")


@dataclass(kw_only=True)
class ProbeConfig(EncodingConfig):
    """The probe: of which model, on what."""

    checkpoint: str
    """weights: a run's folder, or a model.safetensors, of an autoencoder or a classifier"""
    data: str
    """labelled videos to learn from: a list file with 'path label' lines, Something-Something's json, or a
    folder with a folder for each class"""
    test_data: str
    """labelled videos to test on"""
    kinds: str = "knn,linear"
    """which probes, separated by commas: 'knn': nearest neighbours; 'linear': a linear classifier; 'attentive': attention with a
    learnt query over all tokens, then a linear classifier (keeps the tokens of all videos in memory: 2.4 MB a view for ViT-B)"""
    random_weights: bool = False
    """take only the checkpoint's shape, to see what training is worth"""
    neighbours: int = 20
    """k of the nearest neighbours"""
    output: str | None = None
    """a JSON file for the results"""
    seed: int = 0
    """of random weights, of the training videos on which the probes' settings are chosen, of the attentive probe's training"""

    def __post_init__(self):
        super().__post_init__()
        require_text(self, "checkpoint", "data", "test_data", "output")
        require_positive(self, "neighbours")
        require_seed(self)
        if not set(self.kinds_listed) <= set(KINDS):
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, separated by commas, got {self.kinds!r}")

    @property
    def kinds_listed(self):
        return [kind.strip() for kind in self.kinds.split(",")]


Config = ProbeConfig


def run(config):
    """Prints the accuracies and returns them as a dict."""
    kinds = config.kinds_listed
    if config.output:
        require_own(config.output, is_results("chance", "videos"))
    train, test = find_train_and_test(config.data, config.test_data, config.data_root, config.data_labels)
    model = None
    if config.random_weights:
        shape = checkpoint.load_classifier(weights_file(config.checkpoint)).config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = VideoClassifier(VideoClassifierConfig.from_dict(shape.to_dict()))
    tokens = test_tokens = None
    if "attentive" in kinds:
        x, tokens, y, _, left_out = encode_tokens(config.checkpoint, train, config, model=model)
        test_x, test_tokens, test_y, _, test_left_out = encode_tokens(config.checkpoint, test, config, model=model)
    else:
        x, y, _, left_out = encode(config.checkpoint, train, config, model=model)
        test_x, test_y, _, test_left_out = encode(config.checkpoint, test, config, model=model)
    for error in (*left_out, *test_left_out):
        print(f"left out: {error}")
    if not len(y) or not len(test_y):
        raise ValueError("a probe needs at least one usable video in data and in test_data")
    classes = int(max(y.max(), test_y.max())) + 1
    results = {"videos": len(y), "test_videos": len(test_y), "classes": classes}
    for kind in kinds:
        if kind == "knn":
            results[kind] = knn(x, y, test_x, test_y, classes, config.neighbours)
        elif kind == "linear":
            results[kind] = linear(x, y, test_x, test_y, classes, config.seed)
        else:
            results[kind] = attentive(tokens, y, test_tokens, test_y, classes, config.seed, choose_device(config.device))
    results["chance"] = (torch.bincount(test_y).max() / len(test_y)).item()
    named = {"knn": f"{config.neighbours} nearest neighbours"}
    print(
        f"{counted(results['videos'], 'video')}, tested on {results['test_videos']}: "
        + "".join(f"{named.get(kind, kind)} {results[kind]:.1%}, " for kind in kinds)
        + f"always the most common class {results['chance']:.1%}"
    )
    if config.output:
        write_results(config.output, results)
    return results
