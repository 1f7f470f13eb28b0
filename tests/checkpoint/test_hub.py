"""Folders that are shared, and the hub's cache; nothing here reaches the network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stmae.checkpoint import CheckpointError, CheckpointMismatch
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.models.encoder import VideoModel

SMALL = {"image_size": 16, "patch_size": 8, "num_frames": 4, "width": 16, "depth": 1, "num_heads": 2}
ROOT = Path(__file__).parents[2]


def autoencoder():
    torch.manual_seed(0)
    return MaskedAutoencoder(
        MaskedAutoencoderConfig(**SMALL, decoder_width=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.5)
    )


def classifier():
    torch.manual_seed(0)
    return VideoClassifier(VideoClassifierConfig(**SMALL, num_classes=3))


def assert_same(a, b):
    assert type(a) is type(b) and a.config == b.config
    assert all(torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())


@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_what_is_saved_is_loaded(make, tmp_path):
    model = make()
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder, license="apache-2.0", recipe="Trained for a test.")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(type(model).from_pretrained(folder), model)
    assert_same(VideoModel.from_pretrained(str(folder)), model)
    card = (folder / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "Trained for a test." in card and "library_name: stmae" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]


def test_the_card_is_kept_unless_it_is_to_be_replaced(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    autoencoder().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    autoencoder().save_pretrained(tmp_path, overwrite_card=True)
    assert "library_name" in (tmp_path / "README.md").read_text()


def test_the_card_is_valid_for_the_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    classifier().save_pretrained(tmp_path, license="mit")
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "stmae", "video-classification")


def test_a_model_of_another_class_is_refused_or_asked_for(tmp_path):
    autoencoder().save_pretrained(tmp_path / "mae")
    classifier().save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="expected a VideoClassifier, it holds a MaskedAutoencoder; give num_classes"):
        VideoClassifier.from_pretrained(tmp_path / "mae")
    with pytest.raises(CheckpointError, match="expected a MaskedAutoencoder, it holds a VideoClassifier"):
        MaskedAutoencoder.from_pretrained(tmp_path / "classifier")
    model = VideoClassifier.from_pretrained(tmp_path / "mae", num_classes=7, dropout=0.1)
    assert (model.config.num_classes, model.config.dropout) == (7, 0.1)
    assert any("head is new" in note for note in model.load_report.notes)
    assert VideoClassifier.from_pretrained(tmp_path / "classifier", num_classes=7).config.num_classes == 7


def test_weights_that_lost_their_metadata_are_described_by_the_config(tmp_path):
    from safetensors.torch import load_file, save_file

    model = autoencoder()
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert_same(MaskedAutoencoder.from_pretrained(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["stmae"]["config"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match=r"shape: encoder\.patch_embed\.weight"):
        MaskedAutoencoder.from_pretrained(tmp_path)


def cached(tmp_path, model, repo="someone/model"):
    """A cache of huggingface_hub that holds ``model``, as a download leaves it."""
    folder = tmp_path / f"models--{repo.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    return tmp_path


def test_the_hubs_cache_serves_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    model = autoencoder()
    cache = cached(tmp_path, model)
    assert_same(MaskedAutoencoder.from_pretrained("someone/model", cache_dir=cache, local_files_only=True), model)
    with pytest.raises(CheckpointError, match="someone/other: no such file or folder here") as refused:
        MaskedAutoencoder.from_pretrained("someone/other", cache_dir=cache, local_files_only=True)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_none_is_refused(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(CheckpointError, match="no repository's name"):
        VideoModel.from_pretrained("a/b/c/d.pth", local_files_only=True)


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    from stmae import hub
    from stmae.training.engine.run_folder import weights_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(hub, "download", lambda name, **options: asked.append(name))
    for read in (weights_file, VideoClassifier.from_pretrained):
        with pytest.raises(CheckpointError, match="runs/bsae: no such file or folder, and no repository.*did you mean runs/base"):
            read("runs/bsae")
        with pytest.raises(CheckpointError, match="cannot read weights/model.pth: no such file or folder"):
            read("weights/model.pth")
    assert asked == []
    weights_file("someone/model")
    assert asked == ["someone/model"]


def test_push_to_hub_uploads_what_is_saved(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = {}

    class Repo:
        repo_id = "someone/model"

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private, exist_ok)
            return Repo

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            calls["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return "commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert autoencoder().push_to_hub("model", private=True, token="t") == "commit"
    assert calls == {"token": "t", "repo": ("model", True, True), "files": ["README.md", "config.json", "model.safetensors"]}


def test_without_huggingface_hub_the_message_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'stmae\[hub\]'"):
        VideoModel.from_pretrained("someone/model")
    autoencoder().save_pretrained(tmp_path)  # needs it not


def test_torch_hub_entry_points(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    code = (
        "import sys, torch; repo = sys.argv[1]; model = torch.hub.load(repo, 'load', sys.argv[2], source='local');"
        "small = torch.hub.load(repo, 'vit_small_patch16', source='local', depth=1);"
        "print(type(model).__name__, type(small).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path], capture_output=True, text=True)
    assert out.stdout.split() == ["MaskedAutoencoder", "VideoClassifier"], out.stderr
