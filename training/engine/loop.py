"""The training loop that pre-training and fine-tuning share: from the first step, or the last whole checkpoint, to the end.

It reads from top to bottom. What a task does with a batch, and how it judges the model, come in as functions.
"""

import functools
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.batch_sampler import Order
from ..data.dataset import collate
from ..planning.flops import ceiling
from . import fsdp
from .device import choose_precision, choose_workers, describe, keep_freed_memory
from .logger import Log, Silence
from .optimizer import adamw, learning_rate, total_steps
from .signals import StopRequest, ignore_stop_signals

SKIPS_IN_A_ROW = 20  # steps without a finite gradient after which it is no accident


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where it can."""


class Watch(NamedTuple):
    """A look at the model while it trains: at the start, every ``every`` steps (0: not), and at the end.

    look: (model, autocast, log, step) -> numbers by name, for the log. Called in every process, with the whole model; what it
        returns in the first one counts.
    """

    every: int
    look: Callable


def train(
    config,
    processes,
    device,
    folder,
    *,
    model,
    groups,
    dataset,
    peak,
    loss_of,
    watches,
    repeats,
    tokens,
    flops,
    average_decay=0.0,
):
    """Trains ``model`` in place, or continues the run in ``folder``. Returns its counters; their "done" says whether it
    came to the end.

    config: with sections ``optimizer`` and ``run``, and a ``seed``.
    groups: model -> AdamW's parameter groups; a group's "scale" (default 1) multiplies its learning rate.
    dataset: indexed by (epoch, video number), for ``collate``; every item holds ``repeats`` clips of ``tokens`` tokens.
    peak: the highest learning rate.
    loss_of: (model to call, batch on the device, epoch in [0, epochs)) -> scalar loss.
    watches: list of Watch.
    flops: epoch in [0, epochs) -> FLOPs of a clip's part in a step, forward and backward.
    average_decay: of the running average of the weights, 0 for none; watched and saved in place of the weights where
    there is one.
    """
    settings = config.optimizer
    say = print if processes.first else lambda *words: None
    dtype, precision = choose_precision(config.run.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    steps = total_steps(settings, len(dataset), repeats)

    kind = type(model)  # sharding makes it another class
    model.checkpoint_activations = config.run.checkpoint_activations
    sharded = config.run.parallel == "fsdp" and processes.world_size > 1
    if config.run.compile and sharded:
        compile_blocks(model)
    forward = wrapped = processes.wrap(model, device, config.run.parallel)
    if config.run.compile and not sharded:
        # DDP's own way of cutting the graph into buckets refuses checkpointed blocks.
        torch._dynamo.config.optimize_ddp = not config.run.checkpoint_activations
        forward = torch.compile(wrapped)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(groups(model), settings)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()} if average_decay else {}

    # All that a run remembers besides tensors. Order, crops and masks follow from seed and step, so no random state is among it.
    counters = {
        "step": 0,
        "videos": len(dataset),
        "skipped_steps": 0,
        "skips_in_a_row": 0,
        "before": None,
        "after": None,
        "done": False,
    }
    state = folder.load_state(say, owner=owner_in(model), processes=processes)
    if state is not None:
        counters.update(restore(state, model, optimizer, average))
        if counters["videos"] != len(dataset):
            say(
                f"note: {config.data} now lists {len(dataset)} videos, not {counters['videos']}: their order changes from here on"
            )
            counters["videos"] = len(dataset)
    first_step = counters["step"]
    if counters["done"]:
        say(f"{folder.path}: complete, {first_step} of {steps} steps done")
        return counters

    order = Order(
        len(dataset),
        settings.batch,
        seed=config.seed,
        num_steps=steps,
        first_step=first_step,
        accumulate=settings.accumulate,
        rank=processes.rank,
        world_size=processes.world_size,
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

    size = sum(p.numel() for p in model.parameters()) / 1e6
    where = describe(device) if processes.world_size == 1 else f"{processes.world_size} processes, {describe(device)} each"
    say(f"{size:.1f} M parameters on {where}, {precision}, {workers} data workers")
    say(
        f"{steps} steps of {settings.batch} videos x {repeats} clips = {settings.epochs:g} effective epochs; "
        f"learning rate {peak:.3g} at its highest"
    )
    if first_step:
        say(f"continuing from step {first_step}")
    # All processes at once, for they may share a processor.
    most = processes.world_size * processes.mean(ceiling(device, dtype), device=device)[0]
    if processes.first:
        say(f"a matrix product here reaches {most / 1e12:.2f} TFLOP/s; 'mfu' in the log is the model's share of that")
        folder.record_start(
            device=where,
            precision=precision,
            workers=workers,
            step=first_step,
            steps=steps,
            ceiling_tflops=float(f"{most / 1e12:.4g}"),
        )

    def judge(step, due):
        numbers = {}
        if due:
            with whole(kind, model, average, device) as judged:
                for watch in due:
                    numbers.update(watch.look(judged, autocast, log, step))
            if numbers:
                log.numbers(step, **numbers)
            model.train()
        return numbers

    def save():
        # The weights first: a state that says "done" is not looked at again, so what belongs to it must be there already.
        with whole(kind, model, average, torch.device("cpu"), keep=processes.first) as saved:
            if processes.first:
                folder.save_model(saved)
        if config.run.parallel == "fsdp":
            folder.save_shards(counters["step"], tensors_of(model, optimizer, average), counters, processes)
        elif processes.first:
            folder.save_state(counters["step"], tensors_of(model, optimizer, average), counters)
        log.plot(counters["step"], last=counters["done"])

    log = (Log if processes.first else Silence)(folder, step=first_step, steps=steps, tensorboard=config.run.tensorboard)
    with closing(log), StopRequest() as stop, Batches(loader, folder) as batches:
        if counters["before"] is None:
            counters["before"] = judge(first_step, watches)

        broken = {}  # path -> reason
        stopping = False
        window = new_window()
        model.train()
        while counters["step"] < steps and not stopping:
            lr = learning_rate(counters["step"], steps, settings, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            # Dropout, drop path and mixing draw from the global generator: seeded by the step, they are the same after a restart.
            torch.manual_seed(step_seed(config.seed, counters["step"], processes.rank))

            loss = 0.0
            for part in range(settings.accumulate):
                asked = time.perf_counter()
                batch = next(batches)
                window["wait"] += time.perf_counter() - asked
                clips = len(batch["clips"]) * processes.world_size
                window["clips"] += clips
                window["flops"] += clips * flops(counters["step"] / steps * settings.epochs)
                for path, reason in batch.pop("skipped"):
                    if path not in broken:
                        broken[path] = reason
                        log.event(counters["step"], f"skipped video {path}: {reason}", path=path, reason=reason)
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                with processes.unsynchronised(wrapped, last=part == settings.accumulate - 1):
                    with autocast():
                        part_loss = loss_of(forward, batch, counters["step"] / steps * settings.epochs) / settings.accumulate
                    part_loss.backward()
                loss += part_loss.detach()

            norm = fsdp.whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad or math.inf))
            # Every process must come to the same decisions: to step, to skip, to stop.
            loss, norm, asked_to_stop = processes.mean(loss, norm, float(bool(stop)), device=device)
            stopping = asked_to_stop > 0
            counters["step"] += 1
            step = counters["step"]
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                counters["skips_in_a_row"] = 0
                window["losses"].append(loss)
                window["norms"].append(norm)
                if average:
                    update_average(average, model, average_decay)
            else:
                counters["skipped_steps"] += 1
                counters["skips_in_a_row"] += 1
                log.event(step, f"step {step} skipped: loss {loss}, gradient norm {norm}")
                if counters["skips_in_a_row"] >= SKIPS_IN_A_ROW:
                    raise TrainingError(
                        f"{SKIPS_IN_A_ROW} steps in a row had no finite loss and gradient: stopped at step {step}. Try a lower "
                        f"optimizer.base_lr, a longer warm-up or run.precision float32{folder.standing()}"
                    )
            optimizer.zero_grad(set_to_none=True)

            log.advance(step)
            if step % config.run.log_every == 0 or step == steps:
                broken = processes.union(broken)
                epoch = step * settings.batch * repeats / len(dataset)
                shared = {"lr": lr, "epoch": epoch, "skipped_steps": counters["skipped_steps"], "skipped_videos": len(broken)}
                log.numbers(step, **summary(window, tokens, most, device), **shared)
                window = new_window()
            if step < steps and not stopping:
                aside = time.perf_counter()
                judge(step, [watch for watch in watches if watch.every and step % watch.every == 0])
                if step % config.run.save_every == 0:
                    save()
                window["start"] += time.perf_counter() - aside  # the next line of the log speaks of training alone

        if counters["step"] < steps:
            save()
            cause = stop.signal or "a signal to another process"
            log.say(f"{cause}: stopped after step {counters['step']} of {steps} and saved; the same command continues")
            return counters
        counters["after"] = judge(steps, watches)
        counters["done"] = True
        save()

    if broken or counters["skipped_steps"]:
        say(f"skipped: {len(broken)} videos that could not be used, {counters['skipped_steps']} steps without a finite gradient")
    say(f"weights: {folder.model_path}")
    return counters


def step_seed(seed, step, rank):
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def compile_blocks(model):
    """torch.compile of each block by itself: sharding works between them, where a graph of the whole would be cut anyway."""
    blocks = model.blocks()
    # Blocks share their code, and each rate of stochastic depth, width and mode compiles it once more.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()


def tensors_of(model, optimizer, average):
    """Everything to continue from, by name: ``model.NAME``, ``optimizer.KEY.NAME`` and ``average.NAME``. On the CPU, but for what
    is sharded."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors.update({f"average.{name}": value for name, value in average.items()})
    for name, parameter in model.named_parameters():
        tensors.update({f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()})
    return {
        name: value.detach() if isinstance(value, fsdp.DTensor) else value.detach().cpu().contiguous()
        for name, value in tensors.items()
    }


def owner_in(model):
    """name in ``tensors_of`` -> the weight of ``model`` that the tensor of this name is, or is about; None: none."""
    weights = model.state_dict()
    return lambda name: weights.get(name.split(".", 2 if name.startswith("optimizer.") else 1)[-1])


def restore(state, model, optimizer, average):
    """Put a state of ``tensors_of`` back; returns its counters."""
    tensors, counters = state
    owner = owner_in(model)

    def placed(name, value):
        own = owner(name)
        if own is None:
            return value  # load_state_dict says what is wrong with it
        return fsdp.like(value, own) if own.shape == value.shape else value.to(own.device)

    tensors = {name: placed(name, value) for name, value in tensors.items()}
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("average."):
            average[name.removeprefix("average.")].copy_(value)
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            optimizer.state[parameters[parameter]][key] = value
    return counters


@torch.no_grad()
def update_average(average, model, decay):
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay)


@contextmanager
def whole(kind, model, average, device, *, keep=True):
    """Context: ``model`` (of class ``kind``, perhaps sharded) whole, with its averaged weights where there are any.

    Every process must enter it. device: of what is put together from shares. keep: false where only the others need it; None
    is then what there is.
    """
    if type(model) is kind:
        with averaged(model, average):
            yield model
    else:
        yield fsdp.assemble(kind, model, average or model.state_dict(), device, keep=keep)


class Batches:
    """The batches of a loader, an iterator and a context whose end is that of the loader's workers.

    The workers end here, not when the collector comes to them: Python, when it exits, ends them by a signal that they ignore,
    and would wait for them for ever. And torch tells of a worker's death in a signal handler, which would interrupt whatever
    the process is at, a step, a save or this clean-up: here it is heard only where a batch is asked for.
    """

    def __init__(self, loader, folder):
        self.loader, self.folder = loader, folder
        self.waiting = False

    def __enter__(self):
        self.iterator = iter(self.loader)
        if self.loader.num_workers:
            # torch's, which raises where a worker was killed
            self.child_ended = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
            signal.signal(signal.SIGCHLD, self._child_ended)
        return self

    def __exit__(self, *exception):
        self.waiting = False
        if not self.loader.num_workers:
            return
        try:
            self.iterator._shutdown_workers()
        finally:
            signal.signal(signal.SIGCHLD, self.child_ended)

    def _child_ended(self, number, frame):
        if self.waiting and callable(self.child_ended):
            self.child_ended(number, frame)

    def __next__(self):
        """The next batch. Raises TrainingError where there is none: a data worker died, or hundreds of videos are broken."""
        try:
            self.waiting = True
            try:
                if self.loader.num_workers:
                    self._child_ended(signal.SIGCHLD, None)  # for what was not heard since the last batch
                batch = next(self.iterator)
            finally:
                self.waiting = False
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise TrainingError(
                f"no more data: {reason[0]}; where a data worker was killed, there may be too little memory for run.workers"
                f"{self.folder.standing()}"
            ) from error
        return batch


class averaged:
    """Context in which the model has its averaged weights, where there are any."""

    def __init__(self, model, average):
        self.model, self.average = model, average

    def __enter__(self):
        if self.average:
            self.own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average)

    def __exit__(self, *exception):
        if self.average:
            self.model.load_state_dict(self.own)


def new_window():
    """What the next line of the log will sum up."""
    return {"start": time.perf_counter(), "wait": 0.0, "clips": 0, "flops": 0.0, "losses": [], "norms": []}


def summary(window, tokens, most, device):
    """The numbers of the steps since the last line of the log. ``most``: FLOP/s of all devices together."""
    seconds = time.perf_counter() - window["start"]
    count = len(window["losses"])
    clips_per_second = window["clips"] / seconds
    values = {
        "loss": sum(window["losses"]) / count if count else math.nan,
        "gradient_norm": sum(window["norms"]) / count if count else math.nan,
        "clips_per_second": clips_per_second,
        "tokens_per_second": clips_per_second * tokens,
        "data_wait": window["wait"] / seconds,
        "mfu": window["flops"] / seconds / most,
        "memory_gb": peak_memory(device) / 1e9,
    }
    return values


def peak_memory(device):
    """Most bytes that this process held so far: of the GPU's memory, or resident in the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux, where getrusage may speak of the process that started this one
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
