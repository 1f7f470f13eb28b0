"""What a masked autoencoder is worth while it trains: its loss on held-out videos, nearest neighbours on its features,
pictures."""

import functools
import math
from pathlib import Path

import torch

from stmae.checkpoint.resize import classifier_from_autoencoder
from stmae.models.packing import grid_of

from ..config import EncodingConfig
from ..data.dataset import as_video
from ..data.packed_clips import evaluation_views
from ..data.video import VideoError, printable
from .features import encode
from .pictures import ROWS, grid, to_uint8
from .probes import knn


def _views(entries, config, temporal=1):
    return evaluation_views(entries, config.clips, config.model, temporal=temporal, patience=config.run.data_patience)


@torch.no_grad()
def held_out_loss(entries, config, processes, device, model, autocast, logger, step):
    """Mean loss on fixed clips of ``entries`` (start, middle and end, centre crop) under fixed masks: the same at every call.

    Every process takes a shard of the videos. A video that cannot be read is named and left out, never replaced; with none left
    the result is NaN.
    """
    views = _views(entries, config, temporal=3)
    losses, left_out = {}, {}
    model.eval()

    def own_losses():
        for number in processes.shard(range(len(views))):
            try:
                clips = views[number]["clips"]
            except VideoError as error:
                left_out[number] = f"left out of the held-out loss: {error}"
                continue
            video, mask = masked_views(model, clips.to(device), number, packed=config.packed)
            with autocast():
                losses[number] = model(video, mask=mask).loss.item()

    processes.gather_results(own_losses)
    losses, left_out = processes.gather_dict(losses), processes.gather_dict(left_out)
    for number in sorted(left_out):
        logger.info(left_out[number])
    return {"held_out_loss": sum(losses[number] for number in sorted(losses)) / len(losses) if losses else math.nan}


def knn_accuracy(train, test, config, processes, device, model, autocast, logger, step):
    """Accuracy of nearest neighbours on the encoder's features of labelled videos (see probes.knn), each process encoding a
    shard."""
    settings = EncodingConfig(
        tokens=config.probe.tokens, device=str(device), precision=config.run.precision, workers=config.run.workers
    )
    encoder, patience = classifier_from_autoencoder(model), config.run.data_patience

    def features(entries):
        """(features, labels) in the order of ``entries``, whatever the number of processes."""
        rows = {}
        mine = processes.shard(range(len(entries)))
        own = functools.partial(
            encode, config.output, [entries[number] for number in mine], settings, model=encoder, patience=patience
        )
        x, y, paths, left_out = processes.gather_results(own)[processes.rank]
        numbers = iter(mine)
        for row, label, path in zip(x, y, paths):
            number = next(number for number in numbers if entries[number].path == path)
            rows[number] = (row, label)
        rows = processes.gather_dict(rows)
        for error in sum(processes.gather(left_out), []):
            logger.info(f"left out of the probe: {error}")
        ordered = [rows[number] for number in sorted(rows)]
        return [torch.stack(part) for part in zip(*ordered)] if ordered else (x, y)

    (x, y), (test_x, test_y) = features(train), features(test)
    if not len(y) or not len(test_y):
        return {"knn_accuracy": math.nan}
    classes = int(max(y.max(), test_y.max())) + 1
    return {"knn_accuracy": knn(x, y, test_x, test_y, classes, config.probe.neighbours)}


@torch.no_grad()
def log_reconstructions(entries, config, device, model, autocast, logger, step):
    """Pictures of what the model makes of the middle clip of each of ``entries``, always under the same mask."""
    views = _views(entries, config)
    model.eval()

    def picture(number):
        clips = views[number]["clips"].to(device)
        video, mask = masked_views(model, clips, number, packed=config.packed, decoder_mask_ratio=0)
        with autocast():
            out = model(video, mask=mask)
        pictures = model.reconstruct(video, out)
        ratio = config.model.mask_ratio
        if config.packed:
            (pictures,), hidden, visible = pictures, len(out.masked[0]), len(out.keep[0])
            ratio = hidden / (hidden + visible)
        note = "patch mean and contrast from the original" if pictures.patch_statistics == "original" else "all of it predicted"
        labels = ("original", f"{ratio:.0%} masked", f"reconstruction at step {step} ({note})")
        return grid([to_uint8(getattr(pictures, name)[0]) for name in ROWS], labels)

    for number, entry in enumerate(entries):
        logger.image(step, f"{number}-{printable(Path(entry.path).stem)}", functools.partial(picture, number))
    return {}


def masked_views(model, clips, number, *, packed, **options):
    """What the model takes for the views ``clips`` [B, T, H, W, C] of video ``number``: the video and its Mask, always the same
    one; with ``packed`` a list of clips and of their Masks. options: as of ``model.sample_mask``."""
    video, generator = as_video(clips), torch.Generator().manual_seed(number)
    if not packed:
        return video, model.sample_mask(len(video), generator=generator, **options).to(video.device)
    grids = [grid_of(model.config, clip) for clip in video]
    return list(video), [mask.to(video.device) for mask in model.sample_masks(grids, generator=generator, **options)]
