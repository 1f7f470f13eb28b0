"""What a run shows while it runs: a progress bar, log.jsonl and TensorBoard, from one dict of numbers."""

import sys

from tqdm import tqdm


class Log:
    """Progress bar over ``steps``, beginning at ``step``; numbers go to the bar, the folder's log and TensorBoard alike."""

    def __init__(self, folder, *, step, steps, tensorboard, quiet=False):
        self.folder = folder
        folder.rewind_log(step)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=terminal, mininterval=0.2 if terminal else 10, disable=quiet, smoothing=0.05
        )
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import: only where it is used

            self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)

    def advance(self, step):
        self.bar.update(step - self.bar.n)

    def numbers(self, step, **values):
        """Log ``values`` at ``step``, and show the ones a person watches."""
        self.folder.log({"step": step, **{name: _short(value) for name, value in values.items()}})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        shown = {
            "loss": "{:.4f}".format,
            "lr": "{:.2e}".format,
            "clips_per_second": "{:.1f} clips/s".format,
            "data_wait": "data wait {:.0%}".format,
        }
        self.bar.set_postfix_str(
            ", ".join(form(values[name]) if " " in form(0) else f"{name} {form(values[name])}" for name, form in shown.items() if name in values),
            refresh=False,
        )

    def event(self, step, message, **facts):
        """A line for the person watching and for the log."""
        self.say(message)
        self.folder.log({"step": step, "event": message, **facts})

    def say(self, message):
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def close(self):
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def _short(value):
    return float(f"{value:.8g}") if isinstance(value, float) else value
