"""The study of stills: with synthetic pictures, in seconds."""

import gzip
import json
import struct

import pytest
import torch

from studies.motion import clips
from studies.motion.schedule import run
from studies.stills import experiments, page
from studies.stills.experiments import Plan, Study

TINY = Plan(
    unlabelled=32,
    test=20,
    width=32,
    depth=1,
    num_heads=2,
    decoder_width=16,
    pretrain_steps=2,
    pretrain_batch=16,
    finetune_labels=(40,),
    finetune_batch=8,
    finetune_lrs=(1e-3,),
    finetune_steps=(2,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Idx files of pictures that are their label times 20 everywhere, the test's one brighter."""
    path = tmp_path_factory.mktemp("pictures")
    for part, count, more in (("train", 200, 0), ("t10k", 60, 1)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        pictures = (20 * labels + more)[:, None].expand(-1, 784).contiguous()
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (path / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.numpy().tobytes())
        data = struct.pack(">2I", 0x801, count) + labels.numpy().tobytes()
        (path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))
    return path


def test_labels_are_read_from_idx_files(folder):
    train, test = clips.load_labels(folder)
    assert train.tolist() == [number % 10 for number in range(200)] and len(test) == 60 and train.dtype == torch.int64


@pytest.mark.parametrize("data", [b"", struct.pack(">2I", 0x803, 1) + b"0", struct.pack(">2I", 0x801, 2) + b"0"])
def test_damaged_labels_are_refused(data, tmp_path):
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match="expected an idx file of bytes, got the header"):
        clips.load_labels(tmp_path)


def test_stills_show_their_class_and_the_parts_have_pictures_of_their_own(folder):
    study = Study(str(folder), TINY, "")
    for part, count, more in (("train", 40, 0), ("test", 20, 1)):
        pictures, labels = experiments.stills(study, part, count, 0)
        assert pictures.shape == (count, 32, 32, 3) and labels.tolist() == [number % 10 for number in range(count)]
        black, inside = pictures[:, 0, 0].double(), pictures[:, 16, 16].double()
        shade = (20.0 * labels[:, None] + more) / 255
        lit = labels > 4  # where rounding tells little about the white
        white = (black + (inside - black) / shade.clamp(min=1e-9))[lit]
        assert white.min() > 255 * 0.35 - 4 and white.max() < 255 + 4 and black.max() <= 0.25 * 255 + 1
    again, _ = experiments.stills(study, "train", 40, 0)
    other, _ = experiments.stills(study, "train", 40, 1)
    first, _ = experiments.stills(study, "train", 40, 0)
    assert torch.equal(again, first) and not torch.equal(again, other)


def test_the_study_runs_and_writes_its_page(folder, tmp_path):
    study = Study(str(folder), TINY, str(tmp_path / "work"))
    planned = experiments.all_experiments(TINY, [0])
    assert len({experiment.name for experiment in planned}) == len(planned) == 5
    records = run(study, planned, 1)
    assert set(records) == {experiment.name for experiment in planned}
    page.write(tmp_path / "docs", TINY, [0], records)
    found = json.loads((tmp_path / "docs" / "results-stills.json").read_text())["experiments"]
    assert found["tune-40-scratch"]["held_out"] == 10
    ours = found["finetune-40-pretrained-seed0"]["accuracy"]
    assert f"| 40 | {100 * ours:.1f} |" in (tmp_path / "docs" / "results-stills.md").read_text()
