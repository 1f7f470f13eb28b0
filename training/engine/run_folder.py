"""The folder of a run: its settings, its log, and checkpoints that survive a kill at any moment.

    config.yaml               every setting; ``--config DIR/config.yaml`` repeats the run
    run.jsonl                 one line for each start: command, versions, machine
    log.jsonl                 one line every few steps, and one for each event
    tensorboard/              the same for TensorBoard
    model.safetensors         the weights, as ``stmae.checkpoint.load`` reads them
    state-STEP.safetensors    weights, optimiser and counters: all that is needed to continue; the last two are kept
    state-STEP/               the same of a run with fsdp, each process's shard (torch.distributed.checkpoint)
    plots.png                 log.jsonl as curves
    pictures/                 reconstructions during pre-training

Every file is written under a temporary name, flushed to disk and renamed over the old one, so that at any moment the file in
place is complete; a folder of shards likewise. The older of two states is removed only after the newer one is in place. A run
continues from either kind of state, on any number of processes, sharded or not.
"""

import datetime
import json
import os
import platform
import re
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stmae import checkpoint
from stmae.checkpoint.files import sync_folder

from ..config import ClipConfig, defaults, to_dict
from . import fsdp
from .distributed import SINGLE_PROCESS

KEPT_STATES = 2  # should the newest be damaged by something else, the one before it is there


class RunFolderError(RuntimeError):
    """The run folder cannot be used: not writable, full, or of another run."""


class RunFolder:
    """Creates ``path`` where it is missing. Raises RunFolderError when nothing can be written there.

    read_only: for the processes of a run that only read its state.
    """

    def __init__(self, path, *, read_only=False):
        self.path = Path(path).absolute()
        if read_only:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for stale in self.path.glob(".*.tmp"):  # left by a run that was killed while writing; nobody else's file
                if re.fullmatch(r"\.(model|state-\d+|config|log|plots)\.\w+\.[0-9a-f]{8}\.tmp", stale.name):
                    stale.unlink()
                if re.fullmatch(r"\.state-\d+\.(new|old)\.tmp", stale.name):
                    shutil.rmtree(stale)
            probe = self.path / ".writable.tmp"
            probe.write_bytes(b"stmae")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(f"cannot write to the output folder {self.path}: {error.strerror}") from error

    @property
    def model_path(self):
        return self.path / "model.safetensors"

    def states(self):
        """Steps of the states in the folder, newest first."""
        return list(dict.fromkeys(step for step, _ in self._states()))

    def _states(self):
        """(step, file or folder) of the states, newest first."""
        found = ((re.fullmatch(r"state-(\d+)(\.safetensors)?", file.name), file) for file in self.path.iterdir())
        return sorted(((int(match[1]), file) for match, file in found if match), reverse=True)

    def state_path(self, step, *, shards=False):
        return self.path / (f"state-{step:08d}" if shards else f"state-{step:08d}.safetensors")

    def save_state(self, step, tensors, info):
        """Write state ``step``: tensors by name, and ``info``, plain values. Raises RunFolderError; older states are
        then untouched."""
        metadata = {"stmae_state": json.dumps(info)}
        self._write(self.state_path(step), lambda file: save_file(tensors, file, metadata))
        self._remove_old_states(step, self.state_path(step))

    def save_shards(self, step, tensors, info, processes):
        """As ``save_state``, but every process writes its shard of the sharded ``tensors``. Called by all processes, and where
        one of them fails, all raise."""
        path = self.state_path(step, shards=True)
        temporary = self.path / f".{path.name}.new.tmp"
        encoded = torch.frombuffer(bytearray(json.dumps(info).encode()), dtype=torch.uint8)

        def put_in_place():
            try:
                sync_folder(temporary)
                if path.exists():  # damaged, or this run would not have come to this step again
                    self._remove(path)
                os.replace(temporary, path)
                sync_folder(self.path)
            except OSError as error:
                raise RunFolderError(f"cannot write {path.name}: {error.strerror}{self.resume_hint()}") from error
            self._remove_old_states(step, path)

        try:
            fsdp.write_shards(temporary, {**tensors, "stmae_state": encoded}, processes)
        except fsdp.ShardError as error:
            if processes.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RunFolderError(f"cannot write {path.name}: {error}{self.resume_hint()}") from error
        processes.run_on_main(put_in_place)

    def _remove_old_states(self, step, newest):
        """All but KEPT_STATES up to ``step``, and what else there is of it; ``newest``, the state of this step, is in place.

        Those of later steps are damaged, or the run would have gone on from them: they do not count.
        """
        steps = [other for other in self.states() if other <= step]
        for other, path in self._states():
            if other in steps[KEPT_STATES:] or (other == step and path != newest):
                self._remove(path)

    def _remove(self, path):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        renamed = self.path / f".{path.name}.old.tmp"  # in one stroke, so that what bears a state's name is never half a state
        os.replace(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)

    def save_model(self, model):
        """Write the weights alone, with the model's configuration."""
        try:
            checkpoint.save(model, self.model_path)
        except checkpoint.CheckpointError as error:
            raise RunFolderError(f"{error}{self.resume_hint()}") from error

    def load_state(self, report=print, *, owner=lambda name: None, processes=SINGLE_PROCESS):
        """The newest complete state as (tensors, info), or None. Damaged ones are reported and passed over, never removed.

        Called by all processes, which take the same one.
        owner: name -> the tensor of the run that the state's tensor of this name belongs to: where it is sharded, only this
            process's shard of the state is read.
        """
        for _, path in self._states():
            try:
                return self._read_shards(path, owner, processes) if path.is_dir() else self._read_file(path, processes)
            except fsdp.ShardError as error:
                report(f"checkpoint {path.name} is damaged ({error}); looking for an older one")
        if self.states():
            raise RunFolderError(f"every checkpoint in {self.path} is damaged; move them away to start over")
        return None

    def _read_file(self, path, processes):
        tensors, info, error = {}, None, None
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["stmae_state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as failure:
            error = str(failure)
        fsdp.raise_in_all(error, processes)
        return tensors, info

    def _read_shards(self, path, owner, processes):
        tensors = fsdp.read_shards(path, owner, processes)
        try:
            return tensors, json.loads(bytes(tensors.pop("stmae_state").tolist()))
        except (KeyError, ValueError) as error:
            raise fsdp.ShardError(str(error)) from error

    def write_config(self, settings, defaults):
        """Write config.yaml, or compare: a folder holds one run. ``run.*`` and ``probe.*`` may differ, for they change nothing
        that is computed. A setting that the config.yaml of an older version lacks has its value in ``defaults``.

        Raises RunFolderError naming every setting that differs from the run that is already here.
        """
        file = self.path / "config.yaml"
        if file.exists() and self.states():
            there = _flat(defaults) | _flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
            here = _flat(settings)
            names = sorted(name for name in {*there, *here} if not name.startswith(("run.", "probe.")) and name != "output")
            differing = [f"{name} {there.get(name)} -> {here.get(name)}" for name in names if there.get(name) != here.get(name)]
            if differing:
                raise RunFolderError(
                    f"{self.path} holds a run with other settings ({'; '.join(differing)}): choose another --output, "
                    "or repeat its command"
                )
        text = yaml.safe_dump(settings, sort_keys=False)
        self._write(file, lambda path: path.write_text(text, encoding="utf-8"))

    def record_start(self, **facts):
        """Add a line to run.jsonl: when, which command, what it ran on."""
        packages = ("stmae", "torch", "numpy", "av", "safetensors", "triton")
        line = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "folder": os.getcwd(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in packages},
            "threads": torch.get_num_threads(),
            **facts,
        }
        self._append("run.jsonl", line)

    def log(self, line):
        """Add a line to log.jsonl."""
        self._append("log.jsonl", line)

    def rewind_log(self, step):
        """Drop what an interrupted run logged after the state it continues from, so that no step is in the log twice."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line)
            except ValueError:
                pass  # a line cut short by a kill
        self._write(file, lambda path: path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"))

    def _append(self, name, line):
        try:
            with open(self.path / name, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # a line cut short by a kill keeps to itself
                        file.write(b"\n")
                file.write(f"{json.dumps(line)}\n".encode())
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / name}: {error.strerror}{self.resume_hint()}") from error

    def _write(self, file, write):
        try:
            with checkpoint.atomic_write(file) as temporary:
                write(temporary)
        except (checkpoint.CheckpointError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            raise RunFolderError(f"cannot write {file.name}: {error}{self.resume_hint()}") from error

    def resume_hint(self):
        """For the end of an error message: the checkpoint that the run can continue from."""
        states = self.states()
        return f" (the checkpoint of step {states[0]} is complete: the same command continues from it)" if states else ""


def open_run(config, processes):
    """The RunFolder at ``config.output``, its config.yaml written or checked by the main process; the others only read."""
    path = config.output
    if processes.is_main:
        folder = RunFolder(path)
        folder.write_config(to_dict(config), defaults(type(config)))
    processes.barrier()
    return folder if processes.is_main else RunFolder(path, read_only=True)


def weights_file(path):
    """The weights at ``path``, a run's folder or a file."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def clips_of(checkpoint_path, stride=None):
    """The ClipConfig that the weights at ``checkpoint_path`` were trained with, as the config.yaml beside them says, else
    the default.

    Only what decides which frames make a clip; ``stride`` overrides.
    """
    settings = weights_file(checkpoint_path).parent / "config.yaml"
    clips = {}
    if settings.exists():
        clips = (yaml.safe_load(settings.read_text(encoding="utf-8")) or {}).get("clips") or {}
    chosen = {name: clips[name] for name in ("stride", "spacing") if name in clips}
    return ClipConfig(**{**chosen, **({} if stride is None else {"stride": stride})})


def _flat(settings):
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
