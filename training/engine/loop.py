"""The training loop that pre-training and fine-tuning share: from the first step, or the last complete checkpoint, to the end.

It reads from top to bottom: ``train`` is the loop, ``train_step`` a step of it, and ``Task`` says what is trained on what.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..config.wording import counted
from ..data.batch_sampler import ResumableBatchSampler, VideoOrder
from ..data.clip_shapes import ClipShapes
from ..data.loader import Batches, LoaderError, require_memory, training_loader
from ..data.outage import DataAwayError
from ..data.packed_batch_sampler import PackedBatchSampler, PackedOrder
from ..data.video import printable
from ..planning.flops import measured_peak_flops
from . import fsdp
from .cuda_graph import CaptureError, GraphedStep, capture_problem, make_capturable
from .device import choose_precision, choose_workers, describe
from .logger import Logger, NullLogger
from .meters import StepMeter
from .optimizer import adamw, learning_rate, total_steps
from .run_folder import LEFT_OUT
from .signals import StopRequest
from .trackers import TrackerError, start_trackers
from .train_state import TrainState, load_state_tensors, owner_in, state_tensors, tensors_problem

SKIPS_IN_A_ROW = 20  # steps without a finite gradient after which it is no accident


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where it can."""


class DataUnavailableError(TrainingError):
    """The data can no longer be read; what was trained is saved, and the same command continues."""

    exit_status = 75  # "try again later", as sysexits.h has it: for a scheduler


class EvaluationHook(NamedTuple):
    """An evaluation of the model while it trains: before the first step, every ``every`` steps (0: not), and after the last.

    evaluate: (model, autocast, logger, step) -> {name: number} for the log. Called in every process, with the full model; what it
        returns in the main process counts.
    """

    every: int
    evaluate: Callable


class PackedBatches(NamedTuple):
    """What a Task of packed batches says in the place of its clips' tokens and FLOPs, and of their equal weight."""

    shapes: ClipShapes
    """what clips are drawn"""
    pictures: list
    """of each video, whether it is a picture"""
    measure: Callable
    """micro-batch -> (weight of its loss in a batch's, its tokens N, its FLOPs in a step, forward and backward)"""


@dataclass(kw_only=True)
class Task:
    """What is trained on what: the model, the data, the loss, and what is evaluated on the way."""

    model: nn.Module
    """trained in place"""
    dataset: Dataset
    """indexed by (epoch, video number); every item holds ``repeats`` clips of ``tokens`` tokens"""
    loss: Callable
    """(model to call, batch on the device, epoch in [0, epochs)) -> scalar loss"""
    parameter_groups: Callable
    """model -> AdamW's parameter groups; a group's "scale" (default 1) multiplies its learning rate"""
    peak_lr: float
    """the highest learning rate"""
    repeats: int
    """clips of one video in an item"""
    tokens: int
    """of a clip"""
    flops: Callable
    """epoch in [0, epochs) -> FLOPs of a clip in a step, forward and backward"""
    packed: PackedBatches | None = None
    """where batches are packed; ``tokens`` and ``flops`` are not used then"""
    hooks: list[EvaluationHook] = field(default_factory=list)
    average_decay: float = 0.0
    """of the running average of the weights, which is evaluated and saved in their place; 0: none"""


def train(task, config, processes, device, folder):
    """Trains ``task.model`` in place, or continues the run in ``folder``. Returns the TrainState; its ``done`` says whether the
    run came to its end.

    config: with sections ``optimizer`` and ``run``, a ``data`` and a ``seed``. processes: a Processes, whose group is open.
    folder: a RunFolder. Raises TrainingError where training cannot go on.
    """
    with torch_settings(task, config):
        training = Training(task, config, processes, device)
        state = resume(training, folder)
        if state.done:
            training.print(f"{folder.path}: complete, {state.step} of {counted(training.steps, 'step')} done")
            rewrite_damaged_model(training, folder)
            return state
        task.dataset.left_out = folder.left_out()
        if task.dataset.left_out:
            training.print(f"note: not used: {counted(len(task.dataset.left_out), 'video')} that {folder.path / LEFT_OUT} names")
        loader = training.loader(state.step)
        training.describe(folder, state.step)
        logger = training.logger(folder, state.step)
        broken = {}  # path -> reason of the videos that could not be used

        with closing(logger), StopRequest() as stop, Batches(loader, timeout=config.run.data_timeout) as batches:
            if state.before is None:
                state.before = evaluate(training, task.hooks, state, folder, logger)
            task.model.train()
            meter, stopping = StepMeter(training.peak_flops, device), False
            parts, no_data = next_parts(training, batches, state.step, meter, logger, broken)
            (lacking,) = processes.mean(float(no_data is not None), device=device)
            while state.step < training.steps and not stopping and not lacking:
                lr = training.set_learning_rate(state.step)
                try:
                    loss, norm = train_step(training, parts, state.step, meter)
                except CaptureError as error:
                    raise TrainingError(f"{error}{folder.resume_hint()}") from error
                # While a GPU computes this step.
                parts, no_data = next_parts(training, batches, state.step + 1, meter, logger, broken)
                # Every process must come to the same decisions: to update, to skip, to stop, to save for lack of data.
                flags = float(bool(stop)), float(no_data is not None)
                loss, norm, stop_requested, lacking = processes.mean(loss, norm, *flags, device=device)
                stopping = stop_requested > 0
                state.step += 1
                update_or_skip(training, state, loss, norm, meter, logger, folder)

                logger.advance(state.step)
                if state.step % config.run.log_every == 0 or state.step == training.steps:
                    broken, training.short = processes.gather_dict(broken), processes.gather_dict(training.short)
                    logger.metrics(state.step, **meter.summary(), lr=lr, **training.progress(state, broken))
                if state.step < training.steps and not stopping and not lacking:
                    with meter.paused():
                        due = [hook for hook in task.hooks if hook.every and state.step % hook.every == 0]
                        evaluate(training, due, state, folder, logger)
                        if state.step % config.run.save_every == 0:
                            save(training, state, folder, logger)

            if state.step == training.steps:
                state.after = evaluate(training, task.hooks, state, folder, logger)
                state.done = True
            save(training, state, folder, logger)
            if not state.done and not stopping:
                raise_for_lack_of_data(no_data, training, folder)
            if not state.done:
                cause = stop.signal or "a signal to another process"
                logger.info(f"{cause}: stopped after step {state.step} of {training.steps} and saved; the same command continues")
                return state

    if broken or state.skipped_steps:
        training.print(
            f"skipped: {counted(len(broken), 'video')} that could not be used, {counted(state.skipped_steps, 'step')} without a "
            "finite gradient"
        )
    if training.short:
        training.print(f"short: {counted(len(training.short), 'video')} with fewer frames than a clip needs (clips.short)")
    training.print(f"weights: {folder.model_path}")
    return state


def next_parts(training, batches, step, meter, logger, broken):
    """(the micro-batches of step ``step``, None), or (None, why there are none); (None, None) after the last step."""
    if step >= training.steps:
        return None, None
    try:
        with meter.waiting_for_data():
            parts = [next(batches) for _ in range(training.config.optimizer.accumulate)]
    except (LoaderError, OSError) as error:
        return None, error
    for part in parts:
        for path, reason in part.pop("skipped"):
            if path not in broken:
                broken[path] = reason
                logger.event(step, f"skipped video {path}: {reason}", path=path, reason=reason)
        for path, words in part.pop("short"):
            if not training.short:
                logger.event(step, f"short video {path}: {words} (clips.short); others are only counted")
            training.short[path] = words
    return parts, None


def raise_for_lack_of_data(error, training, folder):
    """In all processes the same, where one has an ``error``: that a data worker died, or that the data cannot be read. A video
    that a worker died of is left out from the next start on."""
    processes, path, blame, died = training.processes, None, False, isinstance(error, LoaderError) and error.worker_died
    if died and error.number is not None:
        path, blame = training.task.dataset.entries[error.number].path, error.to_blame
    found = processes.gather(None if error is None else (str(error), died, path, blame))
    words, died, path, blame = next(words for words in found if words is not None)
    list_of_them = folder.path / LEFT_OUT
    if path is not None and blame:
        processes.run_on_main(lambda: folder.leave_out(path, printable(words.replace("\n", " "))))
        words += f"; it is left out from now on: {list_of_them} names it"
    elif path is not None:
        words += f"; if it is this video each time, add its path to {list_of_them}"
    kind = TrainingError if died else DataUnavailableError
    raise kind(f"{words}{folder.resume_hint()}") from error


def train_step(training, parts, step, meter):
    """The gradients of step ``step``, accumulated over the micro-batches ``parts`` and clipped; with run.cuda_graph also its
    update. Returns (loss, gradient norm), tensors []."""
    config, processes, device, task = training.config, training.processes, training.device, training.task
    # Dropout, drop path and mixing draw from the global generator: seeded by the step, they are the same after a restart.
    torch.manual_seed(step_seed(config.seed, step, processes.rank))
    epoch, accumulate = step / training.steps * config.optimizer.epochs, config.optimizer.accumulate
    divisors = loss_divisors(training, parts, epoch, meter)
    if training.graphed_step is not None:
        return training.graphed_step(parts)
    loss = 0.0
    for number, (part, divisor) in enumerate(zip(parts, divisors)):
        batch = {name: on_device(value, device) for name, value in part.items()}
        with processes.no_sync(training.wrapped, last=number == accumulate - 1):
            with training.autocast():
                part_loss = task.loss(training.forward, batch, epoch) / divisor
            part_loss.backward()
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(training.parameters, config.optimizer.clip_grad or math.inf)
    return loss, fsdp.full_tensor(norm)


def on_device(value, device):
    """A tensor, or a list of one for each clip, on ``device``."""
    if isinstance(value, list):
        return [one.to(device, non_blocking=True) for one in value]
    return value.to(device, non_blocking=True)


def loss_divisors(training, parts, epoch, meter):
    """What the loss of each micro-batch is divided by. Gradients are summed over micro-batches and averaged over processes, and
    the result must be that of the step's batch: so an unequal micro-batch counts as its weight among all. Notes its clips in the
    ``meter``."""
    task, processes = training.task, training.processes
    if task.packed is None:
        clips = sum(len(part["clips"]) for part in parts) * processes.world_size
        meter.add_clips(clips, clips * task.tokens, clips * task.flops(epoch))
        return [len(parts)] * len(parts)
    measured = [task.packed.measure(part) for part in parts]
    weight, tokens, flops = (sum(values) for values in zip(*measured))
    clips = sum(len(part["clips"]) for part in parts)
    weight, clips, tokens, flops = processes.sum(weight, clips, tokens, flops, device=training.device)
    meter.add_clips(int(clips), int(tokens), flops)
    return [weight / (own * processes.world_size) for own, _, _ in measured]


def update_or_skip(training, state, loss, norm, meter, logger, folder):
    """AdamW's update with the gradients of the step that ended, unless ``loss`` or ``norm`` is not finite. Raises TrainingError
    after SKIPS_IN_A_ROW steps without an update."""
    if math.isfinite(loss) and math.isfinite(norm):
        if training.graphed_step is None:  # else it is made, by the same rule
            training.optimizer.step()
        state.skips_in_a_row = 0
        meter.add_step(loss, norm)
        if training.average:
            update_average(training.average, training.task.model, training.task.average_decay)
    else:
        state.skipped_steps += 1
        state.skips_in_a_row += 1
        logger.event(state.step, f"step {state.step} skipped: loss {loss}, gradient norm {norm}")
        if state.skips_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingError(
                f"{SKIPS_IN_A_ROW} steps in a row had no finite loss and gradient: stopped at step {state.step}. Try a lower "
                f"optimizer.base_lr, a longer warm-up or run.precision float32{folder.resume_hint()}"
            )
    training.optimizer.zero_grad(set_to_none=True)


class Training:
    """What every step of a run needs, made once: the model to call, its parameters, optimizer and average, the number of
    steps."""

    def __init__(self, task, config, processes, device):
        self.task, self.config, self.processes, self.device = task, config, processes, device
        self.print = print if processes.is_main else lambda *words: None
        self.dtype, self.precision = choose_precision(config.run.precision, device)
        self.autocast = functools.partial(torch.autocast, device.type, self.dtype) if self.dtype else nullcontext
        self.order = self.packed_order() if task.packed is not None else None
        self.steps = self.steps_of(len(task.dataset))
        self.short = {}  # path -> what is done about it, of the videos with fewer frames than a clip needs
        videos = None if self.order is not None else config.optimizer.batch // processes.world_size  # packed steps vary
        self.workers = choose_workers(config.run.workers, device, videos)
        problem = capture_problem(config.run, device, processes.world_size) if config.run.cuda_graph else None
        if problem is not None:
            raise TrainingError(f"run.cuda_graph: {problem}")

        model = task.model
        self.model_class = type(model)  # sharding makes it another class
        model.checkpoint_activations = config.run.checkpoint_activations
        sharded = config.run.parallel == "fsdp" and processes.world_size > 1
        by_block = sharded or task.packed is not None
        if config.run.compile and by_block:
            # Sharding works between them, where a graph of the model would be cut anyway. Of packed batches every one has other
            # shapes, of which a block sees the number of tokens alone.
            for block in model.blocks():
                block.compile(dynamic=True if task.packed is not None else None)
        self.wrapped = processes.wrap(model, device, config.run.parallel)
        self.forward = torch.compile(self.wrapped) if config.run.compile and not by_block else self.wrapped
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(task.parameter_groups(model), config.optimizer)
        self.graphed_step = self.graph_step() if config.run.cuda_graph else None
        self.average = {n: value.detach().clone() for n, value in model.state_dict().items()} if task.average_decay else {}

    def packed_order(self):
        settings, packed = self.config.optimizer, self.task.packed
        order = VideoOrder(self.task.dataset.lists, self.config.seed)
        size = {"batch": settings.batch} if settings.tokens is None else {"tokens": settings.tokens}
        shapes, share = packed.shapes, 2 / self.processes.world_size  # of this step and of the next
        cost = settings.tokens or settings.batch * shapes.mean_cost
        require_memory(share * cost * shapes.tokens_per_cost * shapes.token_bytes)  # before millions of samples are drawn
        return PackedOrder(order, packed.shapes, packed.pictures, seed=self.config.seed, **size)

    def steps_of(self, videos):
        if self.order is not None:
            return self.order.steps(self.config.optimizer.epochs / self.task.repeats * videos)
        return total_steps(self.config.optimizer, videos, self.task.repeats)

    def samples(self, step):
        """How many videos the steps before ``step`` take."""
        return step * self.config.optimizer.batch if self.order is None else self.order.start(step)

    def graph_step(self):
        def loss(batch):
            with self.autocast():
                return self.task.loss(self.forward, batch, 0.0)  # of a pre-training step, which is the same in every epoch

        make_capturable(self.optimizer, self.device)
        return GraphedStep(loss, self.parameters, self.optimizer, clip_grad=self.config.optimizer.clip_grad, device=self.device)

    def loader(self, first_step):
        settings, processes = self.config.optimizer, self.processes
        part = {
            "num_steps": self.steps,
            "first_step": first_step,
            "accumulate": settings.accumulate,
            "rank": processes.rank,
            "world_size": processes.world_size,
        }
        if self.order is not None:
            sampler = PackedBatchSampler(self.order, **part)
        else:
            lists = self.task.dataset.lists
            sampler = ResumableBatchSampler(len(self.task.dataset), settings.batch, seed=self.config.seed, lists=lists, **part)
        # Of this step and of the next.
        held, on_gpu = 2 * settings.accumulate, self.device.type == "cuda"
        loader = training_loader(self.task.dataset, sampler, workers=self.workers, held=held, pin_memory=on_gpu)
        if loader.shared_bytes:
            megabytes = -(-loader.shared_bytes // 2**20)
            self.print(f"data workers write clips to {megabytes} MiB of shared memory, none of it in /dev/shm")
        return loader

    def logger(self, folder, step):
        if not self.processes.is_main:
            return NullLogger(folder)
        try:
            trackers = start_trackers(folder, step, self.config)
        except TrackerError as error:
            raise TrainingError(str(error)) from error
        return Logger(folder, step=step, steps=self.steps, trackers=trackers)

    def describe(self, folder, first_step):
        """Prints what will be trained on what, measures the device, and records the start in run.jsonl."""
        settings, processes, device = self.config.optimizer, self.processes, self.device
        size = sum(p.numel() for p in self.task.model.parameters()) / 1e6
        where = describe(device) if processes.world_size == 1 else f"{processes.world_size} processes, {describe(device)} each"
        self.print(f"{size:.1f} M parameters on {where}, {self.precision}, {counted(self.workers, 'data worker')}")
        videos = self.samples(self.steps) / self.steps  # of a step
        size = f"{counted(round(videos, 1), 'video', 'g')} x {counted(self.task.repeats, 'clip')}"
        if self.order is not None and settings.tokens is not None:
            size = f"at most {counted(settings.tokens, 'token', ',')}, on average {size},"
        self.print(
            f"{counted(self.steps, 'step')} of {size} = {counted(settings.epochs, 'effective epoch', 'g')}; peak learning rate "
            f"{self.task.peak_lr:.3g}"
        )
        if videos > len(self.task.dataset):
            name = "batch" if self.order is None or settings.tokens is None else "tokens"
            self.print(
                f"note: with optimizer.{name} {getattr(settings, name)} a step takes more videos than there are, "
                f"{len(self.task.dataset)}: some of them more than once, in other clips"
            )
        if first_step:
            self.print(f"continuing from step {first_step}")
        # All processes at once, for they may share a processor.
        self.peak_flops = processes.world_size * processes.mean(measured_peak_flops(device, self.dtype), device=device)[0]
        if processes.is_main:
            self.note_differences(folder, first_step, where)
            self.print(
                f"a matrix product here reaches {self.peak_flops / 1e12:.2f} TFLOP/s; "
                "'mfu' in the log is the fraction of it that the model reaches"
            )
            folder.record_start(
                device=where,
                precision=self.precision,
                backend=self.config.run.backend,
                compile=self.config.run.compile,
                workers=self.workers,
                step=first_step,
                steps=self.steps,
                ceiling_tflops=float(f"{self.peak_flops / 1e12:.4g}"),
            )

    def note_differences(self, folder, first_step, where):
        """Prints what differs from the last start of a run that is continued and changes the bits of its numbers."""
        before = folder.last_start() if first_step else None
        if before is None:
            return
        run = self.config.run
        current = {"device": where, "precision": self.precision, "backend": run.backend, "compile": run.compile}
        current |= {"threads": torch.get_num_threads(), **folder.versions()}
        previous = {**before, **(before.get("versions") or {})}
        if "device" in before:
            previous["device"] = before["device"].replace("(1 threads)", "(1 thread)")  # as it was written once
        differing = [
            f"{name} {previous[name]} -> {value}"
            for name, value in current.items()
            if name in previous and previous[name] != value
        ]
        if differing:
            self.print(
                f"note: other than at the last start: {', '.join(differing)}. From here on the numbers are not, bit for bit, "
                "those of a run without a break"
            )

    def set_learning_rate(self, step):
        lr = learning_rate(step, self.steps, self.config.optimizer, self.task.peak_lr)
        for group in self.optimizer.param_groups:
            value = lr * group.get("scale", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        return lr

    def progress(self, state, broken):
        epoch = self.samples(state.step) * self.task.repeats / len(self.task.dataset)
        return {
            "epoch": epoch,
            "skipped_steps": state.skipped_steps,
            "skipped_videos": len(broken),
            "short_videos": len(self.short),
        }

    def evaluate(self, hooks, logger, step):
        """{name: number} of all ``hooks``, logged."""
        numbers = {}
        if hooks:
            with self.full_model(self.device) as model:
                for hook in hooks:
                    numbers.update(hook.evaluate(model, self.autocast, logger, step))
            if numbers:
                logger.metrics(step, **numbers)
            self.task.model.train()
        return numbers

    @contextmanager
    def full_model(self, device, *, keep=True):
        """Context: the model with full weights, gathered on ``device`` where they are sharded, and averaged where there is an
        average. Every process must enter it; where ``keep`` is false and the model is sharded, it is None."""
        model = self.task.model
        if type(model) is not self.model_class:
            yield fsdp.gather_model(self.model_class, model, self.average or model.state_dict(), device, keep=keep)
        elif self.average:
            own = {name: value.detach().clone() for name, value in model.state_dict().items()}
            model.load_state_dict(self.average)
            try:
                yield model
            finally:
                model.load_state_dict(own)
        else:
            yield model


def resume(training, folder):
    """The TrainState of the newest complete checkpoint in ``folder``, its tensors put back; a new one where there is none."""
    task, videos = training.task, len(training.task.dataset)
    state = TrainState(videos=videos)

    def problem(tensors, values):
        wrong = state.problem_of(values)
        if wrong is None and not values.get("steps") and values["step"] > training.steps_of(values.get("videos", videos)):
            wrong = f"its step {values['step']} is beyond the end"
        updates = 0 if wrong else values["step"] - values.get("skipped_steps", 0)
        return wrong or tensors_problem(tensors, task.model, training.average, updates)

    found = folder.load_state(training.print, problem=problem, owner=owner_in(task.model), processes=training.processes)
    if found is not None:
        tensors, values = found
        state.load_dict(values)
        load_state_tensors(tensors, task.model, training.optimizer, training.average)
        if state.videos != videos:
            training.print(
                f"note: {training.config.data} now lists {counted(videos, 'video')}, not {state.videos}: their order changes "
                "from here on"
            )
            state.videos = videos
        if state.step > training.steps:
            raise TrainingError(
                f"{folder.path} holds a run at step {state.step}, and with these settings and {counted(videos, 'video')} in "
                f"{training.config.data} it ends at step {training.steps}: repeat run.extend_epochs if it had one, put back the "
                "videos, or choose another --output"
            )
        if state.done and training.config.run.extend_epochs and state.step < training.steps:
            state.done = False
    state.steps = training.steps
    return state


def evaluate(training, hooks, state, folder, logger):
    """{name: number} of all ``hooks``, logged. Where their data are away, saves and raises DataUnavailableError."""
    try:
        return training.evaluate(hooks, logger, state.step)
    except DataAwayError as error:  # raised in all processes
        save(training, state, folder, logger)
        raise DataUnavailableError(f"{error}{folder.resume_hint()}") from error


def save(training, state, folder, logger):
    """Writes the weights, then the state, then the curves."""
    processes = training.processes
    # The weights first: a state that says "done" is never resumed, so what belongs to it must be there already.
    with training.full_model(torch.device("cpu"), keep=processes.is_main) as model:
        if processes.is_main:
            folder.save_model(model)
    tensors = state_tensors(training.task.model, training.optimizer, training.average)
    if training.config.run.parallel == "fsdp":
        folder.save_shards(state.step, tensors, state.to_dict(), processes)
    elif processes.is_main:
        folder.save_state(state.step, tensors, state.to_dict())
    logger.plot(state.step, last=state.done)


def rewrite_damaged_model(training, folder):
    """Of a complete run: its weights from its state, where the file of the weights is not what was written."""
    processes = training.processes
    problem = processes.gather(folder.model_problem() if processes.is_main else None)[0]
    if problem is not None:
        training.print(f"{folder.model_path.name} is damaged ({problem}): written anew from the checkpoint")
        with training.full_model(torch.device("cpu"), keep=processes.is_main) as model:
            if processes.is_main:
                folder.save_model(model)


@contextmanager
def torch_settings(task, config):
    """Context: what a run changes of torch's process state, put back at its end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=fsdp.VIEW_WARNING)
        if config.run.compile:
            import torch._dynamo.config as dynamo

            # DDP's own way of cutting the graph into buckets refuses checkpointed blocks. With FSDP blocks share their code, and
            # each rate of stochastic depth, width and mode compiles it once more.
            stack.enter_context(
                dynamo.patch(
                    optimize_ddp=not config.run.checkpoint_activations and dynamo.optimize_ddp,
                    recompile_limit=max(dynamo.recompile_limit, 4 * len(task.model.blocks())),
                )
            )
        yield


def step_seed(seed, step, rank):
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def update_average(average, model, decay):
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay)
