"""Masked-autoencoder pre-training, from a folder of videos to weights."""

import functools
import math

import torch

from stmae import checkpoint
from stmae.masking import Mask, make_mask, make_masks, multi_block
from stmae.models import MaskedAutoencoder
from stmae.models.config import as_pair

from ..config.wording import counted
from ..data.clip_shapes import ClipShapes, is_picture
from ..data.dataset import PretrainClips, as_video, require_readable
from ..data.packed_clips import PackedClips
from ..data.video_list import find_mixture, find_train_and_test, find_videos
from ..engine.launch import run_distributed
from ..engine.loop import EvaluationHook, PackedBatches, Task, train
from ..engine.optimizer import peak_learning_rate, weight_decay_groups
from ..engine.run_folder import weights_file
from ..evaluation.pretraining import held_out_loss, knn_accuracy, log_reconstructions
from ..planning.flops import autoencoder_flops

MEAN_IS_ONE = ("normalized_pixels", "channel_normalized_pixels")  # targets: the loss of predicting each patch's mean is 1
PICTURES = 3  # videos whose reconstructions are shown


def pretrain(config):
    """Pre-trains a masked autoencoder on videos, or continues the run in ``config.output``.

    config: a PretrainConfig. Under torchrun every process calls this with the same one.

    Returns the TrainState: ``done`` (false where a signal stopped the run), ``step``, and what was evaluated ``before`` and
    ``after``. The weights are in ``config.output``/model.safetensors; ``stmae.checkpoint.load`` reads them.

    Raises ValueError for data or settings that cannot be used, RunFolderError for an output folder that cannot, TrainingError
    where training cannot go on, LoaderError where there is too little memory for a batch.
    """
    return run_distributed(_pretrain, config)


def _pretrain(config, processes, device, folder):
    mixture = find_mixture(config.data, config.data_root, config.data_labels)
    entries = mixture.entries
    for part in mixture.parts():
        require_readable(part, max(config.clips.frames or [config.model.num_frames]), config.clips)
    held_out = find_videos(config.held_out, config.data_root, config.data_labels) if config.held_out else []
    if processes.is_main:
        head = f"{counted(len(entries), 'video')} in {config.data}" + (f", {len(held_out)} held out" if held_out else "")
        print("\n".join([head, *mixture.describe()]))
    task = pretraining_task(config, entries, device, evaluation_hooks(config, processes, device, entries, held_out))
    task.dataset.lists = mixture.weights
    if config.init and not folder.states():  # a run that goes on has its own weights
        report = checkpoint.initialize(task.model, weights_file(config.init), decoder=config.init_decoder)
        if processes.is_main:
            print(report)
    state = train(task, config, processes, device, folder)
    if state.done and held_out and processes.is_main:
        before, after = state.before["held_out_loss"], state.after["held_out_loss"]
        hint = " (1.0: predicting each patch's mean)" if config.model.target in MEAN_IS_ONE else ""
        print(f"loss on held-out videos: {before:.3f} before, {after:.3f} after{hint}")
    return state


def pretraining_task(config, entries, device, hooks=()):
    """The Task: a new autoencoder on random clips of ``entries`` under random masks, its own loss."""
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder(config.model).to(device)
    model.backend = config.run.backend
    shape, batch, packed = config.model, config.optimizer.batch, None
    options = {"seed": config.seed, "patience": config.run.data_patience}
    if config.packed:
        pictures = [is_picture(entry) for entry in entries]
        shapes = ClipShapes(shape, config.clips, pictures=any(pictures))
        dataset = PackedClips(entries, config.clips, shapes=shapes, sample_mask=functools.partial(clip_mask, shape), **options)
        packed = PackedBatches(shapes, pictures, functools.partial(measure, shape))
        if config.optimizer.tokens is not None:
            batch = config.optimizer.tokens / shapes.standard_cost
    else:
        mask = (shape.mask_strategy, 1, shape.grid, shape.mask_ratio)
        draw = functools.partial(make_mask, *mask, decoder_ratio=shape.decoder_mask_ratio)
        size = {"frames": shape.num_frames, "size": shape.image_size}
        dataset = PretrainClips(entries, config.clips, sample_mask=draw, **size, **options)
    return Task(
        model=model,
        dataset=dataset,
        loss=autoencoder_loss,
        parameter_groups=functools.partial(weight_decay_groups, weight_decay=config.optimizer.weight_decay),
        # A batch counts videos: the repeats of one video are not counted in pre-training.
        peak_lr=peak_learning_rate(config.optimizer, batch),
        repeats=config.clips.repeats,
        tokens=config.model.num_tokens,
        flops=lambda epoch: autoencoder_flops(config.model)[1],
        packed=packed,
        hooks=list(hooks),
    )


def autoencoder_loss(forward, batch, epoch):
    """The autoencoder's own loss [] of a batch's clips under their masks."""
    if isinstance(batch["clips"], list):
        masks = [Mask(keep, masked) for keep, masked in zip(batch["keep"], batch["masked"])]
        return forward([as_video(clip[None])[0] for clip in batch["clips"]], mask=masks).loss
    return forward(as_video(batch["clips"]), mask=Mask(batch["keep"], batch["masked"])).loss


def clip_mask(config, grid, generator, visible=None):
    """The Mask of one clip of this patch grid; with ``visible``, as of ``multi_block`` with at most so many visible tokens."""
    if visible is not None:
        return multi_block(grid, config.blocks, visible=visible, generator=generator)
    ratios = {"ratios": [config.mask_ratio], "decoder_ratio": config.decoder_mask_ratio}
    return make_masks(config.mask_strategy, [grid], **ratios, blocks=config.blocks, generator=generator)[0]


def measure(config, batch):
    """Of a packed micro-batch: what its loss is the mean over, patches or clips, its tokens and its FLOPs."""
    counts = [(len(keep), len(masked)) for keep, masked in zip(batch["keep"], batch["masked"])]
    weight = len(counts) if config.loss_reduction == "clip" else sum(masked for _, masked in counts)
    area = math.prod(as_pair(config.patch_size)) * config.tubelet_size
    tokens = sum(math.prod(clip.shape[:3]) // area for clip in batch["clips"])
    return weight, tokens, sum(autoencoder_flops(config, *own)[1] for own in counts)


def evaluation_hooks(config, processes, device, entries, held_out):
    """The EvaluationHooks that the configuration asks for."""
    pictures = functools.partial(log_reconstructions, (held_out or entries)[:PICTURES], config, device)
    hooks = [EvaluationHook(config.run.reconstruct_every, pictures)]
    if held_out:
        loss = functools.partial(held_out_loss, held_out, config, processes, device)
        hooks.append(EvaluationHook(config.run.evaluate_every, loss))
    if config.probe.data:
        locations = config.data_root, config.data_labels
        labelled = find_train_and_test(config.probe.data, config.probe.test_data, *locations)
        probe = functools.partial(knn_accuracy, *labelled, config, processes, device)
        hooks.append(EvaluationHook(config.probe.every, probe))
    return hooks
