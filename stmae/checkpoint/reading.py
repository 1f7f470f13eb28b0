"""From a file or folder to tensors by name, and what lies beside them; nothing is built or guessed here."""

import argparse
import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from stmae.checkpoint.errors import CheckpointError
from stmae.checkpoint.names import strip_prefixes
from stmae.checkpoint.report import LoadReport

FORMAT = 1
KINDS = ("MaskedAutoencoder", "VideoClassifier", "ActionDetector")
_PICKLES = (".pth", ".pyth", ".pt", ".bin", ".ckpt", ".tar")
_WEIGHT_KEYS = ("model", "model_state", "module", "state_dict")
_EMA_KEYS = ("model_ema", "ema", "model_ema_state", "ema_state_dict")
_NESTING = 8  # dictionaries around the weights
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass
class Weights:
    """Tensors by name as a file or folder has them.

    Attributes:
        path: what was read, for messages.
        state: the tensors, or a dictionary that nests them.
        config: (kind, configuration as a dictionary) where this library wrote it.
        hub_config: the ``config.json`` of a Hugging Face folder.
        arguments: the ``args`` that mae_st and VideoMAE put into their files.
    """

    path: str
    state: dict
    config: tuple[str, dict] | None = None
    hub_config: dict | None = None
    arguments: dict = field(default_factory=dict)

    def pick(self, ema: bool, report: LoadReport) -> dict[str, torch.Tensor]:
        """The tensors by their plain names: out of their nesting, without wrappers' prefixes, the weights or their average."""
        state = self.state
        for _ in range(_NESTING):
            averages = [key for key in _EMA_KEYS if isinstance(state.get(key), dict)]
            nested = [key for key in _WEIGHT_KEYS if isinstance(state.get(key), dict)]
            if ema and averages:
                state, ema = state[averages[0]], False
                report.inferred["weights"] = f"{averages[0]!r}, the running average, as asked for"
            elif nested:
                if averages:
                    report.notes.append(f"the file also has a running average, {averages[0]!r}; load(path, ema=True) takes it")
                others = [key for key in nested[1:] if key != "module"]
                report.unused.update({key: "another set of weights in the same file" for key in others})
                state = state[nested[0]]
            else:
                break
        else:
            raise CheckpointError(f"cannot read {self.path}: expected tensors by name at most {_NESTING} dictionaries deep")
        if ema:
            raise CheckpointError(f"cannot read {self.path}: expected a running average in it (ema=True), and it has none")
        tensors = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[str(name)] = value
            else:
                report.unused[str(name)] = f"a {type(value).__name__}, no tensor"
        if not tensors:
            raise CheckpointError(f"cannot read {self.path}: expected tensors by name in it, got {_listed(state)}")
        check_tensors(self.path, tensors)
        return strip_prefixes(tensors)


def check_tensors(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError for a tensor that is no ordinary weight: no floating-point number of 16 to 64 bits, sparse or
    quantized, or with more values than the file holds (a few that are repeated may stand for any number)."""
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise CheckpointError(
                f"cannot read {path}: expected floating-point weights of 16 to 64 bits, got {name} {value.dtype}"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"cannot read {path}: expected dense tensors with values, got {name} {value.layout} on {value.device}"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"cannot read {path}: expected every value in the file, got {name} {list(value.shape)} of fewer"
            )


def read(path: str | os.PathLike) -> Weights:
    """The weights of a file or folder; see ``stmae.checkpoint.load`` for what is understood.

    Raises:
        CheckpointError: it is missing, empty, cut short, of another kind, or a pickle that needs more than tensors.
        ImportError: safetensors is needed and not installed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise CheckpointError(f"cannot read {path}: no such file or folder")
        return _read_file(path)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _read_folder(folder: Path) -> Weights:
    there = [name for name in _FOLDER_FILES if (folder / name).is_file()]
    config_path = folder / "config.json"
    config = _json(config_path) if config_path.is_file() else None
    if not there:
        raise CheckpointError(
            f"cannot read {folder}: expected a run's folder or a Hugging Face folder with one of {', '.join(_FOLDER_FILES)}"
        )
    path = folder / there[0]
    if there[0].endswith(".index.json"):
        found = Weights(str(folder), _read_shards(path))
    else:
        found = _read_file(path)
    if found.config is None:
        if config is None:
            raise CheckpointError(f"cannot read {folder}: expected config.json beside {there[0]}")
        found.path = str(folder)
        if "stmae" in config:
            found.config = _own_config(config_path, config["stmae"])
        else:
            found.hub_config = config
    return found


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of the files that a Hugging Face index names."""
    mapping = _json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"cannot read {index}: expected a weight_map of names to files")
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(mapping.values())):
        if Path(name).name != name:
            raise CheckpointError(f"cannot read {index}: expected the names of files beside it, got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"cannot read {index}: {name}, which it names, is missing")
        state.update(_read_file(index.parent / name).state)
    absent = sorted(set(mapping) - set(state))
    if absent:
        raise CheckpointError(f"cannot read {index}: tensors that it names are in none of its files: {', '.join(absent[:5])}")
    return state


def _read_file(path: Path) -> Weights:
    if path.stat().st_size == 0:
        raise CheckpointError(f"cannot read {path}: it is empty")
    # By content, not by name: safetensors begins with 8 bytes of length and a JSON object, torch.save's files as zip or pickle.
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80" or path.suffix in _PICKLES):
        return _read_pickle(path)
    return _read_safetensors(path)


def _read_safetensors(path: Path) -> Weights:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if "stmae" not in metadata:
        return Weights(str(path), state)
    try:
        about = json.loads(metadata["stmae"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: its stmae configuration is damaged: {error}") from error
    return Weights(str(path), state, config=_own_config(path, about))


def _own_config(path: Path, about: object) -> tuple[str, dict]:
    """(kind, configuration) out of what ``describe`` wrote."""
    try:
        kind, format, config = about["kind"], about["format"], about["config"]  # type: ignore[index]
        if type(format) is not int or format < 1 or not isinstance(kind, str) or not isinstance(config, dict):
            raise TypeError("expected kind, format (a whole number from 1 on) and config")
        newer = format > FORMAT or kind not in KINDS
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: its stmae configuration is damaged: {error}") from error
    if newer:
        raise CheckpointError(
            f"cannot read {path}: it holds a {kind} in format {format}, and this stmae reads {', '.join(KINDS)} up to format "
            f"{FORMAT}; install a newer stmae"
        )
    return kind, config


def _read_pickle(path: Path) -> Weights:
    """A file of ``torch.save``, by the unpickler that makes tensors and plain containers only (and argparse's record of
    arguments, which mae_st and VideoMAE put beside their weights)."""
    try:
        # Opened here, because torch goes by the suffix of a path.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f", {named[1]}" if named else ""
        raise CheckpointError(
            f"cannot read {path}: it is a pickle that needs more than tensors{what}, and loading that could run code; save its "
            "weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read {path}: it is cut short or no file of torch.save: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read {path}: expected a dictionary of tensors, got {type(state).__name__}")
    arguments = state.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return Weights(str(path), state, arguments=arguments)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}: expected a JSON object, got {type(value).__name__}")
    return value


def _listed(state: dict) -> str:
    return f"the keys {', '.join(map(repr, list(state)[:5]))}" if state else "nothing"


def import_safetensors() -> ModuleType:
    """The package safetensors. Raises ImportError that says how to install it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing checkpoints needs safetensors, which is not installed; run: pip install 'stmae[train]'"
        ) from error
    return safetensors
