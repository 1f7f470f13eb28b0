"""The set in which only motion separates the classes, and the study made on it: with synthetic pictures, in seconds."""

import gzip
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stmae.training.evaluation import probes
from studies.motion import clips, experiments, page
from studies.motion.experiments import Experiment, Plan, Study
from studies.motion.schedule import load, run

TINY = Plan(
    unlabelled=64,
    train=32,
    test=40,
    width=32,
    depth=1,
    num_heads=2,
    decoder_width=16,
    pretrain_steps=4,
    pretrain_batch=16,
    evaluate_at=(0, 2, 4),
    ablation_steps=2,
    labels=(32,),
    finetune_labels=(32,),
    finetune_steps=(1, 2),
    finetune_lrs=(1e-3, 3e-3),
)


def blobs(count, seed):
    """uint8 [count, 28, 28]: smooth random pictures."""
    coarse = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, 28, mode="bicubic").clamp(0, 1)).to(torch.uint8)[:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with idx files of synthetic pictures, one of them gzipped."""
    path = tmp_path_factory.mktemp("pictures")
    for name, count in (("train-images-idx3-ubyte", 300), ("t10k-images-idx3-ubyte.gz", 100)):
        data = struct.pack(">4I", 0x803, count, 28, 28) + blobs(count, count).numpy().tobytes()
        (path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def paths_of(label, count=64):
    return clips.camera_paths(torch.full((count,), label), torch.Generator().manual_seed(label // 2))


def test_pictures_are_read_from_idx_files(folder):
    train, test = clips.load_pictures(folder)
    torch.testing.assert_close(train, blobs(300, 300), rtol=0, atol=0)
    torch.testing.assert_close(test, blobs(100, 100), rtol=0, atol=0)


def test_missing_pictures_say_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*--images"):
        clips.load_pictures(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", struct.pack(">4I", 0x803, 2, 28, 28) + bytes(784), struct.pack(">4I", 0x801, 1, 28, 28) + bytes(784)],
    ids=["empty", "cut short", "labels"],
)
def test_damaged_pictures_are_refused(tmp_path, data):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match="expected an idx file of 28x28 byte images"):
        clips.load_pictures(tmp_path)


def test_labels_are_balanced_in_every_beginning():
    part = clips.draw(blobs(50, 0), 80, 0)
    assert part.clips.shape == (80, 8, 32, 32, 3) and part.clips.dtype == torch.uint8
    assert part.video().shape == (80, 3, 8, 32, 32)
    for count in (8, 40, 80):
        assert torch.bincount(part.take(count).labels, minlength=8).tolist() == [count // 8] * 8


def test_a_set_is_a_function_of_its_seed():
    pictures = blobs(50, 0), blobs(50, 1)
    which = (("train", 0), ("train", 0), ("train", 1), ("unlabelled", 0))
    made = [clips.make_part(*pictures, name, 16, seed).clips for name, seed in which]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2]) and not torch.equal(made[0], made[3])
    # Neither does the number of clips rendered together change them.
    assert torch.equal(clips.draw(pictures[0], 16, 3, chunk=5).clips, clips.draw(pictures[0], 16, 3).clips)


@pytest.mark.parametrize("name", ["unlabelled", "train", "test"])
def test_test_clips_show_test_pictures_and_no_others(name):
    black, white = torch.zeros(4, 28, 28, dtype=torch.uint8), torch.full((4, 28, 28), 255, dtype=torch.uint8)
    part = clips.make_part(white, black, name, 64, 0)
    bounds = [255 * value for value in (clips.DARK[1], clips.LIGHT[1])] if name != "test" else [0, 255 * clips.LIGHT[0]]
    assert bounds[0] - 1 <= part.clips.int().min() and part.clips.int().max() <= bounds[1] + 1
    assert part.clips.float().std() > 5


@pytest.mark.parametrize("label", [0, 2, 4, 6], ids=lambda label: clips.CLASSES[label])
def test_a_clip_backwards_is_one_of_the_partner_class(label):
    forwards, backwards = paths_of(label), paths_of(label + 1)
    assert torch.equal(forwards.flip(1), backwards)
    canvases, colours = blobs(64 * 25, 0).view(64, 25, 28, 28), torch.rand(2, 64, 25, 3)
    assert torch.equal(clips.render(canvases, colours, forwards).flip(1), clips.render(canvases, colours, backwards))


@pytest.mark.parametrize("label", range(8), ids=lambda label: clips.CLASSES[label])
def test_the_camera_does_what_the_class_says(label):
    path = paths_of(label)
    middle = path.mean(1)
    x, y = (path[:, -1] - path[:, 0])[:, :2].unbind(-1)
    angle, scale = middle[:, 3], middle[:, 2].exp()
    right, down = (angle.cos() * x + angle.sin() * y) / scale, (angle.cos() * y - angle.sin() * x) / scale
    change = torch.stack([right, down, *(path[:, -1] - path[:, 0])[:, 2:].unbind(-1)], dim=1) / (7 * clips.SLOW)
    assert torch.equal(change.abs().argmax(1), torch.full((64,), label // 2))
    assert ((change[:, label // 2] > 0) == (label % 2 == 0)).all()


def test_views_follow_the_camera():
    canvas, colours = blobs(25, 3)[None], torch.rand(2, 1, 25, 3, generator=torch.Generator().manual_seed(0))
    poses = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, math.pi / 2], [0, 0, math.log(2), 0]])
    start, right, down, turned, wider = clips.render(canvas, colours, poses[None])[0].int()
    assert torch.equal(right[:, :-1], start[:, 1:])  # what is seen moves left
    assert torch.equal(down[:-1], start[1:])
    assert (torch.rot90(turned, -1, (0, 1)) - start).abs().max() <= 1  # what is seen turned the other way
    small = torch.nn.functional.avg_pool2d(start.permute(2, 0, 1)[None].float(), 2)[0].permute(1, 2, 0)
    assert (wider[8:24, 8:24] - small).abs().float().mean() < 4


def test_only_motion_tells_the_classes_apart():
    """Nearest neighbours on pixels see something in the clips, and nothing in their middle frames, whatever the class."""
    train, test = clips.draw(blobs(50, 0), 400, 0), clips.draw(blobs(50, 1), 400, 1)

    def accuracy(change):
        x, test_x = (change(part.clips, 0).flatten(1).float() for part in (train, test))
        return probes.knn(x, train.labels, test_x, test.labels, 8, 20)

    chance = 1 / 8 + 3 * math.sqrt(1 / 8 * 7 / 8 / 400)
    assert accuracy(experiments.repeat_middle_frame) < chance
    assert accuracy(lambda frames, seed: frames) > chance


def test_order_controls():
    frames = torch.arange(6 * 8).view(6, 8, 1, 1, 1).to(torch.uint8)
    shuffled = experiments.shuffle_frames(frames, 0)
    assert torch.equal(shuffled.sort(1).values, frames) and not torch.equal(shuffled, frames)
    assert len({tuple((clip - clip.min()).flatten().tolist()) for clip in shuffled}) > 1  # each in its own order
    assert torch.equal(experiments.repeat_middle_frame(frames, 0)[:, :, 0, 0, 0], frames[:, 4, 0, 0].expand(6, 8))


@pytest.mark.parametrize("features", [60, 10], ids=["more features than clips", "fewer"])
def test_linear_probe_is_the_training_package_s(features):
    generator = torch.Generator().manual_seed(0)
    y, test_y = torch.arange(40) % 3, torch.arange(300) % 3
    means = torch.randn(3, features, generator=generator)
    noise = 0.35 * math.sqrt(features)
    x, test_x = (means[labels] + noise * torch.randn(len(labels), features, generator=generator) for labels in (y, test_y))
    theirs = probes.linear(x, y, test_x, test_y, 3, 0)
    assert 0.45 < theirs < 0.98  # neither at chance nor saturated, where anything would agree
    assert abs(experiments.linear(x, y, test_x, test_y, 3, 0) - theirs) <= 2 / 300


def test_positions_start_as_distinct_waves_whatever_the_seed():
    positions = [experiments.autoencoder(Plan(), seed).encoder.position.of_patches() for seed in (0, 1)]
    assert torch.equal(*positions)
    distance = torch.cdist(positions[0], positions[0]) + 10 * torch.eye(64)
    assert distance.min() > 0.5


def test_experiments_come_after_what_they_need():
    planned = experiments.all_experiments(Plan(), [0, 1, 2])
    names = [experiment.name for experiment in planned]
    assert len(set(names)) == len(names) == 3 + 6 + 18 + 21
    for index, experiment in enumerate(planned):
        assert set(experiment.needs) <= set(names[:index])


class WithoutTest(Study):
    """A study that refuses to show its test clips."""

    def part(self, name, seed):
        assert name != "test"
        return super().part(name, seed)


def test_tuning_never_sees_the_test(folder, tmp_path):
    found = experiments.tune(WithoutTest(str(folder), TINY, str(tmp_path)), {}, labels=32, start="scratch", seed=0)
    assert found["held_out"] == 8 and len(found["grid"]) == 4
    best = max(found["grid"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
    assert (found["lr"], found["steps"]) == (best["lr"], best["steps"])


def test_an_interrupted_study_continues_to_the_same_page(folder, tmp_path):
    study = Study(str(folder), TINY, str(tmp_path / "work"))
    prefixes = ("main", "tune", "finetune", "mask-random-0.95")
    planned = [experiment for experiment in experiments.all_experiments(TINY, [0]) if experiment.name.startswith(prefixes)]
    records = run(study, planned, 1)
    assert set(records) == {experiment.name for experiment in planned}
    main = records["main-seed0"]["found"]
    assert set(main["knn_at_step"]) == {"0", "2", "4"} and set(main["probes"]["raw pixels"]) == {"32"}
    assert main["knn_at_step"]["4"] == main["probes"]["pre-trained"]["32"]["knn"]
    assert records["mask-random-0.95-seed0"]["found"]["visible"] == 3

    written = {path.name: path.stat().st_mtime_ns for path in Path(study.work).iterdir()}
    lost = [name for name in written if name.startswith("finetune") or name == "main-seed0.json"]
    for name in lost:
        (Path(study.work) / name).unlink()
    again = run(study, planned, 1)
    for name, record in records.items():
        assert again[name]["found"] == record["found"], name
    kept = {path.name for path in Path(study.work).iterdir() if path.stat().st_mtime_ns == written.get(path.name)}
    assert kept == set(written) - set(lost) - {"main-seed0.safetensors"}

    page.write(tmp_path / "docs", TINY, [0], planned, again, pictures=str(folder))
    assert json.loads((tmp_path / "docs" / "results.json").read_text())["experiments"]["main-seed0"] == main
    text = (tmp_path / "docs" / "results.md").read_text()
    assert f"{100 * main['probes']['pre-trained']['32']['linear']:.1f}" in text
    for picture in page.PICTURES:
        assert picture in text and (tmp_path / "docs" / picture).read_bytes().startswith(b"\x89PNG")


def test_an_experiment_of_another_plan_is_not_taken(tmp_path):
    experiment = Experiment("mask-random-0.5-seed0", "mask", {"strategy": "random", "ratio": 0.5, "seed": 0})
    study = Study("", TINY, str(tmp_path))
    (tmp_path / f"{experiment.name}.json").write_text(json.dumps({"plan": TINY.to_dict(), "arguments": experiment.arguments}))
    assert load(tmp_path, study, experiment)
    for change, still_valid in ({"width": 64}, False), ({"ablation_steps": 3}, False), ({"finetune_lrs": (1e-2,)}, True):
        assert bool(load(tmp_path, replace(study, plan=replace(TINY, **change)), experiment)) == still_valid, change
    assert load(tmp_path, study, replace(experiment, arguments={**experiment.arguments, "ratio": 0.6})) is None


@pytest.mark.parametrize(
    ("differences", "agreement"),
    [
        ([0.1, 0.2, 0.05], "yes"),
        ([-0.1, -0.2, -0.05], "**no**"),
        ([0.1, -0.1, 0.2], "**undecided**"),
        ([0.1, 0.0, 0.2], "**undecided**"),
        ([], "not run"),
    ],
)
def test_agreement_needs_every_seed(differences, agreement):
    assert page.agreement(differences) == agreement
