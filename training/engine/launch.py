"""A run from its configuration: the device, the process group, the folder, and a task inside them."""

import contextlib
import dataclasses

import torch

from .device import choose_device
from .distributed import Processes, ProcessLostError
from .run_folder import RunFolder, open_run


def run_distributed(work, config):
    """``work(config, processes, device, folder)`` in the process group that torchrun describes, if any, with the run's folder
    opened. PyTorch's random state is put back at the end.

    ``work`` is a function of its own, so that nothing of its model is alive when the group is left. Raises ProcessLostError where
    another process ended meanwhile.
    """
    processes = Processes(timeout=config.run.process_timeout)
    device = processes.local_device(choose_device(config.run.device))
    devices = [device] if device.type == "cuda" else []
    try:
        with processes.process_group(device), torch.random.fork_rng(devices), open_run(config, processes) as folder:
            return work(extended(config), processes, device, folder)
    except RuntimeError as error:
        if not processes.lost(error):
            raise
        hint = ""
        with contextlib.suppress(OSError):  # no folder yet
            hint = RunFolder(config.output, read_only=True).resume_hint()
        raise ProcessLostError(f"lost another process of this run: {str(error).splitlines()[0]}{hint}") from error


def extended(config):
    """``config`` with the epochs that run.extend_epochs adds among optimizer.epochs."""
    optimizer = dataclasses.replace(config.optimizer, epochs=config.optimizer.epochs + config.run.extend_epochs)
    return dataclasses.replace(config, optimizer=optimizer)
