"""Where a log's numbers and pictures are shown besides the run's folder: TensorBoard, Weights & Biases, Trackio."""

import functools
import importlib
from abc import ABC, abstractmethod

import numpy as np

from ..config import to_dict


class TrackerError(RuntimeError):
    """A tracker that was asked for cannot start; the message says why."""


class Tracker(ABC):
    """Shows a run somewhere. Its methods may raise what they like: the logger then goes on without it."""

    name: str

    @abstractmethod
    def scalars(self, step, values):
        """values: {name: number} at ``step``; steps ascend."""

    @abstractmethod
    def image(self, step, name, image):
        """image: a PIL image."""

    @abstractmethod
    def close(self):
        """Everything is written when it returns."""


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    name = "TensorBoard"

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    @functools.cached_property
    def writer(self):  # made where a failure of its files costs no more than TensorBoard
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: only where it is used

        return SummaryWriter(str(self.folder.subfolder("tensorboard")), purge_step=self.step)

    def scalars(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step, name, image):
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class RemoteRun(Tracker):
    """A run of Weights & Biases or of Trackio, which has the same functions. The run's folder names it, and a run that is
    continued goes on in it; steps that it has already are shown as they were."""

    def __init__(self, package, folder, project, config):
        self.name = package
        try:
            self.package = importlib.import_module(package)
        except ImportError as error:
            raise TrackerError(f"run.tracker {package}: {error}; run: pip install {package}") from error
        try:
            options = self._options(folder)
            self.package.init(project=project, name=folder.path.name, config=config, resume="allow", **options)
        except Exception as error:  # each has errors of its own: no key, no network, a bad project name
            raise TrackerError(f"run.tracker {package}: {' '.join(str(error).split())}{self.hint}") from error

    hint = ""

    def _options(self, folder):
        return {}

    def scalars(self, step, values):
        self.package.log(values, step=step)

    def image(self, step, name, image):
        self.package.log({name: self.package.Image(image)}, step=step)

    def close(self):
        self.package.finish()


class WeightsAndBiases(RemoteRun):
    """Files beside the log in the run's folder, sent from there unless WANDB_MODE says offline."""

    hint = "; WANDB_MODE=offline keeps everything in the run's folder"

    def __init__(self, folder, project, config):
        super().__init__("wandb", folder, project, config)

    def _options(self, folder):
        folder.subfolder("wandb")  # where it writes: no link that leads elsewhere
        return {"id": folder.run_id(), "dir": str(folder.path)}  # the id is what is continued


class Trackio(RemoteRun):
    """A database in Trackio's folder (TRACKIO_DIR), shown by ``trackio show``."""

    def __init__(self, folder, project, config):
        super().__init__("trackio", folder, project, config)

    def _options(self, folder):
        return {"embed": False}


def start_trackers(folder, step, config):
    """Those that ``config`` (of a run, with a section ``run``) asks for. Raises TrackerError where one cannot start."""
    trackers = [TensorBoard(folder, step)] if config.run.tensorboard else []
    remote = {"none": None, "wandb": WeightsAndBiases, "trackio": Trackio}[config.run.tracker]
    if remote is not None:
        trackers.append(remote(folder, config.run.project, to_dict(config)))
    return trackers
