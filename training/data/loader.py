"""Batches from data workers: how many decode, and what happens when one of them dies, or reads one video for ever."""

import atexit
import functools
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from .dataset import worker_died
from .free_memory import free_memory
from .outage import DataAwayError
from .shared_ring import SharedRing
from .video import printable

POLL = 5.0  # seconds between looks at what the workers read, where no batch comes
PAUSE = 0.002  # seconds between looks at whether a place in the ring is free
AHEAD = 4  # videos that a worker reads ahead, at least
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)  # which nobody sends from outside


class LoaderError(RuntimeError):
    """There are no more batches; the message says why.

    worker_died: whether a data worker ended, or did not end the video that it read.
    number: of the video that it read then; None: unknown. to_blame: whether that video is what ended it, and not the system.
    """

    def __init__(self, message, *, worker_died=False, number=None, to_blame=False):
        super().__init__(message)
        self.worker_died, self.number, self.to_blame = worker_died, number, to_blame


class Reading:
    """Which video every data worker reads, and since when: int64 [workers, 2] in memory that they share with the loop.

    Called by a data set with the number of the video that it is about to read, and with -1 after it.
    """

    def __init__(self, workers):
        self.board = torch.full((workers, 2), -1).share_memory_()

    def __call__(self, number):
        worker = get_worker_info()
        if worker is not None:
            self.board[worker.id] = torch.tensor([number, time.monotonic_ns()])

    def number(self, worker):
        """Of the video that the worker reads, or None."""
        number = int(self.board[worker, 0])
        return None if number < 0 else number

    def seconds(self, worker):
        """For how long it has read it; 0 where it reads none."""
        number, since = self.board[worker].tolist()
        return 0.0 if number < 0 else (time.monotonic_ns() - since) / 1e9


class ClipLoader:
    """The micro-batches of ``sampler`` (a ResumableBatchSampler, or a PackedBatchSampler) from ``dataset`` (a RandomClips, or a
    PackedClips), decoded by ``num_workers`` processes (0: in this one): {name: tensor [B*R, ...]}, or {name: list of a tensor for
    each clip}, and the lists ``skipped`` and ``short``.

    A worker takes a video at a time, the next one in the order of all, and writes its clips to where the batch will be. So the
    videos of one batch are read by all workers, and no batch is put together or copied.

    held: how many batches, with the newest, are in use at a time: older ones are overwritten; None: any number, each a copy.
    pin_memory: for a GPU.
    """

    def __init__(self, dataset, sampler, num_workers, *, held=None, pin_memory=False):
        self.dataset, self.sampler, self.num_workers, self.held, self.pin_memory = dataset, sampler, num_workers, held, pin_memory
        self.ahead = read_ahead(sampler.videos, num_workers)
        self.slots = ring_slots(sampler.videos, num_workers, self.in_use)
        dataset.reading = Reading(num_workers)

    def __len__(self):
        return len(self.sampler)

    @property
    def in_use(self):
        """How many batches are, with the newest: ``held``, or the one that is copied."""
        return self.held or 1

    @property
    def layout(self):
        """{name: (shape, dtype)} of a batch's memory."""
        return self.dataset.batch_layout(self.sampler)

    @property
    def batch_bytes(self):
        """How much memory a batch takes."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout.values())

    @property
    def shared_bytes(self):
        """How much memory the workers share with this process."""
        return self.slots * self.batch_bytes if self.num_workers else 0

    def __iter__(self):
        """Raises LoaderError where there is too little memory for the batches in use."""
        if self.num_workers:
            return _FilledBySeveral(self)
        require_memory(self.in_use * self.batch_bytes)
        return self._filled_here()

    def _filled_here(self):
        for keys in self.sampler:
            memory = {
                name: torch.empty(shape, dtype=dtype, pin_memory=self.pin_memory) for name, (shape, dtype) in self.layout.items()
            }
            data = self.dataset
            notes = [data.fill(key, data.at(memory, place)) for key, place in zip(keys, data.places(keys))]
            yield data.joined(memory, keys, notes)


def require_memory(needed):
    """Raises LoaderError where there are fewer bytes than clips need."""
    free = free_memory()
    if free is not None and needed > free:
        raise LoaderError(
            f"the clips of a step and of the next need {needed / 2**20:,.0f} MiB of memory ({free / 2**20:,.0f} MiB are free): "
            "try fewer videos or tokens a step"
        )


def read_ahead(videos, workers):
    """How many videos each of ``workers`` reads ahead: AHEAD, or its part of two batches of ``videos``, whichever is more."""
    return max(AHEAD, -(-2 * videos // max(workers, 1)))


def ring_slots(videos, workers, in_use):
    """How many batches of about ``videos`` the workers share memory for: those in use, and those of the videos that they read
    ahead. Where batches have fewer videos than that, a worker waits for its place."""
    return in_use + max(2, read_ahead(videos, workers) * workers // videos)


class _Fill(Dataset):
    """Item (batch, place, key): what was noted of sample ``key``, which is written to that place of that batch of the ring, once
    the batch that lay there is no longer in use; None where it will not be: the loop or its process ended.

    in_use: how many batches are, with the one that the loop requested last.
    """

    def __init__(self, dataset, ring, in_use):
        self.dataset, self.ring, self.ahead = dataset, ring, ring.slots - in_use
        self.requested = torch.zeros(1, dtype=torch.int64).share_memory_()  # the number of a batch; -1: no more

    def __getitem__(self, task):
        batch, place, key = task
        if not self._is_free(batch):
            return None
        return self.dataset.fill(key, self.dataset.at(self.ring[batch], place))

    def _is_free(self, batch):
        """Polled: a lock would be held for ever by a worker that is killed."""
        while 0 <= self.requested.item() < batch - self.ahead:
            if not multiprocessing.parent_process().is_alive():
                return False
            time.sleep(PAUSE)
        return self.requested.item() >= 0


class _Tasks:
    """The tasks of _Fill in order; can be iterated again."""

    def __init__(self, sampler, places):
        self.sampler, self.places = sampler, places

    def __iter__(self):
        for batch, keys in enumerate(self.sampler):
            yield from ((batch, place, key) for place, key in zip(self.places(keys), keys))

    def __len__(self):
        return len(self.sampler)


class _FilledBySeveral:
    """An iterator of ClipLoader's batches, with data workers."""

    def __init__(self, loader):
        self.loader, self.batch, self.process = loader, 0, os.getpid()
        self.polled = False  # whether to raise what a DataLoader does after POLL seconds
        try:
            self.ring = SharedRing(loader.slots, loader.layout)
        except OSError as error:
            raise LoaderError(
                f"the data workers need {loader.shared_bytes / 2**20:.0f} MiB of shared memory, {loader.slots} batches "
                f"({error.strerror}): try fewer videos or tokens a step, or --run.workers 0"
            ) from error
        self.pinned = loader.pin_memory and self.ring.pin()
        self.fill = _Fill(loader.dataset, self.ring, loader.in_use)
        self.notes = iter(
            DataLoader(
                self.fill,
                batch_size=None,
                sampler=_Tasks(loader.sampler, loader.dataset.places),
                collate_fn=_as_it_is,
                num_workers=loader.num_workers,
                prefetch_factor=loader.ahead,
                timeout=POLL,
                worker_init_fn=start_worker,
            )
        )
        self._workers = self.notes._workers
        # Before Python, when it exits, ends them by a signal that they ignore, and waits for them for ever.
        self._at_exit = functools.partial(_shut_down, weakref.ref(self))
        atexit.register(self._at_exit)
        self.order, self.keys, self.received = iter(loader.sampler), None, []

    def __iter__(self):
        return self

    def __next__(self):
        if self.keys is None:
            self.keys = next(self.order)
            self.fill.requested.fill_(self.batch)
        while len(self.received) < len(self.keys):  # where it times out, it goes on from here
            try:
                self.received.append(next(self.notes))
            except RuntimeError as error:
                if self.polled or not timed_out(error):
                    raise
        memory, keys, notes = self.ring[self.batch], self.keys, self.received
        self.batch, self.keys, self.received = self.batch + 1, None, []
        if self.loader.held is None:
            memory = {name: value.clone() for name, value in memory.items()}
        return self.loader.dataset.joined(memory, keys, notes)

    def __del__(self):
        if hasattr(self, "_at_exit") and self.process == os.getpid():  # and not in a copy of the process
            atexit.unregister(self._at_exit)
            self.fill.requested.fill_(-1)

    def _shutdown_workers(self):
        atexit.unregister(self._at_exit)
        self.fill.requested.fill_(-1)
        self.notes._shutdown_workers()
        if self.pinned:
            self.ring.unpin()
            self.pinned = False


def _shut_down(reference):
    iterator = reference()
    if iterator is not None and iterator.process == os.getpid():
        iterator._shutdown_workers()


def timed_out(error):
    """Whether it says that a DataLoader gave no batch for POLL seconds."""
    return str(error).startswith("DataLoader timed out")


def _as_it_is(item):
    return item


def training_loader(dataset, sampler, *, workers, held=None, pin_memory=False):
    """A ClipLoader of the micro-batches of ``sampler`` (a ResumableBatchSampler) from ``dataset``, decoded by ``workers``
    processes (0: in this one)."""
    return ClipLoader(dataset, sampler, workers, held=held, pin_memory=pin_memory)


def watched_loader(dataset, workers, **options):
    """A DataLoader for Batches, of a ``dataset`` that says what it reads (``dataset.reading``)."""
    dataset.reading = Reading(workers)
    return DataLoader(dataset, num_workers=workers, timeout=POLL if workers else 0, worker_init_fn=start_worker, **options)


def start_worker(worker=None):
    """For data workers: Ctrl-C and a scheduler's SIGTERM reach the process group, and the main process must finish its step.

    A worker still ends with its parent, however that ends: by torch's own watch only where it was forked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


class Batches:
    """The batches of a loader, an iterator and a context whose end is that of the loader's workers.

    The workers end here, not when they are garbage-collected: Python, when it exits, ends them by a signal that they ignore, and
    would wait for them for ever. And torch reports a worker's death from a signal handler, which would interrupt whatever the
    process is doing, a step, a save or this clean-up: here it is raised only where a batch is asked for. The handler that was
    there before is put back.

    timeout: seconds that a worker may read one video; 0: no limit.
    """

    def __init__(self, loader, *, timeout=0.0):
        self.loader, self.timeout = loader, timeout
        self.reading = getattr(loader.dataset, "reading", None)
        self.waiting = False
        self.main_thread = threading.current_thread() is threading.main_thread()  # the one that handles signals

    def __enter__(self):
        self.before, self.installed = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL, signal_handling._SIGCHLD_handler_set
        self.iterator = iter(self.loader)
        if isinstance(self.iterator, _FilledBySeveral):
            self.iterator.polled = True
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
        """The next batch. Raises LoaderError where there is none: a data worker died or is stuck, the data are away, or hundreds
        of videos are broken."""
        while True:
            try:
                return self._next()
            except (RuntimeError, OSError, EOFError) as error:
                if timed_out(error):
                    self._require_progress()
                    continue
                raise self._explained(error) from error

    def _next(self):
        try:
            self.waiting = True
            if self.loader.num_workers and self.main_thread:
                self._child_ended(signal.SIGCHLD, None)  # for what was not heard since the last batch
            return next(self.iterator)
        finally:
            self.waiting = False

    def _require_progress(self):
        """Raises LoaderError where a worker reads one video for longer than it may, and kills the worker: it would hear nothing
        else."""
        for number, worker in enumerate(self.iterator._workers):
            seconds = self.reading.seconds(number) if self.reading is not None else 0.0
            if self.timeout and seconds > self.timeout:
                video = self.reading.number(number)
                os.kill(worker.pid, signal.SIGKILL)
                text = f"data worker {number} (process {worker.pid}) has been reading {self._path(video)} for {seconds:.0f} s"
                raise LoaderError(f"no more data: {text}", worker_died=True, number=video, to_blame=True)

    def _explained(self, error):
        """The LoaderError for what a batch was not given for."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        reason = re.sub(r"^[\w.]*Error: ", "", reason)  # of a worker's traceback
        if isinstance(error, DataAwayError) or (isinstance(error, RuntimeError) and not worker_died(error)):
            return LoaderError(f"no more data: {reason}")
        # It ended; or the connection to it broke, which is heard of first where it ended while it handed on a batch.
        ended = [(number, worker.exitcode) for number, worker in enumerate(self.iterator._workers) if worker.exitcode]
        number, status = ended[0] if ended else (None, 0)
        video = self.reading.number(number) if ended and self.reading is not None else None
        if video is not None:
            reason = f"{reason.rstrip('.')}. It was reading {self._path(video)}."
        to_blame = status > 0 or -status in CRASHES
        if not to_blame:
            reason += " One that was killed may have had too little memory: try fewer run.workers"
        return LoaderError(f"no more data: {reason}", worker_died=True, number=video, to_blame=to_blame)

    def _path(self, number):
        return printable(self.loader.dataset.entries[number].path)


def results(work, config):
    """The items of the data set ``work`` in order, from ``config.workers`` processes. One that ends its data worker is noted in
    ``work.ended``, by which the data set is to know it, and the rest goes on with new workers."""
    done = 0
    while done < len(work):
        order = range(done, len(work))
        loader = watched_loader(work, config.workers, batch_size=None, sampler=order, collate_fn=_as_it_is)
        with Batches(loader, timeout=config.timeout) as batches:
            try:
                for _ in order:
                    yield next(batches)
                    done += 1
            except LoaderError as error:
                if error.number is None or error.number in work.ended:
                    raise
                work.ended[error.number] = str(error).removeprefix("no more data: ")
