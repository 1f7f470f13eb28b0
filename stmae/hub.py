"""Models as folders that can be shared: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, as on Hugging Face.

A folder holds ``config.json``, ``model.safetensors`` and a model card; the hub itself is reached through huggingface_hub.
"""

import difflib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from stmae.checkpoint import LoadReport
    from stmae.models.encoder import VideoModel

Model = TypeVar("Model", bound="HubMixin")

# What is asked of a repository: safetensors first, and pickles only where there is nothing else.
_CONFIG = ["config.json"]
_SAFE = ["*.safetensors", "*.safetensors.index.json"]
_PICKLES = ["*.bin", "*.bin.index.json", "*.pth", "*.pyth", "*.pt"]
_FILES = (".safetensors", ".bin", ".pth", ".pyth", ".pt", ".ckpt", ".tar", ".json", ".yaml")


class HubMixin:
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a model of this library."""

    load_report: "LoadReport | None" = None  # of a model that was read: what its weights were recognised as

    def save_pretrained(
        self, folder: str | os.PathLike, *, license: str | None = None, recipe: str | None = None, overwrite_card: bool = False
    ) -> None:
        """Writes ``config.json``, ``model.safetensors`` (encoder and decoder) and the model card ``README.md``.

        Args:
            folder: made if it is missing.
            license: of the weights, by its identifier on the hub (``apache-2.0``, ``cc-by-nc-4.0``); goes into the card.
            recipe: how the weights were trained, as Markdown; goes into the card.
            overwrite_card: replace a card that is there; by default it is kept.

        Raises:
            CheckpointError: the folder cannot be written; what was there is untouched.
        """
        from stmae import checkpoint

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise checkpoint.CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        checkpoint.save(cast("VideoModel", self), folder / "model.safetensors")
        _write(folder / "config.json", json.dumps(config_json(cast("VideoModel", self)), indent=2, sort_keys=True) + "\n")
        if overwrite_card or not (folder / "README.md").exists():
            _write(folder / "README.md", model_card(cast("VideoModel", self), license=license, recipe=recipe))

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        ema: bool = False,
        **overrides: Any,
    ) -> Model:
        """The model of a folder, a file or a repository of the Hugging Face hub, whatever code base wrote it: on the CPU, in
        evaluation mode. See ``stmae.checkpoint.load``.

        Args:
            name_or_path: a folder or file, or ``owner/name`` on the hub.
            revision: branch, tag or commit on the hub.
            token: for private repositories; default: the one of ``hf auth login``.
            cache_dir: where downloads are kept; default: huggingface_hub's.
            local_files_only: use the cache alone.
            ema: the running average of the weights, where the file has one beside them.
            **overrides: fields of the configuration, as for ``stmae.checkpoint.load``. ``VideoClassifier.from_pretrained`` of an
                autoencoder takes ``num_classes`` for its new head.

        Raises:
            CheckpointError: nothing there, offline, another architecture, or a model of another class.
            CheckpointMismatch: the weights do not fit.
            ImportError: huggingface_hub is needed and not installed.
        """
        from stmae import checkpoint
        from stmae.models import MaskedAutoencoder, VideoClassifier

        path = Path(name_or_path)
        if not path.exists():
            require_no_path(path)
            path = download(str(name_or_path), revision=revision, token=token, cache_dir=cache_dir, offline=local_files_only)
        # An autoencoder becomes a classifier only where a new head is asked for.
        classifier = issubclass(cls, VideoClassifier)
        head = {name: overrides.pop(name) for name in _HEAD_FIELDS if classifier and name in overrides}
        model = checkpoint.load(path, ema=ema, **overrides)
        if isinstance(model, MaskedAutoencoder) and "num_classes" in head:
            model = checkpoint.classifier_from_autoencoder(model, **head)
            assert model.load_report is not None  # load says what it found
            model.load_report.notes.append("the head is new; the decoder was left out")
        elif head:
            model = checkpoint.resize(model, **head)
        if not isinstance(model, cls):
            hint = "; give num_classes for a new head" if classifier else ""
            raise checkpoint.CheckpointError(
                f"cannot read {name_or_path}: expected a {cls.__name__}, it holds a {type(model).__name__}{hint}"
            )
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        license: str | None = None,
        recipe: str | None = None,
    ) -> str:
        """Uploads what ``save_pretrained`` writes to ``repo_id`` (``owner/name``), which is made if it is missing; returns the
        commit's address.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        import tempfile

        api = import_hub().HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license, recipe=recipe)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision))


_HEAD_FIELDS = ("num_classes", "dropout", "drop_path")


def config_json(model: "VideoModel") -> dict[str, Any]:
    """``config.json`` of a model: our configuration under ``stmae``, and what the hub reads beside it."""
    from stmae.checkpoint.files import describe

    return {"architectures": [type(model).__name__], "model_type": "stmae", "library_name": "stmae", "stmae": describe(model)}


def model_card(model: "VideoModel", *, license: str | None = None, recipe: str | None = None) -> str:
    """The model card as Markdown with the hub's metadata on top."""
    kind = type(model).__name__
    config: Any = model.config
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    task = "video-classification" if kind == "VideoClassifier" else "feature-extraction"
    metadata = ["library_name: stmae", f"pipeline_tag: {task}", "tags:", "- video", "- masked-autoencoder"]
    if license:
        metadata.insert(0, f"license: {json.dumps(license)}")
    clip = f"{config.num_frames}x{config.image_size[0]}x{config.image_size[1]}"
    patch = f"{config.tubelet_size}x{config.patch_size[0]}x{config.patch_size[1]}"
    rows = {"clip": clip, "patch": patch, "width": config.width, "depth": config.depth, "heads": config.num_heads}
    if kind != "MaskedAutoencoder":
        rows["classes"] = config.num_classes
    else:
        rows["decoder"] = f"{config.decoder_width} wide, {config.decoder_depth} blocks"
        rows["masked"] = f"{config.mask_ratio:.0%}, {config.mask_strategy}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{chr(10).join(metadata)}
---

# {kind}

A {kind} of [stmae](https://arxiv.org/abs/2205.09113) with {size:.1f} M parameters.

| | |
|---|---|
{table}

```python
from stmae.models import {kind}

model = {kind}.from_pretrained("OWNER/NAME")
```

## Recipe

{recipe or "Not stated."}

## License of the weights

{license or "Not stated."}
"""


def require_no_path(path: Path) -> None:
    """Raises CheckpointError where ``path``, which is not there, is a mistyped path and no repository's name: its folder is
    there, or it ends as a file of weights does. So a typing error does not ask the hub for a stranger's weights."""
    from stmae.checkpoint import CheckpointError

    folder = path.parent
    if path.suffix in _FILES or (folder != Path(".") and folder.is_dir()):
        names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        why = "" if path.suffix in _FILES else f": there is a folder {folder}"
        reason = f", and no repository's name (owner/name){why}"
        raise CheckpointError(f"cannot read {path}: no such file or folder{reason}{hint}")


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    offline: bool = False,
) -> Path:
    """The folder of a hub repository's configuration and weights, in huggingface_hub's cache.

    Raises:
        CheckpointError: no such repository, or not in the cache while offline.
        ImportError: huggingface_hub is not installed.
    """
    from stmae.checkpoint import CheckpointError

    hub = import_hub()
    options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=offline)
    try:
        folder = Path(hub.snapshot_download(repo_id, allow_patterns=_CONFIG + _SAFE, **options))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(repo_id, allow_patterns=_CONFIG + _PICKLES, **options))
    except hub.errors.HFValidationError as error:
        raise CheckpointError(f"cannot read {repo_id}: no such file or folder, and no repository's name (owner/name)") from error
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot read {repo_id}: no such file or folder here, and the hub does not give it: {reason}"
        ) from error
    return folder


def import_hub() -> ModuleType:
    """The package huggingface_hub. Raises ImportError that says how to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "reading from and writing to the Hugging Face hub needs huggingface_hub, which is not installed; run: "
            "pip install 'stmae[hub]'"
        ) from error
    return huggingface_hub


def _write(path: Path, text: str) -> None:
    from stmae.checkpoint import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
