"""The folder of a run: its settings, its log, and checkpoints that survive a kill at any moment.

    config.yaml               every setting; ``--config DIR/config.yaml`` repeats the run
    run.jsonl                 one line for each start: command, versions, machine
    log.jsonl                 one line every few steps, and one for each event
    log.csv                   its numbers as a table
    tensorboard/              the same for TensorBoard
    model.safetensors         the weights, as ``stmae.checkpoint.load`` reads them
    state-STEP.safetensors    weights, optimiser and counters: all that is needed to continue; the last two are kept
    state-STEP/               the same of a run with fsdp, each process's shard (torch.distributed.checkpoint)
    classes.json              of a classifier trained on class folders: their numbers
    plots.png                 log.jsonl as curves
    left_out.txt              videos that are not used: those that ended a data worker, and what is added by hand
    pictures/                 reconstructions during pre-training
    .lock                     names the process that writes here, while it does (see run_lock)

Every file is written under a temporary name, flushed to disk and renamed over the old one, so that at any moment the file in
place is complete; a folder of shards likewise. The older of two states is removed only after the newer one is in place. A run
continues from either kind of state, on any number of processes, sharded or not.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stmae import checkpoint, hub
from stmae.checkpoint.files import sync_folder

from ..config import ClipConfig, defaults, load_yaml, to_dict
from ..config.preset_files import PATH_FIELDS
from ..config.sources import absolute, map_sources
from ..data.pixels import choose_pixels
from . import checksum, fsdp
from .distributed import SINGLE_PROCESS
from .run_lock import Locked, RunLock, open_regular

LEFT_OUT = "left_out.txt"
BEFORE_PIXELS = "swscale"  # clips.pixels of runs from before there was a choice
KEPT_STATES = 2  # should the newest be damaged by something else, the one before it is there


class RunFolderError(RuntimeError):
    """The run folder cannot be used: not writable, full, or of another run."""


class RunFolder:
    """Creates ``path`` where it is missing, and locks it until ``close``: one process writes in a run's folder. Raises
    RunFolderError when another one does, and when nothing can be written there.

    The folder may be anybody's: what is written never follows a symbolic link in it.

    read_only: for whoever only reads a run's state; takes no lock.
    """

    def __init__(self, path, *, read_only=False):
        self.path = Path(path).absolute()
        self._lock = None
        if read_only:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)  # before anything is removed: a file that seems stale may be the other run's
            for stale in self.path.glob(".*.tmp"):  # left by a run that was killed while writing; nobody else's file
                if re.fullmatch(r"\.(model|state-\d+|config|classes|log|plots|writable)\.\w+\.[0-9a-z_]{8}\.tmp", stale.name):
                    stale.unlink()
                if re.fullmatch(r"\.state-\d+\.(new|old)\.tmp", stale.name):
                    _remove_tree(stale)
            descriptor, probe = tempfile.mkstemp(prefix=".writable.probe.", suffix=".tmp", dir=self.path)
            try:
                os.write(descriptor, b"stmae")
            finally:
                os.close(descriptor)
                os.unlink(probe)
        except Locked as error:
            raise RunFolderError(f"{error}; choose another --output, or wait for its end") from error
        except OSError as error:
            self.close()
            hint = ""
            with contextlib.suppress(OSError):  # no folder, or one that cannot be read either
                hint = self.resume_hint()
            raise RunFolderError(f"cannot write to the output folder {self.path}: {error.strerror or error}{hint}") from error

    def close(self):
        """Releases the lock; nothing may be written from here on."""
        if self._lock is not None:
            self._lock.release()

    @property
    def model_path(self):
        return self.path / "model.safetensors"

    def subfolder(self, name):
        """The folder ``name`` in this one, made where it is missing. Raises OSError for a symbolic link to one: what is written
        there would lie in somebody's folder."""
        folder = self.path / name
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link", str(folder))
        folder.mkdir(exist_ok=True)
        return folder

    def states(self):
        """Steps of the states in the folder, newest first."""
        return list(dict.fromkeys(step for step, _ in self._states()))

    def _states(self):
        """(step, file or folder) of the states, newest first."""
        files = (file for file in self.path.iterdir() if file.is_file() or file.is_dir())  # reading a pipe would never end
        found = ((re.fullmatch(r"state-(\d+)(\.safetensors)?", file.name), file) for file in files)
        return sorted(((int(match[1]), file) for match, file in found if match), reverse=True)

    def state_path(self, step, *, shards=False):
        return self.path / (f"state-{step:08d}" if shards else f"state-{step:08d}.safetensors")

    def save_state(self, step, tensors, info):
        """Write state ``step``: tensors by name, and ``info``, plain values. Raises RunFolderError; older states are
        then untouched."""
        text = json.dumps(info)
        metadata = {"stmae_state": text, checksum.KEY: checksum.of_tensors(tensors, text)}
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
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        renamed = self.path / f".{path.name}.old.tmp"  # by one rename, so that what bears a state's name is never half a state
        os.replace(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)

    def save_model(self, model):
        """Write the weights alone, with the model's configuration."""
        try:
            checkpoint.save(model, self.model_path, extra={checksum.KEY: checksum.of_tensors(model.state_dict())})
        except checkpoint.CheckpointError as error:
            raise RunFolderError(f"{error}{self.resume_hint()}") from error

    def model_problem(self):
        """Why model.safetensors is not what was written, or None."""
        try:
            checksum.verify_weights(self.model_path)
        except checksum.ChecksumError as error:
            return str(error)
        return None if self.model_path.is_file() else "it is missing"

    def load_state(self, report=print, *, problem=lambda tensors, info: None, owner=lambda name: None, processes=SINGLE_PROCESS):
        """The newest complete state as (tensors, info), or None. Damaged ones are reported and passed over, never removed.

        Called by all processes, which take the same one.
        problem: (tensors, info) -> why this run cannot continue from them, which counts as damage; None: it can.
        owner: name -> the tensor of the run that the state's tensor of this name belongs to: where it is sharded, only this
            process's shard of the state is read.
        """
        for step, path in self._states():
            try:
                tensors, info = self._read_shards(path, owner, processes) if path.is_dir() else self._read_file(path, processes)
                fsdp.raise_in_all(_info_problem(step, info) or problem(tensors, info), processes)
                return tensors, info
            except fsdp.ShardError as error:
                report(f"checkpoint {path.name} is damaged ({error}); trying the one before it")
        if self.states():
            raise RunFolderError(f"every checkpoint in {self.path} is damaged; move them away to start over")
        return None

    def _read_file(self, path, processes):
        tensors, info, error = {}, None, None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                info = json.loads(metadata["stmae_state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            checksum.verify(tensors, metadata, metadata["stmae_state"])
        except (SafetensorError, checksum.ChecksumError, OSError, KeyError, TypeError, ValueError) as failure:
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
            stored = _flat(defaults)
            if "clips.pixels" in stored:
                stored["clips.pixels"] = BEFORE_PIXELS
            stored |= _flat(self._read_config(file))
            given = _flat(settings)
            kinds = {True: "a fine-tuning", False: "a pre-training"}
            if ("checkpoint" in stored) != ("checkpoint" in given):
                raise RunFolderError(
                    f"{self.path} holds {kinds['checkpoint' in stored]} run, and this is {kinds['checkpoint' in given]} run: "
                    "choose another --output"
                )
            stored, given = ({name: _as_path(name, value) for name, value in flat.items()} for flat in (stored, given))
            names = sorted(name for name in {*stored, *given} if not name.startswith(("run.", "probe.")) and name != "output")
            differing = [
                f"{name} {stored.get(name)} -> {given.get(name)}" for name in names if stored.get(name) != given.get(name)
            ]
            if differing:
                raise RunFolderError(
                    f"{self.path} holds a run with other settings ({'; '.join(differing)}): choose another --output, "
                    "or repeat its command"
                )
        text = yaml.safe_dump(settings, sort_keys=False)
        self._write(file, lambda path: path.write_text(text, encoding="utf-8"))

    def keep_pixels(self, config):
        """Sets ``config.clips.pixels`` to what the run here began with, swscale where it began before there was a choice, so that
        its clips keep their bytes. Of a new run: to what this installation has."""
        file = self.path / "config.yaml"
        if file.exists() and self.states():
            config.clips.pixels = (self._read_config(file).get("clips") or {}).get("pixels", BEFORE_PIXELS)
        else:
            config.clips.pixels = choose_pixels(config.clips.pixels)

    def _read_config(self, file):
        try:
            return load_yaml(_read_regular(file))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {file}: {error}") from error

    def save_classes(self, numbers):
        """Write {class: number} to classes.json: how the class folders of a test set are numbered."""
        text = json.dumps(numbers, indent=1) + "\n"
        self._write(self.path / "classes.json", lambda path: path.write_text(text, encoding="utf-8"))

    def record_start(self, **fields):
        """Add a line to run.jsonl: when, which command, what it ran on."""
        line = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "folder": os.getcwd(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": self.versions(),
            "threads": torch.get_num_threads(),
            **fields,
        }
        self._append("run.jsonl", line)

    def left_out(self):
        """Absolute paths of the videos that left_out.txt names, a line each, but for comments ("# ")."""
        try:
            with open(open_regular(self.path / LEFT_OUT, os.O_RDONLY), "rb") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise RunFolderError(f"cannot read {self.path / LEFT_OUT}: {error.strerror}") from error
        return frozenset(absolute(os.fsdecode(line.strip())) for line in lines if line.strip() and line[:2] != b"# ")

    def leave_out(self, path, reason):
        """Add a video to left_out.txt: no start of this run uses it from now on."""
        text = f"# {reason}\n{absolute(path)}\n"
        try:
            with open(open_regular(self.path / LEFT_OUT, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
                file.write(os.fsencode(text))
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / LEFT_OUT}: {error.strerror}{self.resume_hint()}") from error

    def versions(self):
        """{package: version} of those that make a run's numbers."""
        return {name: _version(name) for name in ("stmae", "torch", "numpy", "av", "safetensors", "triton")}

    def last_start(self):
        """The last line of run.jsonl, a dict, or None."""
        try:
            line = json.loads((_read_regular(self.path / "run.jsonl").splitlines() or [""])[-1])
        except (OSError, ValueError):
            return None
        return line if isinstance(line, dict) else None

    def run_id(self):
        """A name for the run among all others, which stays when the run is continued."""
        return hashlib.sha256(_read_regular(self.path / "run.jsonl").splitlines()[0].encode()).hexdigest()[:16]

    def log(self, line):
        """Add a line to log.jsonl."""
        self._append("log.jsonl", line)

    def rewind_log(self, step):
        """Drop what an interrupted run logged after the state it continues from, so that no step is in the log twice."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return
        kept = []
        try:
            lines = _read_regular(file).splitlines()
        except OSError as error:
            raise RunFolderError(f"cannot read {file}: {error.strerror}") from error
        for line in lines:
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line)
            except (ValueError, AttributeError, TypeError):
                pass  # a line cut short by a kill, or somebody else's
        self._write(file, lambda path: path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"))

    def _append(self, name, line):
        try:
            descriptor = open_regular(self.path / name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            with open(descriptor, "ab+") as file:
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
        try:
            states = self.states()
        except OSError:  # the folder went, or cannot be listed: the error says so
            return ""
        return f" (the checkpoint of step {states[0]} is complete: the same command continues from it)" if states else ""


@contextlib.contextmanager
def open_run(config, processes):
    """Context: the RunFolder at ``config.output``, its config.yaml written or checked by the main process, which holds the lock;
    the others only read."""
    folder = RunFolder(config.output, read_only=True)
    with contextlib.ExitStack() as stack:

        def open_and_check():
            nonlocal folder
            folder = stack.enter_context(contextlib.closing(RunFolder(config.output)))
            folder.keep_pixels(config)
            folder.write_config(to_dict(config), defaults(type(config)))

        processes.run_on_main(open_and_check)
        folder.keep_pixels(config)  # the others: what the main process wrote
        yield folder


def weights_file(path):
    """What ``stmae.checkpoint.load`` is to read for ``path``: a run's folder, another folder of weights, a file, or the name of a
    Hugging Face repository (owner/name), which is downloaded. Raises CheckpointError where a run's weights are not what it wrote.
    """
    path = Path(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        hub.require_no_path(path)
        try:
            return hub.download(str(path))
        except ImportError as error:
            raise checkpoint.CheckpointError(f"cannot read {path}: no such file or folder, and {error}") from error
    if (path / "config.yaml").is_file():  # a run's folder
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        try:
            checksum.verify_weights(path)
        except checksum.ChecksumError as error:
            raise checkpoint.CheckpointError(f"cannot read {path}: {error}") from error
    return path


def clips_of(checkpoint_path, stride=None, size=None):
    """The ClipConfig that the weights at ``checkpoint_path`` were trained with, as the config.yaml beside them says, else
    the default.

    Only what decides which frames and pixels make a clip; ``stride`` and ``size`` override.
    """
    path = Path(checkpoint_path)
    settings = (path if path.is_dir() else path.parent) / "config.yaml"
    clips = {}
    if settings.exists():
        clips = {"pixels": BEFORE_PIXELS, **(load_yaml(settings.read_text(encoding="utf-8")).get("clips") or {})}
    chosen = {name: clips[name] for name in ("stride", "spacing", "short", "pixels", "size") if name in clips}
    given = {name: value for name, value in (("stride", stride), ("size", size)) if value is not None}
    return ClipConfig(**{**chosen, **given})


def _remove_tree(path):
    """Removes a folder, or the symbolic link or file that lies in its place; never what a link leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _as_path(name, value):
    """``value``; of a setting that is a path, the one way of writing it that has no links in it."""
    return map_sources(value, os.path.realpath) if name in PATH_FIELDS and isinstance(value, str) else value


def _info_problem(step, info):
    if not isinstance(info, dict) or type(info.get("step")) is not int:
        return "it does not say its step"
    return None if info["step"] == step else f"it holds step {info['step']}"


def _read_regular(file):
    with open(open_regular(file, os.O_RDONLY), encoding="utf-8", errors="replace") as opened:
        return opened.read()


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
