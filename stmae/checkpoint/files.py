"""Checkpoints on disk: weights as safetensors, the configuration as JSON in the file's metadata, written all
or nothing."""

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from stmae.checkpoint.errors import CheckpointError
from stmae.checkpoint.formats import build_foreign
from stmae.checkpoint.reading import FORMAT, Weights, check_tensors, import_safetensors, read
from stmae.checkpoint.report import LoadReport
from stmae.checkpoint.resize import classifier_from_autoencoder, detector_from_classifier, resize
from stmae.checkpoint.state import CheckpointMismatch, build
from stmae.models.action_detector import ActionDetector
from stmae.models.config import ActionDetectorConfig, EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.video_classifier import VideoClassifier

_KINDS: dict[str, tuple[type[VideoModel], type[EncoderConfig]]] = {
    "MaskedAutoencoder": (MaskedAutoencoder, MaskedAutoencoderConfig),
    "VideoClassifier": (VideoClassifier, VideoClassifierConfig),
    "ActionDetector": (ActionDetector, ActionDetectorConfig),
}

# What odd values in a file lead to in code that takes them for a model's: numbers of any size, lists for numbers, depth.
_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError, AssertionError)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; what was written there replaces ``path`` if the
    block succeeds.

    The data is on disk before the name changes (fsync, rename, fsync of the folder), so a crash, a full disk
    or an interruption leaves the previous file complete. On failure the temporary file is removed and nothing
    else.

    Raises:
        CheckpointError: the folder is missing or unwritable, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        # In the same folder, because a rename is atomic only within one file system.
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        mode = temporary.stat().st_mode
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.fchmod(descriptor, mode)  # an ordinary file's, also where the writer (safetensors) made a private file of it
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous file is untouched" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save(model: VideoModel, path: str | os.PathLike, *, extra: dict[str, str] | None = None) -> None:
    """Writes weights and configuration to one safetensors file, atomically.

    Args:
        model: a ``MaskedAutoencoder``, ``VideoClassifier`` or ``ActionDetector``, also wrapped by ``torch.compile`` or DDP.
        path: file to write or replace; its folder must exist.
        extra: further strings for the metadata, for instance the step.

    Raises:
        CheckpointError: the folder is missing or unwritable, or the disk is full; the previous file is then
            untouched.
        ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
    model = _unwrap(model)
    kind = type(model).__name__
    if kind not in _KINDS:
        raise ValueError(f"save: expected a model of {', '.join(_KINDS)}, got {kind}")
    metadata = {**(extra or {}), "format": "pt", "stmae": json.dumps(describe(model))}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(state, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error


def describe(model: VideoModel) -> dict:
    """What a checkpoint says of its model besides the weights."""
    return {"format": FORMAT, "kind": type(model).__name__, "config": model.config.to_dict()}


def load(path: str | os.PathLike, *, ema: bool = False, **overrides: Any) -> VideoModel:
    """Reads weights of this library or of another code base: the model, on the CPU, in evaluation mode.

    What is read, recognised by names and shapes: files and folders of this library; checkpoints of mae_st (training and
    published), SlowFast, VideoMAE and VideoMAE V2 (pre-training and fine-tuning), image MAE (inflated to video), as ``.pth``,
    ``.pyth``, ``.pt``, ``.bin`` or safetensors; folders of Hugging Face's VideoMAE. Pickles are read by torch's restricted
    unpickler alone.

    Args:
        path: a file or folder.
        ema: the running average of the weights, where the file has one beside them.
        **overrides: fields of the configuration. For another code base's weights, those that the weights cannot tell
            (``num_heads``, ``decoder_num_heads``, ``target``, ...) state what the file is. Any other changes the model:
            ``num_frames=32`` or ``image_size=(224, 320)`` interpolate position embeddings (see ``resize``).

    Returns:
        The model; its ``load_report`` (a ``LoadReport``) says what was recognised, inferred and assumed.

    Raises:
        CheckpointError: no such file, not a checkpoint, cut short, another architecture, or a choice that must be stated.
        CheckpointMismatch: the weights do not fit the configuration; lists what differs.
        ImportError: safetensors is needed and not installed.
    """
    found = read(path)
    if found.config is not None:
        if ema:
            raise CheckpointError(f"cannot read {found.path}: expected a running average in it (ema=True), and it has none")
        model, changes = _build_own(found), overrides
    else:
        report = LoadReport("", found.path)
        weights = found.pick(ema, report)
        try:
            model, changes = build_foreign(
                weights, report, arguments=found.arguments, hub_config=found.hub_config, stated=overrides
            )
        except (CheckpointMismatch, CheckpointError):
            raise
        except _ODD as error:
            raise CheckpointError(f"cannot read {found.path}: {_line(error)}") from error
        model.load_report = report
    assert model.load_report is not None
    for note in model.load_report.notes:
        warnings.warn(f"{found.path}: {note}", stacklevel=2)
    return resize(model, **changes) if changes else model


def _build_own(found: Weights) -> VideoModel:
    assert found.config is not None
    kind, values = found.config
    model_class, config_class = _KINDS[kind]
    try:
        config = config_class.from_dict(values)
    except _ODD as error:
        raise CheckpointError(f"cannot read {found.path}: its stmae configuration is damaged: {_line(error)}") from error
    check_tensors(found.path, found.state)
    try:
        model = build(model_class, config, found.state, found.path).eval()
    except CheckpointMismatch:
        raise
    except _ODD as error:
        raise CheckpointError(f"cannot read {found.path}: no model can be built as it says: {_line(error)}") from error
    model.load_report = LoadReport("stmae", found.path, inferred={"config": "all of it, from the file"})
    model.load_report.check_values(found.state, vectors=False)  # biases of a model that was saved untrained are zero by right
    return model


def _line(error: BaseException) -> str:
    """What an error says, in one line of a length to read."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def load_classifier(path: str | os.PathLike[str], **overrides: Any) -> VideoClassifier:
    """Reads a classifier, or makes one from a pre-trained autoencoder's encoder with a new head.

    Args:
        path: a checkpoint of either kind.
        **overrides: fields of ``VideoClassifierConfig``, as in ``load``; from an autoencoder, ``num_classes``
            and whatever else fine-tuning needs (``dropout``, ``drop_path``). A classifier's head is started
            anew if ``num_classes`` changes.
    """
    model = load(path)
    if isinstance(model, ActionDetector):
        raise ValueError(f"load_classifier: expected an autoencoder's or a classifier's weights, {path} holds an ActionDetector")
    if isinstance(model, VideoClassifier):
        return resize(model, **overrides) if overrides else model
    return classifier_from_autoencoder(cast(MaskedAutoencoder, model), **overrides)  # the only other kind


def load_detector(path: str | os.PathLike[str], **overrides: Any) -> ActionDetector:
    """Reads an action detector, or makes one from a pre-trained autoencoder's or a classifier's encoder with a new head.

    Args:
        path: a checkpoint of any kind.
        **overrides: fields of ``ActionDetectorConfig``, as in ``load``.
    """
    model = load(path)
    if isinstance(model, ActionDetector):
        return resize(model, **overrides) if overrides else model
    if not isinstance(model, VideoClassifier):
        model = classifier_from_autoencoder(cast(MaskedAutoencoder, model))
    return detector_from_classifier(model, **overrides)


def _unwrap(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def sync_folder(folder: Path) -> None:
    """Makes names in ``folder`` durable, a rename among them; not every system lets a folder be opened for it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
