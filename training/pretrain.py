"""``stmae pretrain``: masked-autoencoder pre-training, from a folder of videos to weights."""

import functools
import math

import torch

from stmae.masking import sample_noise
from stmae.models import MaskedAutoencoder

from . import loop
from .config import PretrainConfig, check_common, to_dict
from .dataset import PretrainClips, ViewClips, as_video, require_readable
from .device import choose_device
from .listing import find_videos
from .optimizer import peak_learning_rate, weight_decay_groups
from .processes import Processes
from .run_folder import open_run
from .video import VideoError

Config = PretrainConfig
ERRORS = (loop.TrainingError,)


def run(config):
    """Pre-train as ``config`` (PretrainConfig) says, or continue the run in its output folder. Returns the counters of
    the run."""
    check_common(config)
    processes = Processes()
    device = processes.own_device(choose_device(config.run.device))
    with processes.joined(device):
        folder = open_run(config.output, to_dict(config), processes)
        entries = find_videos(config.data)
        require_readable(entries, config.model.num_frames, config.clips)
        held_out = find_videos(config.held_out) if config.held_out else []
        if processes.first:
            print(f"{len(entries)} videos in {config.data}" + (f", {len(held_out)} held out" if held_out else ""))

        torch.manual_seed(config.seed)
        model = MaskedAutoencoder(config.model).to(device)
        model.backend = config.run.backend
        mask = (config.model.mask_strategy, 1, config.model.grid, config.model.mask_ratio)
        dataset = PretrainClips(
            entries,
            config.clips,
            frames=config.model.num_frames,
            size=config.model.image_size,
            sample_noise=functools.partial(sample_noise, *mask),
            seed=config.seed,
        )
        counters = loop.train(
            config,
            processes,
            device,
            folder,
            model=model,
            groups=weight_decay_groups(model, config.optimizer.weight_decay),
            dataset=dataset,
            # A batch counts videos: the repeats of one video are not counted in pre-training.
            peak=peak_learning_rate(config.optimizer, config.optimizer.batch),
            loss_of=lambda forward, batch, epoch: forward(as_video(batch["clips"]), noise=batch["noise"]).loss,
            evaluate=functools.partial(held_out_loss, held_out, config, device) if held_out else None,
            repeats=config.clips.repeats,
            tokens=config.model.num_tokens,
        )
        if counters["done"] and held_out and processes.first:
            before, after = counters["before"]["held_out_loss"], counters["after"]["held_out_loss"]
            hint = " (1.0: predicting each patch's mean)" if config.model.normalize_target else ""
            print(f"loss on held-out videos: {before:.3f} before, {after:.3f} after{hint}")
        return counters


@torch.no_grad()
def held_out_loss(entries, config, device, model, autocast, say):
    """Mean loss on fixed clips of ``entries`` (start, middle and end, centre crop) under fixed masks: the same at every call.

    A video that cannot be read is named and left out, never replaced; with none left the result is NaN.
    """
    views = ViewClips(entries, config.clips, frames=config.model.num_frames, size=config.model.image_size, temporal=3)
    losses = []
    model.eval()
    for number in range(len(views)):
        try:
            clips = views[number]["clips"]
        except VideoError as error:
            say(f"left out of the held-out loss: {error}")
            continue
        noise = sample_noise(
            config.model.mask_strategy,
            len(clips),
            config.model.grid,
            config.model.mask_ratio,
            generator=torch.Generator().manual_seed(number),
        )
        with autocast():
            losses.append(model(as_video(clips.to(device)), noise=noise.to(device)).loss.item())
    return {"held_out_loss": sum(losses) / len(losses) if losses else math.nan}
