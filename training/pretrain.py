"""``stmae pretrain``: masked-autoencoder pre-training, from a folder of videos to weights."""

import functools
import math
import time
from contextlib import closing, nullcontext

import torch
from torch.utils.data import DataLoader

from stmae.masking import sample_noise
from stmae.models import MaskedAutoencoder

from .config import PretrainConfig, to_dict
from .dataset import PretrainClips, ViewClips, as_video, collate, require_readable
from .device import choose_device, choose_precision, choose_workers, describe
from .listing import find_videos
from .log import Log
from .optimizer import adamw, learning_rate, peak_learning_rate, total_steps, weight_decay_groups
from .order import Order
from .run_folder import RunFolder
from .stopping import StopRequest, ignore_stop_signals
from .video import VideoError

Config = PretrainConfig
SKIPS_IN_A_ROW = 20  # steps without a finite gradient after which it is no accident


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where it can."""


ERRORS = (TrainingError,)


def run(config):
    """Pre-train as ``config`` (PretrainConfig) says, or continue the run in its output folder. Returns the counters of the run."""
    check(config)
    settings = config.optimizer
    device = choose_device(config.run.device)
    dtype, precision = choose_precision(config.run.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    folder = RunFolder(config.output)
    folder.claim(to_dict(config))

    entries = find_videos(config.data)
    require_readable(entries, config.model.num_frames, config.clips)
    held_out = find_videos(config.held_out) if config.held_out else []
    steps = total_steps(settings, len(entries), config.clips.repeats)

    torch.manual_seed(config.seed)
    model = MaskedAutoencoder(config.model).to(device)
    model.backend = config.run.backend
    optimizer = adamw(weight_decay_groups(model, settings.weight_decay), settings)
    # All that a run remembers besides tensors. Order, crops and masks follow from seed and step, so no random state is among it.
    counters = {
        "step": 0,
        "videos": len(entries),
        "skipped_steps": 0,
        "skips_in_a_row": 0,
        "held_out_before": None,
        "held_out_after": None,
    }
    state = folder.load_state()
    if state is not None:
        counters.update(restore(state, model, optimizer, device))
        if counters["videos"] != len(entries):
            print(
                f"note: {config.data} now lists {len(entries)} videos, not {counters['videos']}: their order changes from here on"
            )
            counters["videos"] = len(entries)
    first_step = counters["step"]
    if first_step >= steps and counters["held_out_after"] is not None or first_step >= steps and not held_out:
        print(f"{folder.path}: complete, {first_step} of {steps} steps done")
        return counters

    dataset = PretrainClips(
        entries,
        config.clips,
        frames=config.model.num_frames,
        size=config.model.image_size,
        sample_noise=functools.partial(sample_noise, config.model.mask_strategy, 1, config.model.grid, config.model.mask_ratio),
        seed=config.seed,
    )
    order = Order(
        len(entries), settings.batch, seed=config.seed, num_steps=steps, first_step=first_step, accumulate=settings.accumulate
    )
    workers = choose_workers(config.run.workers, device)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_stop_signals,
    )

    folder.record_start(device=describe(device), precision=precision, workers=workers, step=first_step, steps=steps)
    print(f"{len(entries)} videos in {config.data}" + (f", {len(held_out)} held out" if held_out else ""))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {describe(device)}, {precision}, {workers} data workers"
    )
    print(
        f"{steps} steps of {settings.batch} videos x {config.clips.repeats} clips = {settings.epochs:g} effective epochs; "
        f"learning rate {peak_learning_rate(settings):.3g} = {settings.base_lr:g} * {settings.batch} / {settings.base_batch}"
    )
    if first_step:
        print(f"continuing from step {first_step}")

    def save():
        folder.save_state(counters["step"], tensors_of(model, optimizer), counters)
        folder.save_model(model)

    forward = torch.compile(model) if config.run.compile else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    log = Log(folder, step=first_step, steps=steps, tensorboard=config.run.tensorboard)
    with closing(log), StopRequest() as stop:
        if held_out and counters["held_out_before"] is None:
            counters["held_out_before"] = held_out_loss(model, held_out, config, device, autocast, log)
            log.numbers(first_step, held_out_loss=counters["held_out_before"])

        broken = {}  # path -> reason
        window = {"start": time.perf_counter(), "wait": 0.0, "clips": 0, "losses": [], "norms": []}
        batches = iter(loader)
        while counters["step"] < steps and not stop:
            lr = learning_rate(counters["step"], steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss = 0.0
            for _ in range(settings.accumulate):
                asked = time.perf_counter()
                batch = next(batches)
                window["wait"] += time.perf_counter() - asked
                window["clips"] += len(batch["clips"])
                for path, reason in batch["skipped"]:
                    if path not in broken:
                        broken[path] = reason
                        log.event(counters["step"], f"skipped video {path}: {reason}", path=path, reason=reason)
                video = as_video(batch["clips"].to(device, non_blocking=True))
                noise = batch["noise"].to(device, non_blocking=True)
                with autocast():
                    part = forward(video, noise=noise).loss / settings.accumulate
                part.backward()
                loss += part.detach()

            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad or math.inf)
            loss, norm = float(loss), float(norm)
            counters["step"] += 1
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                counters["skips_in_a_row"] = 0
                window["losses"].append(loss)
                window["norms"].append(norm)
            else:
                counters["skipped_steps"] += 1
                counters["skips_in_a_row"] += 1
                log.event(counters["step"], f"step {counters['step']} skipped: loss {loss}, gradient norm {norm}")
                if counters["skips_in_a_row"] >= SKIPS_IN_A_ROW:
                    raise TrainingError(
                        f"{SKIPS_IN_A_ROW} steps in a row had no finite loss and gradient: stopped at step {counters['step']}. Try a lower "
                        f"optimizer.base_lr, a longer warm-up or run.precision float32{folder.standing()}"
                    )
            optimizer.zero_grad(set_to_none=True)

            log.advance(counters["step"])
            if counters["step"] % config.run.log_every == 0 or counters["step"] == steps:
                log.numbers(counters["step"], lr=lr, **summary(window, config, counters, broken, device))
                window = {"start": time.perf_counter(), "wait": 0.0, "clips": 0, "losses": [], "norms": []}
            if (
                held_out
                and config.run.evaluate_every
                and counters["step"] % config.run.evaluate_every == 0
                and counters["step"] < steps
            ):
                log.numbers(counters["step"], held_out_loss=held_out_loss(model, held_out, config, device, autocast, log))
            if counters["step"] % config.run.save_every == 0 and counters["step"] < steps:
                save()

        if stop:
            save()
            log.say(f"{stop.signal}: stopped after step {counters['step']} of {steps} and saved; the same command continues")
            return counters
        if held_out:
            counters["held_out_after"] = held_out_loss(model, held_out, config, device, autocast, log)
            log.numbers(steps, held_out_loss=counters["held_out_after"])
        save()

    if held_out:
        hint = " (1.0: predicting each patch's mean)" if config.model.normalize_target else ""
        print(f"loss on held-out videos: {counters['held_out_before']:.3f} before, {counters['held_out_after']:.3f} after{hint}")
    if broken or counters["skipped_steps"]:
        print(
            f"skipped: {len(broken)} videos that could not be used, {counters['skipped_steps']} steps without a finite gradient"
        )
    print(f"weights: {folder.model_path}")
    return counters


def check(config):
    """What can be refused before anything is read."""
    if config.model.in_channels != 3:
        raise ValueError(f"model.in_channels: expected 3 for decoded video, got {config.model.in_channels}")
    for name, value in (
        ("clips.stride", config.clips.stride),
        ("clips.repeats", config.clips.repeats),
        ("optimizer.batch", config.optimizer.batch),
        ("optimizer.accumulate", config.optimizer.accumulate),
        ("optimizer.epochs", config.optimizer.epochs),
        ("run.save_every", config.run.save_every),
        ("run.log_every", config.run.log_every),
    ):
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")
    if not 0 <= config.optimizer.warmup_epochs < config.optimizer.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs: expected less than optimizer.epochs ({config.optimizer.epochs:g}), got {config.optimizer.warmup_epochs:g}"
        )
    if config.seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {config.seed}")


def tensors_of(model, optimizer):
    """Everything to continue from, by name, on the CPU: ``model.NAME`` and ``optimizer.KEY.NAME``."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors.update({f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()})
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def restore(state, model, optimizer, device):
    """Put a state of ``tensors_of`` back; returns its counters."""
    tensors, counters = state
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            optimizer.state[parameters[parameter]][key] = value.to(device)
    return counters


def summary(window, config, counters, broken, device):
    """The numbers of the steps since the last line of the log."""
    seconds = time.perf_counter() - window["start"]
    mean = lambda values: sum(values) / len(values) if values else math.nan  # noqa: E731
    clips_per_second = window["clips"] / seconds
    values = {
        "loss": mean(window["losses"]),
        "gradient_norm": mean(window["norms"]),
        "epoch": counters["step"] * config.optimizer.batch * config.clips.repeats / counters["videos"],
        "clips_per_second": clips_per_second,
        "tokens_per_second": clips_per_second * config.model.num_tokens,
        "data_wait": window["wait"] / seconds,
        "skipped_steps": counters["skipped_steps"],
        "skipped_videos": len(broken),
    }
    if device.type == "cuda":
        values["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values


@torch.no_grad()
def held_out_loss(model, entries, config, device, autocast, log):
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
            log.say(f"left out of the held-out loss: {error}")
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
    model.train()
    return sum(losses) / len(losses) if losses else math.nan
