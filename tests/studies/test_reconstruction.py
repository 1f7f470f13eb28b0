"""The study that draws the README's picture: its clips, its picture, its numbers; the run itself takes half an hour."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stmae.models import MaskedAutoencoder
from stmae.training.data.video_list import find_videos
from studies import reconstruction
from studies.reconstruction import ASSETS, FRAMES, MODEL, SIZE, TARGETS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (500, 400), colour)
        picture.paste("white", (200, 100, 300, 300))
        picture.save(folder / f"{number}.jpg")
    return reconstruction.load_photographs([folder])


def test_photographs_are_scaled_to_one_shorter_side(photographs, tmp_path):
    assert [tuple(photograph.shape) for photograph in photographs] == [(3, 320, 400)] * 2
    with pytest.raises(ValueError, match="photos: expected at least two"):
        reconstruction.load_photographs([tmp_path])


def test_videos_are_a_function_of_the_photographs_and_are_read_back(photographs, tmp_path):
    lists = [reconstruction.make_videos(photographs, tmp_path / name, 1) for name in "ab"]
    entries = find_videos(lists[0])
    shipped = sum(not line.startswith("#") for line in (ASSETS / "train.txt").read_text().splitlines())
    assert len(entries) == 2 + reconstruction.SHIPPED * shipped
    assert all(Path(entry.path).is_file() for entry in entries)
    first, second = (path.with_name("00-00.mp4").read_bytes() for path in lists)
    assert first == second
    clip = reconstruction.make_clip(photographs[0], photographs[1], torch.Generator().manual_seed(3))
    assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == torch.uint8 and not clip[0].equal(clip[-1])


def test_the_second_run_goes_on_from_the_first_for_a_fifth_of_its_steps(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{ASSETS / 'bunny_1.mp4'}\n" for _ in range(40)))
    first, second = (reconstruction.config(target, tmp_path / "list.txt", tmp_path, 300) for target in TARGETS)
    assert first.init == str(reconstruction.start(tmp_path)) and second.init == first.output and first.model.target == "pixels"
    assert second.model == first.model.replace(target="normalized_pixels")
    for settings, steps in ((first, 300), (second, 60)):
        assert settings.optimizer.epochs / settings.clips.repeats * 40 / settings.optimizer.batch == pytest.approx(steps)


@pytest.fixture(scope="module")
def evaluated():
    torch.manual_seed(0)
    models = {target: MaskedAutoencoder(MODEL.replace(target=target, depth=1, decoder_depth=1)).eval() for target in TARGETS}
    return reconstruction.evaluate(models, find_videos(str(ASSETS / "held_out.txt")))


def test_a_picture_has_a_row_for_each_label_and_none_is_cut(evaluated):
    _, shown = evaluated
    assert [name for name, _ in shown] == ["bunny_5", "city_2"]
    assert all(set(rows) == set(reconstruction.labels()) for _, rows in shown)
    sheet = np.array(reconstruction.picture(shown))
    block, rows = 4 * 100 - 4, len(reconstruction.labels())
    assert sheet.shape == (rows * 120, 2 * block + 24 + 8, 3)
    assert (sheet[:, -4:] == 255).all() and (sheet[:, :4] == 255).all()  # nothing touches the edges
    assert (sheet[20:116, 4:100] == shown[0][1]["original"][0]).all()
    with pytest.raises(ValueError, match="labels: expected them to be at most"):
        reconstruction.picture(shown, columns=2)


def test_an_animation_has_every_frame(evaluated, tmp_path):
    reconstruction.animate(evaluated[1], tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as gif:
        assert gif.n_frames == len(MODEL.frames) and gif.size == (404, 204)


def test_visible_patches_are_the_original_s_in_every_row(evaluated):
    for _, rows in evaluated[1]:
        seen = (rows["masked"] == rows["original"]).all(-1)
        assert 0.05 < seen.mean() < 0.2
        for target in TARGETS:
            assert (rows[target][seen] == rows["original"][seen]).all()


def test_an_untrained_model_is_no_better_than_grey(evaluated):
    for numbers in evaluated[0].values():
        assert math.isfinite(numbers["loss"]) and 0 < numbers["psnr"] < 20


def test_the_docs_give_what_was_recorded():
    recorded, page = json.loads((DOCS / "longer-run.json").read_text()), (DOCS / "longer-run.md").read_text()
    for row in reconstruction.table_rows(recorded):
        assert f"| {' | '.join(row)} |" in page, row
    assert recorded["processor"] in page and recorded["date"] in page
    assert recorded["model"] == json.loads(json.dumps(MODEL.to_dict()))
