"""What a frozen encoder makes of videos."""

import functools
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from stmae import checkpoint

from ..config.wording import counted
from ..data.dataset import ReadableViews, as_video
from ..data.outage import PATIENCE, was_read
from ..data.packed_clips import evaluation_views
from ..engine.device import (
    choose_device,
    choose_precision,
    choose_workers,
    free_shared_memory,
    workers_in_shared_memory,
)
from ..engine.run_folder import clips_of, weights_file


def encode(path, entries, config, *, model=None, patience=PATIENCE):
    """(features [videos, D] float32, labels [videos], paths, VideoErrors of the videos left out).

    The encoder of ``path`` (an autoencoder's or a classifier's), or of ``model``, sees every patch of every view; views
    are averaged.
    config: with ``tokens``, ``stride``, ``views``, ``device``, ``precision``, ``workers``. patience: as for ViewClips.
    """
    return _encode(path, entries, config, model, None, patience)


def encode_tokens(path, entries, config, *, model=None):
    """As ``encode``, in one pass with every token: (features, tokens [videos, views * N, D] float16, labels, paths, errors).

    The tokens are those that the encoder's last block gives, each normalised by itself: in grid order, the views one after
    the other. They all stay in memory: 2.4 MB for each view of ViT-B.
    """
    tokens = []
    features, *rest = _encode(path, entries, config, model, tokens.append, PATIENCE)
    return features, torch.stack(tokens) if tokens else torch.zeros(0, 0, features.shape[1]), *rest


@torch.no_grad()
def _encode(path, entries, config, model, collect, patience):
    """What ``encode`` gives; ``collect`` is called with each video's tokens, unless it is None."""
    device = choose_device(config.device)
    dtype, _ = choose_precision(config.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    if model is None:
        model = checkpoint.load_classifier(weights_file(path))
    model.to(device).eval()
    clips = clips_of(path, config.stride, config.size)
    native = clips.size == "native"
    if native and (config.tokens == "all" or collect is not None):
        what = "tokens 'mean'" if collect is None else "no probe of all tokens ('attentive')"
        raise ValueError(f"size: expected 'fixed' or {what}: of native size every video has its own number of tokens")
    views = evaluation_views(
        entries,
        clips,
        model.config,
        temporal=config.views.temporal,
        spatial=config.views.spatial,
        crop_pct=config.views.crop_pct,
        patience=patience,
    )
    workers = choose_workers(config.workers, device)
    free = free_shared_memory()
    pixels = model.config.num_frames * math.prod(model.config.image_size)  # of a clip, of native size at most as many
    fitting = workers_in_shared_memory(workers, config.views.temporal * config.views.spatial * pixels * 3, free)
    if fitting < workers:
        print(f"note: {counted(fitting, 'data worker')} and not {workers}, for /dev/shm has {free / 1e6:.0f} MB free")
        workers = fitting
    loader = DataLoader(ReadableViews(views), batch_size=None, num_workers=workers)
    features, labels, paths, errors = [], [], [], []
    for item in tqdm(loader, unit="video", disable=None, leave=False):
        if "error" in item:
            errors.append(item["error"])
            continue
        was_read(entries[item["number"]])  # what a worker learnt ends with it
        with autocast():
            video = as_video(item["clips"].to(device))
            tokens = torch.stack(model.features(list(video), pooled=False)) if native else model.features(video, pooled=False)
            values = model.pool(tokens) if config.tokens == "mean" else tokens.flatten(1)
        if collect is not None:
            collect(F.layer_norm(tokens.float().flatten(0, 1), tokens.shape[2:]).half().cpu())
        features.append(values.float().mean(0).cpu())
        labels.append(item["label"])
        paths.append(entries[item["number"]].path)
    together = torch.stack(features) if features else torch.zeros(0, model.config.width)
    return together, torch.tensor(labels, dtype=torch.long), paths, errors
