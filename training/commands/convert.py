"""``stmae convert``: weights of another code base as this library's, and back; reports what was recognised and assumed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from stmae import checkpoint
from stmae.models.encoder import VideoModel

from ..config.checks import check_types, require_text

FORMATS = ("stmae", "hf-videomae", "mae_st", "videomae")


@dataclass(kw_only=True)
class Config:
    """What to convert, and into what."""

    input: str
    """a file, a folder or a Hugging Face repository (owner/name) with weights of any code base that stmae reads"""
    output: str
    """a folder (stmae, hf-videomae), which is made; or a .safetensors or .pth file"""
    to: Literal["stmae", "hf-videomae", "mae_st", "videomae"] = "stmae"
    """whose names and files: stmae's own, Hugging Face's VideoMAE, mae_st's, VideoMAE's"""
    ema: bool = False
    """take the running average of the weights, where the file has one"""
    set: list[str] | None = None
    """FIELD=VALUE of the model's configuration: what the weights do not determine, or a change (num_heads=16, num_frames=32)"""
    license: str | None = None
    """license of the weights, for the model card"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "input", "output", "license")
        output = Path(self.output)
        if self.to in ("mae_st", "videomae") and not self.to_file:
            raise ValueError(f"output: expected a name in .safetensors or .pth for {self.to}, got {output.name}")
        if self.to == "hf-videomae" and self.to_file:
            raise ValueError(f"output: expected a folder for hf-videomae, got {output.name}")
        if self.to == "stmae" and output.suffix == ".pth":
            raise ValueError(f"output: expected a folder or a name in .safetensors for stmae, got {output.name}")
        self.fields  # noqa: B018 (checks them)

    @property
    def to_file(self):
        return Path(self.output).suffix in (".safetensors", ".pth")

    @property
    def fields(self):
        """``set`` as {FIELD: VALUE}, a value as JSON where it is that, else as text."""
        return _fields(self.set or [])


def run(config):
    """Writes the converted weights; returns the path."""
    output = Path(config.output)
    model = VideoModel.from_pretrained(config.input, ema=config.ema, **config.fields)
    print(model.load_report)
    if config.to == "stmae" and not config.to_file:
        model.save_pretrained(output, license=config.license)
    elif config.to == "stmae":
        checkpoint.save(model, output)
    elif config.to == "hf-videomae":
        weights, hub_config = checkpoint.to_huggingface(model)
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "model.safetensors", weights)
        with checkpoint.atomic_write(output / "config.json") as temporary:
            temporary.write_text(json.dumps(hub_config, indent=2) + "\n", encoding="utf-8")
    else:
        export = checkpoint.to_mae_st if config.to == "mae_st" else checkpoint.to_videomae
        _write(output, export(model))
    print(f"{output}: a {type(model).__name__} as {config.to}")
    return output


def _write(path, weights):
    with checkpoint.atomic_write(path) as temporary:
        if path.suffix == ".pth":
            import torch

            torch.save({"model": weights}, temporary)
        else:
            save_file({name: value.contiguous() for name, value in weights.items()}, temporary, {"format": "pt"})


def _fields(pairs):
    """FIELD=VALUE, the value as JSON where it is that, else as a word."""
    fields = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"set: expected FIELD=VALUE, got {pair!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        fields[name] = tuple(value) if isinstance(value, list) else value
    return fields
