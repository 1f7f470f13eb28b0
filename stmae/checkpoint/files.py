"""Checkpoints on disk: weights as safetensors, the configuration as JSON in the file's metadata, written all
or nothing."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from stmae.checkpoint.resize import classifier_from_autoencoder, resize
from stmae.checkpoint.state import build
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.video_classifier import VideoClassifier

_FORMAT = 1
_KINDS: dict[str, tuple[type[VideoModel], type[EncoderConfig]]] = {
    "MaskedAutoencoder": (MaskedAutoencoder, MaskedAutoencoderConfig),
    "VideoClassifier": (VideoClassifier, VideoClassifierConfig),
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with the reason; what was there before a failed write is
    untouched."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; what was written there replaces ``path`` if the
    block succeeds.

    The data is on disk before the name changes (fsync, rename, fsync of the folder), so a crash, a full disk
    or an interruption leaves the previous file whole. On failure the temporary file is removed and nothing
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
        temporary.chmod(mode)  # an ordinary file's, also where the writer (safetensors) made a private file of it
        descriptor = os.open(temporary, os.O_RDWR)
        try:
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


def save(model: VideoModel, path: str | os.PathLike[str], *, extra: dict[str, str] | None = None) -> None:
    """Writes weights and configuration to one safetensors file, atomically.

    Args:
        model: a ``MaskedAutoencoder`` or ``VideoClassifier``, also wrapped by ``torch.compile`` or DDP.
        path: file to write or replace; its folder must exist.
        extra: further strings for the metadata, for instance the step.

    Raises:
        CheckpointError: the folder is missing or unwritable, or the disk is full; the previous file is then
            untouched.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    model = _unwrap(model)
    kind = type(model).__name__
    if kind not in _KINDS:
        raise ValueError(f"save: expected a model of {', '.join(_KINDS)}, got {kind}")
    about = {"format": _FORMAT, "kind": kind, "config": model.config.to_dict()}
    metadata = {**(extra or {}), "format": "pt", "stmae": json.dumps(about)}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(state, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error


def load(path: str | os.PathLike[str], **overrides: Any) -> VideoModel:
    """Reads a checkpoint that ``save`` wrote: the model, on the CPU, in evaluation mode.

    Args:
        path: the file.
        **overrides: fields of the configuration to change, for instance ``num_frames=32`` or
            ``image_size=(224, 320)``: position embeddings are then interpolated (see ``resize``).

    Raises:
        CheckpointError: no such file, not a safetensors file, cut short, or not written by ``save``.
        CheckpointMismatch: the weights do not fit the configuration; lists what differs.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: {error}") from error
    if "stmae" not in metadata:
        raise CheckpointError(
            f"cannot read {os.fspath(path)}: it carries no stmae configuration; for weights of another code base "
            "use stmae.checkpoint.from_mae_st or from_slowfast"
        )
    try:
        about = json.loads(metadata["stmae"])
        if about["format"] > _FORMAT or about["kind"] not in _KINDS:
            raise CheckpointError(
                f"cannot read {os.fspath(path)}: it holds a {about['kind']} in format {about['format']}, and this "
                f"stmae reads {', '.join(_KINDS)} up to format {_FORMAT}; install a newer stmae"
            )
        model_class, config_class = _KINDS[about["kind"]]
        config = config_class.from_dict(about["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {os.fspath(path)}: its stmae configuration is damaged: {error}") from error
    integers = [name for name, value in state.items() if not value.is_floating_point()]
    if integers:
        raise CheckpointError(f"cannot read {os.fspath(path)}: expected floating-point weights, got others: {integers}")
    model = build(model_class, config, state, os.fspath(path)).eval()
    return resize(model, **overrides) if overrides else model


def load_classifier(path: str | os.PathLike[str], **overrides: Any) -> VideoClassifier:
    """Reads a classifier, or makes one from a pre-trained autoencoder's encoder with a new head.

    Args:
        path: a checkpoint of either kind.
        **overrides: fields of ``VideoClassifierConfig``, as in ``load``; from an autoencoder, ``num_classes``
            and whatever else fine-tuning needs (``dropout``, ``drop_path``). A classifier's head is started
            anew if ``num_classes`` changes.
    """
    model = load(path)
    if isinstance(model, VideoClassifier):
        return resize(model, **overrides) if overrides else model
    return classifier_from_autoencoder(cast(MaskedAutoencoder, model), **overrides)  # the only other kind


def _unwrap(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing checkpoints needs safetensors, which is not installed; run: pip install 'stmae[train]'"
        ) from error
    return safetensors


def sync_folder(folder: Path) -> None:
    """Makes names in ``folder`` durable, a rename among them; not every system lets a folder be opened for it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
