"""What a run shows while it runs: a progress bar, log.jsonl and TensorBoard, all from one dict of numbers."""

import sys
import time

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on


class Log:
    """Shows ``steps`` steps from ``step`` on; what is given to ``numbers`` goes to the bar, the folder's log and TensorBoard.

    On a terminal that is a bar; elsewhere (a file, a job's output) a line every ten seconds.
    """

    def __init__(self, folder, *, step, steps, tensorboard):
        self.folder, self.first, self.steps, self.terminal = folder, step, steps, sys.stderr.isatty()
        folder.rewind_log(step)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.terminal, smoothing=0.05)
        self.started = self.last_line = time.monotonic()
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import: only where it is used

            self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)

    def advance(self, step):
        self.bar.update(step - self.bar.n)

    def numbers(self, step, **values):
        """Log ``values`` at ``step`` and show the ones that a person watches."""
        self.folder.log({"step": step, **{name: _short(value) for name, value in values.items()}})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if "loss" not in values:
            return
        speed = f"{values['clips_per_second']:.1f} clips/s, data wait {values['data_wait']:.0%}"
        text = f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, {speed}"
        self.bar.set_postfix_str(text, refresh=False)
        if not self.terminal and (time.monotonic() - self.last_line >= LINE_EVERY or step == self.steps):
            self.last_line = time.monotonic()
            remaining = (self.last_line - self.started) / (step - self.first) * (self.steps - step)
            print(f"step {step} of {self.steps}, {text}, {tqdm.format_interval(remaining)} left", flush=True)

    def event(self, step, message, **facts):
        """A line for the person watching and for the log."""
        self.say(message)
        self.folder.log({"step": step, "event": message, **facts})

    def say(self, message):
        """A line above the bar."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


class Silence:
    """The log of every process but the first: only what it found wrong is said."""

    def __init__(self, folder, **options):
        pass

    def event(self, step, message, **facts):
        if facts:
            print(message, flush=True)

    def say(self, message):
        pass

    def advance(self, step):
        pass

    def numbers(self, step, **values):
        pass

    def close(self):
        pass


def _short(value):
    return float(f"{value:.8g}") if isinstance(value, float) else value
