"""``stmae pretrain``: masked-autoencoder pre-training, from a folder of videos to weights."""

import functools
import math
from pathlib import Path

import torch

from stmae.checkpoint.resize import classifier_from_autoencoder
from stmae.masking import sample_noise
from stmae.models import MaskedAutoencoder

from ..config import EncodingConfig, PretrainConfig, check_common
from ..data.dataset import PretrainClips, ViewClips, as_video, require_readable
from ..data.video import VideoError
from ..data.video_list import find_labelled_videos, find_videos
from ..engine import loop
from ..engine.device import choose_device
from ..engine.distributed import Processes
from ..engine.optimizer import peak_learning_rate, weight_decay_groups
from ..engine.run_folder import open_run
from ..planning.flops import autoencoder_flops
from .features import encode
from .probe import knn
from .reconstruct import ROWS, grid, to_uint8

Config = PretrainConfig
ERRORS = (loop.TrainingError,)
PICTURES = 3  # videos whose reconstructions are shown


def run(config):
    """Pre-train as ``config`` (PretrainConfig) says, or continue the run in its output folder. Returns the counters of
    the run."""
    check_common(config)
    processes = Processes()
    device = processes.own_device(choose_device(config.run.device))
    with processes.joined(device):
        return train(config, processes, device)


def train(config, processes, device):
    """``run`` inside the group. A function of its own, so that nothing of the model is alive when the group is left."""
    folder = open_run(config, processes)
    entries = find_videos(config.data, config.data_root, config.data_labels)
    require_readable(entries, config.model.num_frames, config.clips)
    held_out = find_videos(config.held_out, config.data_root, config.data_labels) if config.held_out else []
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
        groups=functools.partial(weight_decay_groups, weight_decay=config.optimizer.weight_decay),
        dataset=dataset,
        # A batch counts videos: the repeats of one video are not counted in pre-training.
        peak=peak_learning_rate(config.optimizer, config.optimizer.batch),
        loss_of=lambda forward, batch, epoch: forward(as_video(batch["clips"]), noise=batch["noise"]).loss,
        watches=watches(config, processes, device, entries, held_out),
        repeats=config.clips.repeats,
        tokens=config.model.num_tokens,
        flops=lambda epoch: autoencoder_flops(config.model)[1],
    )
    if counters["done"] and held_out and processes.first:
        before, after = counters["before"]["held_out_loss"], counters["after"]["held_out_loss"]
        hint = " (1.0: predicting each patch's mean)" if config.model.target == "normalized_pixels" else ""
        print(f"loss on held-out videos: {before:.3f} before, {after:.3f} after{hint}")
    return counters


def watches(config, processes, device, entries, held_out):
    """What to look at while the model trains, as the configuration asks."""
    found = [loop.Watch(config.run.reconstruct_every, functools.partial(show, (held_out or entries)[:PICTURES], config, device))]
    if held_out:
        found.append(loop.Watch(config.run.evaluate_every, functools.partial(held_out_loss, held_out, config, processes, device)))
    if config.probe.data:
        places = config.data_root, config.data_labels
        train, test = (find_labelled_videos(data, *places) for data in (config.probe.data, config.probe.test_data))
        found.append(loop.Watch(config.probe.every, functools.partial(neighbours, train, test, config, processes, device)))
    return found


@torch.no_grad()
def held_out_loss(entries, config, processes, device, model, autocast, log, step):
    """Mean loss on fixed clips of ``entries`` (start, middle and end, centre crop) under fixed masks: the same at every call.

    Every process takes its share. A video that cannot be read is named and left out, never replaced; with none left the result
    is NaN.
    """
    views = ViewClips(entries, config.clips, frames=config.model.num_frames, size=config.model.image_size, temporal=3)
    losses, left_out = {}, {}
    model.eval()
    for number in processes.share(range(len(views))):
        try:
            clips = views[number]["clips"]
        except VideoError as error:
            left_out[number] = f"left out of the held-out loss: {error}"
            continue
        noise = fixed_noise(config.model, len(clips), number)
        with autocast():
            losses[number] = model(as_video(clips.to(device)), noise=noise.to(device)).loss.item()
    losses, left_out = processes.union(losses), processes.union(left_out)
    for number in sorted(left_out):
        log.say(left_out[number])
    return {"held_out_loss": sum(losses[number] for number in sorted(losses)) / len(losses) if losses else math.nan}


def neighbours(train, test, config, processes, device, model, autocast, log, step):
    """Accuracy of nearest neighbours on the encoder's features of labelled videos (see probe.knn), each process encoding its
    share."""
    settings = EncodingConfig(
        tokens=config.probe.tokens, device=str(device), precision=config.run.precision, workers=config.run.workers
    )
    encoder = classifier_from_autoencoder(model)

    def features(entries):
        """(features, labels) in the order of ``entries``, whatever the number of processes."""
        rows = {}
        mine = processes.share(range(len(entries)))
        x, y, paths, left_out = encode(config.output, [entries[number] for number in mine], settings, model=encoder)
        numbers = iter(mine)
        for row, label, path in zip(x, y, paths):
            number = next(number for number in numbers if entries[number].path == path)
            rows[number] = (row, label)
        rows = processes.union(rows)
        for error in sum(processes.gather(left_out), []):
            log.say(f"left out of the probe: {error}")
        ordered = [rows[number] for number in sorted(rows)]
        return [torch.stack(part) for part in zip(*ordered)] if ordered else (x, y)

    (x, y), (test_x, test_y) = features(train), features(test)
    if not len(y) or not len(test_y):
        return {"knn_accuracy": math.nan}
    classes = int(max(y.max(), test_y.max())) + 1
    return {"knn_accuracy": knn(x, y, test_x, test_y, classes, config.probe.neighbours)}


@torch.no_grad()
def show(entries, config, device, model, autocast, log, step):
    """Pictures of what the model makes of the middle clip of each of ``entries``, always under the same mask."""
    views = ViewClips(entries, config.clips, frames=config.model.num_frames, size=config.model.image_size)
    model.eval()

    def picture(number):
        video = as_video(views[number]["clips"].to(device))
        with autocast():
            out = model(video, noise=fixed_noise(config.model, 1, number).to(device), decoder_mask_ratio=0)
        pictures = model.reconstruct(video, out)
        note = "patch mean and contrast from the original" if pictures.patch_statistics == "original" else "all of it predicted"
        labels = ("original", f"{config.model.mask_ratio:.0%} masked", f"reconstruction at step {step} ({note})")
        return grid([to_uint8(getattr(pictures, name)[0]) for name in ROWS], labels)

    for number, entry in enumerate(entries):
        log.picture(step, f"{number}-{Path(entry.path).stem}", functools.partial(picture, number))
    return {}


def fixed_noise(config, clips, number):
    """Masking noise [clips, N] that is always the same for video ``number``."""
    generator = torch.Generator().manual_seed(number)
    return sample_noise(config.mask_strategy, clips, config.grid, config.mask_ratio, generator=generator)
