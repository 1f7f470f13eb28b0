"""``stmae reconstruct`` and ``stmae demo``: pictures that show what they should."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.training import cli
from stmae.training.commands import demo
from stmae.training.config import PretrainConfig, from_preset
from stmae.training.data.video_list import find_videos
from stmae.training.evaluation.pictures import GAP, LABEL, load_autoencoder
from tests.support.synthetic_video import write_video

SIZES = {"image_size": 32, "num_frames": 4, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 1}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = MaskedAutoencoder(MaskedAutoencoderConfig(**SIZES, decoder_width=32, decoder_depth=1, decoder_num_heads=1))
    (tmp_path / "run").mkdir()
    checkpoint.save(model, tmp_path / "run" / "model.safetensors")
    return tmp_path / "run"


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "a video.mp4", 40)


def pictures(model, video, output, *more):
    argv = ["reconstruct", "--checkpoint", str(model), "--video", str(video), "--output", str(output), *more]
    return cli.main(argv)


def test_a_grid_and_an_animation(model, video, tmp_path, capsys):
    assert pictures(model, video, tmp_path / "pictures") == 0
    printed = capsys.readouterr().out
    assert "mean and contrast of each patch are taken from the original" in printed and "a video.png" in printed
    with Image.open(tmp_path / "pictures" / "a video.gif") as gif:
        assert gif.is_animated and gif.n_frames == 2  # one frame for each of the two time slices
        moving = np.asarray(gif.convert("RGB"))
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "a video.png"))
    for shown in (sheet, moving):  # nothing is cut at the edges, however long the labels are
        assert (shown[:, :GAP] == 255).all() and (shown[:, -GAP:] == 255).all()

    size, step = 96, 96 + GAP  # 32 pixels, three times enlarged

    def picture(row, column):
        top = row * (size + LABEL + GAP) + LABEL
        left = GAP + column * step
        return sheet[top : top + size, left : left + size].reshape(4, 24, 4, 24, 3).swapaxes(1, 2)  # [4, 4, 24, 24, 3] patches

    visible = 0
    for column in range(2):
        original, masked, made = picture(0, column), picture(1, column), picture(2, column)
        for row in range(4):
            for patch in range(4):
                if np.array_equal(masked[row, patch], original[row, patch]):  # a visible patch is shown in the reconstruction too
                    visible += 1
                    assert np.array_equal(made[row, patch], original[row, patch])
                else:
                    assert (np.abs(masked[row, patch].astype(int) - 128) <= 1).all()
    assert visible == 3  # int(32 * 0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_no_utf8_is_written_as_escapes(model, video, tmp_path, capsys):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    os.rename(video, name)
    assert pictures(model, os.fsdecode(name), tmp_path / "pictures") == 0
    capsys.readouterr().out.encode()  # what a terminal can be given
    assert sorted(os.listdir(tmp_path / "pictures")) == ["caf\\udce9.gif", "caf\\udce9.png"]


def test_another_mask_ratio_and_plain_pixels(tmp_path, video, capsys):
    config = MaskedAutoencoderConfig(
        **SIZES, decoder_width=32, decoder_depth=1, decoder_num_heads=1, target="pixels", predicted_frames=4
    )
    checkpoint.save(MaskedAutoencoder(config), tmp_path / "plain.safetensors")
    assert pictures(tmp_path / "plain.safetensors", video, tmp_path / "out", "--mask_ratio", "0.5") == 0
    assert "everything shown is predicted" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a video.gif") as gif:
        assert gif.n_frames == 4


def test_the_same_seed_gives_the_same_pictures(model, video, tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        pictures(model, video, tmp_path / name, "--seed", seed)
    one, two, three = ((tmp_path / name / "a video.png").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_the_stride_is_the_runs_own(model, tmp_path):
    assert load_autoencoder(model, None)[1].stride == 4
    (model / "config.yaml").write_text("clips: {stride: 2}\n")
    assert load_autoencoder(model, None)[1].stride == 2
    assert load_autoencoder(model / "model.safetensors", 3)[1].stride == 3


def test_a_folder_with_a_broken_video(model, video, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_text("no video")
    assert pictures(model, tmp_path, tmp_path / "out") == 0
    assert "skipped video" in capsys.readouterr().out and (tmp_path / "out" / "a video.png").exists()


@pytest.mark.parametrize(
    "case, message",
    [
        ("no video", "no such folder or list file"),
        ("broken video", "no pictures: none of the videos in"),
        ("no checkpoint", "cannot read"),
        ("classifier", "holds a VideoClassifier, and only a masked autoencoder reconstructs"),
    ],
)
def test_what_cannot_be_is_one_line(case, message, model, video, tmp_path, capsys):
    if case == "no video":
        video = tmp_path / "absent.mp4"
    if case == "broken video":
        video.write_text("no video")
    if case == "no checkpoint":
        (model / "model.safetensors").write_text("no weights")
    if case == "classifier":
        checkpoint.save(VideoClassifier(VideoClassifierConfig(**SIZES, num_classes=3)), model / "model.safetensors")
    assert pictures(model, video, tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_the_demo_learns_and_names_its_pictures(tmp_path, monkeypatch, capsys):
    """The real command and clips, cut to a few steps."""

    def short(config_class, name, **settings):
        less = {"optimizer.epochs": 100, "optimizer.warmup_epochs": 10, "run.tensorboard": False}
        return from_preset(config_class, name, **settings, **less)

    monkeypatch.setattr(demo, "from_preset", short)
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert "predicting each patch's mean would give 1.0" in printed
    before, after = (float(word) for word in printed.rpartition("went from ")[2].partition(";")[0].split(" to "))
    assert before > 1.1 and after < 0.97
    for entry in find_videos(from_preset(PretrainConfig, "demo", output="o").held_out):
        name = entry.path.rpartition("/")[2].removesuffix(".mp4")
        assert (tmp_path / "demo" / "pictures" / f"{name}.gif").stat().st_size > 1000
        assert f"{name}.png" in printed
