"""What a run shows while it runs: a progress bar, log.jsonl and the trackers, all from one dict of numbers; pictures and curves.

A picture that cannot be drawn is an event in the log, and the run goes on: only checkpoints and log.jsonl are worth stopping for.
"""

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from stmae import checkpoint

from .run_folder import RunFolderError

LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on
PLOT_EVERY = 30.0  # seconds between drawings of the curves, which take one


class Logger:
    """Shows ``steps`` steps from ``step`` on: what is given to ``metrics`` goes to the bar, the folder's log and ``trackers``.

    On a terminal that is a bar; elsewhere (a file, a job's output) a line every ten seconds.
    """

    def __init__(self, folder, *, step, steps, trackers=()):
        self.folder, self.first_step, self.steps, self.terminal = folder, step, steps, sys.stderr.isatty()
        folder.rewind_log(step)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.terminal, smoothing=0.05)
        self.started = self.last_line = time.monotonic()
        self.last_plot = self.started
        self.trackers = list(trackers)

    def advance(self, step):
        self.bar.update(step - self.bar.n)

    def metrics(self, step, **values):
        """Log ``values`` at ``step``; print loss, learning rate and speed, or an evaluation's numbers."""
        self.folder.log({"step": step, **{name: _short(value) for name, value in values.items()}})
        self._track(step, lambda tracker: tracker.scalars(step, values))
        if "loss" not in values:
            self.info(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()))
            return
        speed = f"{values['clips_per_second']:.1f} clips/s, data wait {values['data_wait']:.0%}"
        text = f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {speed}"
        self.bar.set_postfix_str(text, refresh=False)
        if not self.terminal and (time.monotonic() - self.last_line >= LINE_EVERY or step == self.steps):
            self.last_line = time.monotonic()
            remaining = (self.last_line - self.started) / (step - self.first_step) * (self.steps - step)
            print(f"step {step} of {self.steps}, {text}, {tqdm.format_interval(remaining)} left", flush=True)

    def event(self, step, message, **fields):
        """A line that is printed and logged."""
        self.info(message)
        self.folder.log({"step": step, "event": message, **fields})

    def image(self, step, name, make):
        """Show what ``make()`` returns, a PIL image: pictures/NAME-step-STEP.png in the folder, and the trackers."""

        def write():
            image = make()
            folder = self.folder.subfolder("pictures")
            with checkpoint.atomic_write(folder / f"{name}-step-{step:08d}.png") as temporary, open(temporary, "wb") as file:
                image.save(file, "png")
            self._track(step, lambda tracker: tracker.image(step, name, image))

        self._attempt(step, f"the picture of {name}", write)

    def plot(self, step, *, last=False):
        """Write the log's numbers as curves, plots.png, and as a table, log.csv: at every checkpoint, but not more often than
        every PLOT_EVERY seconds, and at the ``last``."""
        if not last and time.monotonic() - self.last_plot < PLOT_EVERY:
            return

        def write():
            from .plots import draw, write_table

            log = self.folder.path / "log.jsonl"
            write_table(log, self.folder.path / "log.csv")
            # In a thread, for its stack: matplotlib's parser keeps exceptions, and with them all that called it, the model too.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(draw, log, self.folder.path / "plots.png").result()

        self._attempt(step, "log.csv and plots.png", write)
        self.last_plot = time.monotonic()

    def _track(self, step, write):
        for tracker in list(self.trackers):
            try:
                write(tracker)
            except Exception as error:  # a tracker's writing thread hands on whatever befell it
                self.trackers.remove(tracker)
                self._warn(step, f"{tracker.name} stops here, training goes on: {error}")

    def _attempt(self, step, what, work):
        try:
            work()
        except Exception as error:  # whatever a library that draws may raise: no reason to lose a run
            self._warn(step, f"could not write {what}, training goes on: {error}")

    def _warn(self, step, message):
        # A log that cannot be written stops the run at its next line.
        with contextlib.suppress(RunFolderError):
            self.event(step, message)

    def info(self, message):
        """A line above the bar."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        self.bar.close()
        self._track(self.bar.n, lambda tracker: tracker.close())


class NullLogger:
    """The logger of every process but the main one: prints only the events that carry fields, such as a broken video."""

    def __init__(self, folder):
        pass

    def event(self, step, message, **fields):
        if fields:
            print(message, flush=True)

    def info(self, message):
        pass

    def advance(self, step):
        pass

    def metrics(self, step, **values):
        pass

    def image(self, step, name, make):
        pass

    def plot(self, step, *, last=False):
        pass

    def close(self):
        pass


def _short(value):
    return float(f"{value:.8g}") if isinstance(value, float) else value
