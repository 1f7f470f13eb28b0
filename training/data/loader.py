"""Batches from data workers: how many decode, and what happens when one of them dies."""

import re
import signal
import threading

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from .dataset import collate, worker_died


class LoaderError(RuntimeError):
    """There are no more batches; the message says why."""


def training_loader(dataset, sampler, *, workers, pin_memory=False):
    """A DataLoader of the micro-batches of ``sampler`` (a ResumableBatchSampler) from ``dataset``, decoded by ``workers``
    processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_stop_signals,
    )


def ignore_stop_signals(worker=None):
    """For data workers: Ctrl-C and a scheduler's SIGTERM reach the process group, and the main process must finish its step.

    A worker still ends with its parent, however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Batches:
    """The batches of a loader, an iterator and a context whose end is that of the loader's workers.

    The workers end here, not when they are garbage-collected: Python, when it exits, ends them by a signal that they ignore, and
    would wait for them for ever. And torch reports a worker's death from a signal handler, which would interrupt whatever the
    process is doing, a step, a save or this clean-up: here it is raised only where a batch is asked for. The handler that was
    there before is put back.
    """

    def __init__(self, loader):
        self.loader = loader
        self.waiting = False
        self.main_thread = threading.current_thread() is threading.main_thread()  # the one that handles signals

    def __enter__(self):
        self.before, self.installed = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL, signal_handling._SIGCHLD_handler_set
        self.iterator = iter(self.loader)
        if self.loader.num_workers and self.main_thread:
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
            if self.main_thread:
                signal.signal(signal.SIGCHLD, self.before)
                signal_handling._SIGCHLD_handler_set = self.installed  # torch installs its handler again when it needs it

    def _child_ended(self, number, frame):
        if self.waiting and callable(self.child_ended):
            self.child_ended(number, frame)

    def __next__(self):
        """The next batch. Raises LoaderError where there is none: a data worker died, the data are away, or hundreds of videos
        are broken."""
        try:
            self.waiting = True
            try:
                if self.loader.num_workers and self.main_thread:
                    self._child_ended(signal.SIGCHLD, None)  # for what ended since the last batch
                batch = next(self.iterator)
            finally:
                self.waiting = False
        except (RuntimeError, OSError, EOFError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reason = re.sub(r"^[\w.]*Error: ", "", reason)  # of a worker's traceback
            hint = (
                "; a data worker that is killed may have had too little memory: try fewer run.workers"
                if worker_died(error)
                else ""
            )
            raise LoaderError(f"no more data: {reason}{hint}") from error
        return batch
