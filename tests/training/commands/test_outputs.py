"""What a command writes never takes the place of what it did not write."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stmae import checkpoint
from stmae.training import cli
from stmae.training.data.video_list import find_videos
from stmae.training.engine import outputs
from tests.support import small_models
from tests.support.synthetic_video import write_video

RGB = {"in_channels": 3, "mean": 0.45, "std": 0.225}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    for name in ("a", "b"):
        (folder / "videos" / name).mkdir(parents=True)
        write_video(folder / "videos" / name / "1.mp4", 12)
    checkpoint.save(small_models.autoencoder(**RGB), folder / "mae.safetensors")
    checkpoint.save(small_models.classifier(**RGB, num_classes=2), folder / "classifier.safetensors")
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "work")


MAE, CLASSIFIER, VIDEOS = ("--checkpoint", "mae.safetensors"), ("--checkpoint", "classifier.safetensors"), ("--data", "videos")
COMMANDS = {
    "features.npy": ["features", *MAE, *VIDEOS, "--stride", "1", "--workers", "0"],
    "results.json": ["test", *CLASSIFIER, *VIDEOS, "--stride", "1", "--views.temporal", "1"],
    "probe.json": ["probe", *MAE, *VIDEOS, "--test_data", "videos", "--stride", "1", "--workers", "0", "--kinds", "knn"],
    "list.txt": ["data", "check", *VIDEOS, "--frames", "4", "--workers", "0"],
}
REFUSED_EARLY = ["test", "detector", "--checkpoint", "none", "--data", "none.csv", "--data_root", "videos"]
OWN = {
    "results": outputs.is_results("top1", "views"),
    "list": outputs.is_list_of("features"),
    "features": outputs.is_features,
    "picture": outputs.is_picture,
}
FOREIGN = {
    "text": lambda path: path.write_text("videos/a/1.mp4 0\nvideos/b/1.mp4 1\n"),
    "json": lambda path: path.write_text(json.dumps({"a": 1})),
    "array": lambda path: np.save(open(path, "wb"), np.zeros(3)),  # noqa: SIM115
    "tensors": lambda path: save_file({"a": torch.zeros(3)}, path),
    "empty": lambda path: path.touch(),
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("mae.safetensors"),
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("own", OWN)
def test_what_is_somebody_elses_is_known(own, make, folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "output"
    FOREIGN[make](path)
    with pytest.raises(ValueError, match="output: .* exists, and this command did not write it: choose another name"):
        outputs.require_own(path, OWN[own])


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_did_not_write_is_not_overwritten(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    command = [*COMMANDS[name], "--output", name]
    for _ in range(2):  # its own it replaces
        assert cli.main(command) == 0, capsys.readouterr().err
    beside = folder / ("features.txt" if name == "features.npy" else name)
    beside.write_text("videos/a/1.mp4 0\n")
    before = contents(folder)
    assert cli.main(command) == 1
    assert f"output: {beside.name} exists, and this command did not write it" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_detectors_results_and_a_folder_of_videos_are_not_overwritten_either(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "mine.json").write_text("{}")
    assert cli.main([*REFUSED_EARLY, "--output", "mine.json"]) == 1
    assert "mine.json exists, and this command did not write it" in capsys.readouterr().err
    assert (folder / "mine.json").read_text() == "{}"
    (folder / "notes").mkdir()
    (folder / "notes" / "left_out.txt").write_text("mine")
    assert cli.main(["data", "prepare", *VIDEOS, "--output", "notes"]) == 1
    assert "notes is not empty, and this command did not write it" in capsys.readouterr().err
    assert [file.name for file in (folder / "notes").iterdir()] == ["left_out.txt"]


def test_the_array_beside_no_list_is_not_overwritten_either(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    np.save("features.npy", np.zeros(3))
    assert cli.main([*COMMANDS["features.npy"], "--output", "features.npy"]) == 1
    assert "output: features.npy exists" in capsys.readouterr().err and np.load("features.npy").shape == (3,)


def test_the_list_that_is_checked_is_not_overwritten_but_one_of_its_own(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "clips.txt").write_text("videos/a/1.mp4 0\n")
    command = ["data", "check", "clips.txt", "--frames", "4", "--workers", "0"]
    assert cli.main([*command, "--output", "clips.txt"]) == 1 and (folder / "clips.txt").read_text() == "videos/a/1.mp4 0\n"
    assert cli.main([*command, "--output", "good.txt"]) == 0 and len(find_videos("good.txt")) == 1


def test_pictures_do_not_overwrite_pictures(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 30), "red").save("videos/a/photo.png")
    before = (folder / "videos/a/photo.png").read_bytes()
    command = ["reconstruct", "--checkpoint", "mae.safetensors", "--video", "videos/a", "--output"]
    for _ in range(2):
        assert cli.main([*command, "pictures"]) == 0, capsys.readouterr().err
    assert cli.main([*command, "videos/a"]) == 1
    assert "photo.png exists, and this command did not write it" in capsys.readouterr().err
    assert (folder / "videos/a/photo.png").read_bytes() == before
