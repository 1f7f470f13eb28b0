"""Every example runs, at tiny sizes; what it says and leaves behind is looked at."""

import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file

import stmae
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier
from tests.support.small_models import SMALL_VIDEOMAE
from tests.support.synthetic_video import write_image, write_video

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FINETUNING = ("optimizer.epochs=12", "optimizer.warmup_epochs=1", "optimizer.batch=4", "optimizer.accumulate=1", "clips.stride=2")
FEW = ("run.workers=0", "run.tensorboard=false", "run.device=cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(NAME, *arguments)``: the example in this process, as its command would; what it printed."""

    def example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two folders of videos, of dark and of bright ones."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, ground in (("dark", 30), ("bright", 220)):
        (folder / name).mkdir()
        for number in range(2):
            write_video(folder / name / f"{number}.mp4", 10, size=(64, 96), ground=ground)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A VideoMAE as transformers saves it, which is how it is published, with no value at its start."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    model = VideoMAEForPreTraining(VideoMAEConfig(**SMALL_VIDEOMAE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder


def test_every_example_is_listed_and_tested():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    for page in (EXAMPLES / "README.md", ROOT / "docs/examples.md"):
        assert set(re.findall(r"[\w]+\.(?:py|ipynb)", page.read_text())) == files, page
    here = Path(__file__).read_text()
    assert all(f'run("{name}"' in here or name.endswith(".ipynb") for name in files) and len(NOTEBOOKS) == 1


def test_pretraining_on_a_folder(run, tmp_path):
    for number in range(2):
        write_video(tmp_path / f"videos {number}.mp4", 20, size=(48, 67), pix_fmt="yuv444p")
    tiny = ["model.width=32", "model.depth=1", "model.num_heads=1", "model.image_size=32", "optimizer.epochs=8"]
    settings = ["--set", *tiny, *FEW, "optimizer.warmup_epochs=1", "optimizer.batch=2"]
    said = run("pretrain_on_a_folder.py", tmp_path, tmp_path / "run", *settings)
    assert "tokens [1, 17, 32]" in said  # 4 x 2 x 2 patches and the class token
    assert stmae.checkpoint.load(tmp_path / "run").config.width == 32


def test_ops_in_a_plain_vit(run):
    said = run("ops_in_a_plain_vit.py", "--frames", 4, "--size", 48, "--rounds", 1)  # compares both ways itself
    assert "1 of 18 tokens visible" in said


def test_accelerating_transformers(run, published):
    said = run("accelerate_transformers.py", "--model", published, "--mask_ratio", 0.75)
    before, after = map(float, re.search(r"loss (\S+), then (\S+);", said).groups())
    assert before == pytest.approx(after, rel=1e-4) and before > 0.1


def test_finetuning_published_weights(run, published, labelled, tmp_path):
    data = ["--weights", published, "--data", labelled, "--test_data", labelled, "--output", tmp_path / "run"]
    said = run("finetune_published_weights.py", *data, "--set", *FINETUNING, *FEW)
    assert "recognised as huggingface-videomae" in said and "the head is new" in said
    model = VideoClassifier.from_pretrained(tmp_path / "run")
    start = VideoClassifier.from_pretrained(published, num_classes=2)
    moved = [(a - b).abs().max() for a, b in zip(model.encoder.parameters(), start.encoder.parameters())]
    assert 0 < max(moved) < 0.1  # trained, and from these weights


def test_lora(run, published, labelled, tmp_path):
    data = ["--weights", published, "--data", labelled, "--test_data", labelled, "--output", tmp_path / "classifier"]
    said = run("lora.py", *data, "--epochs", 8, "--batch", 4, "--lr", 0.02, "--stride", 2, "--workers", 0)
    assert "accuracy 100.0% after" in said  # of dark and bright videos
    merged = load_file(tmp_path / "classifier/model.safetensors")
    assert not [name for name in merged if "lora" in name] and VideoClassifier.from_pretrained(tmp_path / "classifier")


def test_native_sizes(run, tmp_path):
    write_video(tmp_path / "wide.mp4", 9, size=(48, 100))
    write_video(tmp_path / "tall.mkv", 20, size=(101, 67), pix_fmt="yuv444p")
    write_image(tmp_path / "still.png", 3, size=(64, 90))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    tiny = ["--frames", 16, "--longest", 96, "--width", 64, "--depth", 1, "--steps", 2, "--batch", 8]
    said = run("native_sizes.py", tmp_path, *tiny, "--output", tmp_path / "weights")
    assert "broken.mp4: cannot be opened" in said
    for size in ("8x32x96", "16x96x48", "2x64x80"):
        assert size in said
    assert isinstance(stmae.checkpoint.load(tmp_path / "weights"), MaskedAutoencoder)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, monkeypatch):
    """Its cells one after the other, as a reader runs them, with a small model and few steps."""
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # as committed: no results, which would go stale
    values = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), values)
        if "parameters" in cell["metadata"].get("tags", ()):
            values |= {"STEPS": 3, "WIDTH": 64, "DEPTH": 1}
    assert len(values["losses"]) == 3 and values["losses"][-1] < values["losses"][0]
    assert isinstance(values["config"], MaskedAutoencoderConfig) and values["features"].shape == (8, 64)
