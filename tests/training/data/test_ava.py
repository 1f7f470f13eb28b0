"""AVA's files, the clips around annotated frames, and an action detector trained on them."""

import contextlib
import json

import numpy as np
import pytest
import torch

from stmae import checkpoint
from stmae.models import ActionDetector, MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training import cli
from stmae.training.config import BoxClipConfig
from stmae.training.data import ava
from stmae.training.data.transforms import resized_crop
from stmae.training.data.video import VideoError
from stmae.training.tasks.detection import detection_loss
from tests.support.synthetic_video import read_number, write_video

TRAIN = """a,2,0.1,0.2,0.5,0.9,2,7
a,2,0.1,0.2,0.5,0.9,1,7
a,2,0.6,0.2,0.9,0.9,3,8
b,3,0.000,0.000,1.000,1.000,3,1
a,3,0.1,0.2,0.5,0.9,1,7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos of four seconds at 15 frames a second, and their annotations."""
    path = tmp_path_factory.mktemp("ava")
    (path / "videos").mkdir()
    for name in ("a.mp4", "b.mkv"):
        write_video(path / "videos" / name, frames=60, rate=15)
    (path / "train.csv").write_text(TRAIN)
    (path / "persons.csv").write_text(
        "a,0002,0.11,0.2,0.5,0.9,,0.99\na,0002,0.6,0.2,0.9,0.9,,0.7\na,2,0,0,0.1,0.1,,0.4\nb,3.0,0,0,1,1,,0.95\nb,9,0,0,1,1,,0.9\n"
    )
    return path


def test_lines_of_one_box_are_its_actions(folder):
    first, second, third = ava.read_annotations(folder / "train.csv", folder / "videos", 3)
    assert first.path == str(folder / "videos" / "a.mp4") and second.path == str(folder / "videos" / "b.mkv")
    assert (first.name, first.second, third.second) == ("a", 2, 3)
    assert first.actions == ((1, 0), (2,)) and second.actions == ((2,),)
    np.testing.assert_array_equal(first.boxes, np.float32([[0.1, 0.2, 0.5, 0.9], [0.6, 0.2, 0.9, 0.9]]))
    assert ava.count_key_frames(folder / "train.csv") == 3


def test_detected_persons_count_from_a_score_on(folder):
    frames = ava.read_detections(folder / "persons.csv", folder / "videos", 0.7)
    assert [(frame.name, frame.second, len(frame.boxes)) for frame in frames] == [("a", 2, 2), ("b", 3, 1), ("b", 9, 1)]
    np.testing.assert_allclose(frames[0].scores, [0.99, 0.7], rtol=1e-6)
    with pytest.raises(ValueError, match="persons.csv: no box has a score of 1 or more"):
        ava.read_detections(folder / "persons.csv", folder / "videos", 1.0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("a,2,0.1,0.2,0.5,0.9,1", "expected 8 columns .* got 7"),
        ("a,2,0.1,0.2,0.5,1.9,1,7", "expected a box .* from 0 to 1"),
        ("a,2,0.6,0.2,0.5,0.9,1,7", "expected a box"),
        ("a,2,nan,0.2,0.5,0.9,1,7", "expected a box"),
        ("a,2,x,0.2,0.5,0.9,1,7", "expected a box"),
        ("a,2.5,0.1,0.2,0.5,0.9,1,7", "expected a whole number .* as second, got '2.5'"),
        ("a,2,0.1,0.2,0.5,0.9,0,7", "expected a whole number from 1 to 3 as action, got '0'"),
        ("a,2,0.1,0.2,0.5,0.9,4,7", "expected a whole number from 1 to 3 as action, got '4'"),
        (",2,0.1,0.2,0.5,0.9,1,7", "expected a video's name"),
    ],
)
def test_a_wrong_line_is_named(line, message, folder, tmp_path):
    (tmp_path / "wrong.csv").write_text(f"{TRAIN.splitlines()[0]}\n{line}\n")
    with pytest.raises(ValueError, match=f"wrong.csv, line 2: {message}"):
        ava.read_annotations(tmp_path / "wrong.csv", folder / "videos", 3)


def test_other_wrong_files_are_named(folder, tmp_path):
    (tmp_path / "score.csv").write_text("a,2,0.1,0.2,0.5,0.9,,1.5\n")
    with pytest.raises(ValueError, match="score.csv, line 1: expected a score from 0 to 1 in the last column, got '1.5'"):
        ava.read_detections(tmp_path / "score.csv", folder / "videos", 0.5)
    with pytest.raises(ValueError, match=r"data_root: none of the videos of .*train.csv \(a, ...\) lies in"):
        ava.read_annotations(folder / "train.csv", tmp_path, 3)
    with pytest.raises(ValueError, match="nowhere.csv: cannot be read"):
        ava.read_annotations(folder / "nowhere.csv", folder, 3)
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(ValueError, match="empty.csv names no frames"):
        ava.read_annotations(tmp_path / "empty.csv", folder, 3)
    (tmp_path / "excluded.csv").write_text("a,2\nb\n")
    with pytest.raises(ValueError, match="excluded.csv, line 2: expected 'video,second', got 'b'"):
        ava.read_excluded(tmp_path / "excluded.csv")
    (tmp_path / "classes.pbtxt").write_text("nothing\n")
    with pytest.raises(ValueError, match="expected a label map"):
        ava.read_classes(tmp_path / "classes.pbtxt")


def test_a_label_map_of_either_form(tmp_path):
    (tmp_path / "new.pbtxt").write_text(
        'item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem {\n  name: "fly"\n  id: 5\n}\n'
    )
    (tmp_path / "old.pbtxt").write_text('label {\n  name: "run id: x"\n  label_id: 10\n  label_type: PERSON_MOVEMENT\n}\n')
    assert ava.read_classes(tmp_path / "new.pbtxt") == [0, 4] and ava.read_classes(tmp_path / "old.pbtxt") == [9]


def test_a_clip_lies_around_its_second():
    """SlowFast: frames center - 32, center - 28, ..., center + 28 at 30 a second."""
    np.testing.assert_allclose(ava.clip_times(902, 16, 4, 30.0) * 30, 902 * 30 + np.arange(-32, 32, 4), rtol=1e-12)


def numbers_of(clip):
    return [read_number(frame) for frame in clip.numpy()]


def test_frames_are_those_shown_at_the_times(folder):
    frames = ava.read_annotations(folder / "train.csv", folder / "videos", 3)
    clips = BoxClipConfig(stride=4, fps=30.0)
    # 15 frames a second: second 2 is frame 30, every fourth of 30 a second is every second one.
    item = ava.BoxViews(frames, clips, frames=4, size=(64, 96))[0]
    assert numbers_of(item["clips"][0]) == [26, 28, 30, 32] and item["boxes"].shape == (2, 4)
    later = ava.BoxViews(frames, BoxClipConfig(stride=4, start_second=2.0), frames=4, size=(64, 96))[0]
    assert numbers_of(later["clips"][0]) == [0, 0, 0, 2]  # before the start, the first frame
    with pytest.raises(VideoError, match="its 4 seconds do not reach to the second 30"):
        ava.BoxViews([frames[0]._replace(second=30)], clips, frames=4, size=(64, 96))[0]
    with pytest.raises(VideoError, match="do not reach to the second -1"):
        ava.BoxViews(frames, BoxClipConfig(start_second=3.0), frames=4, size=(64, 96))[0]


def test_boxes_follow_the_crop_and_the_mirror():
    boxes = np.float32([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 0.1]])
    cut = ava.to_crop(boxes, (50, 100, 50, 100), 100, 200)  # the lower right quarter
    np.testing.assert_allclose(cut, [[0, 0, 0.5, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(ava.to_crop(boxes, (50, 100, 50, 100), 100, 200, mirrored=True), [[0.5, 0, 1, 1], [1, 0, 1, 0]])


def test_a_marked_box_is_where_the_augmented_box_says(folder, monkeypatch):
    """A white rectangle in every frame, cropped and mirrored: its edges are the box's, to a pixel."""
    frame = ava.KeyFrame("", "a", 2, np.float32([[0.25, 0.25, 0.5, 0.75]]), ((0,),), np.ones(1, np.float32))
    pixels = np.zeros((2, 160, 200, 3), np.uint8)
    pixels[:, 40:120, 50:100] = 255
    pixels[:, 40:120, 75:100, 1] = 0  # its right half has no green

    class Opened(contextlib.nullcontext):
        times = np.arange(60) / 15

        def clips(self, wanted, crops, out):
            (crop,) = crops(160, 200)
            clip = resized_crop(pixels, crop.box, crop.size)
            out[0] = clip.flip(2) if crop.flip else clip

    opened = Opened()
    monkeypatch.setattr(ava, "open_entry", lambda *arguments: contextlib.nullcontext(opened))
    data = ava.BoxClips([frame], BoxClipConfig(crop_pct=(0.6, 0.9)), frames=2, size=(96, 96), seed=0, num_classes=2)
    mirrored = set()
    for epoch in range(12):
        item = data[epoch, 0]
        white = (item["clips"][0, 0, :, :, 0] > 127).nonzero()
        x1, y1, x2, y2 = (96 * item["boxes"][0, 0]).tolist()
        np.testing.assert_allclose([x1, y1, x2, y2], [*white.amin(0).flip(0), *(white.amax(0).flip(0) + 1)], atol=1.01)
        assert item["actions"].tolist() == [[[1, 0]]] and item["valid"].tolist() == [[True]] and item["skipped"] == []
        middle = item["clips"][0, 0, int((y1 + y2) / 2), :, 1]
        mirrored.add(bool(middle[int(x1) + 3] < 128))
    assert mirrored == {True, False}
    assert torch.equal(data[3, 0]["clips"], data[3, 0]["clips"])


def test_the_loss_counts_valid_boxes_alone(folder):
    frames = ava.read_annotations(folder / "train.csv", folder / "videos", 3)
    data = ava.BoxClips(frames, BoxClipConfig(stride=2), frames=4, size=(32, 32), seed=0, num_classes=3)
    batch = {name: torch.cat([data[0, 0][name], data[0, 1][name]]) for name in data.layout}
    assert batch["clips"].shape == (2, 4, 32, 32, 3) and batch["boxes"].shape == (2, 2, 4)
    batch["valid"] = torch.tensor([[True, False], [True, False]])
    seen = {}

    def forward(video, boxes, clip):
        seen.update(boxes=boxes, clip=clip)
        return torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]], requires_grad=True)[: len(boxes)]

    logits = np.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    wanted = batch["actions"][:, 0].numpy()
    probability = 1 / (1 + np.exp(-logits))
    expected = -(wanted * np.log(probability) + (1 - wanted) * np.log(1 - probability)).mean()
    assert detection_loss(forward, batch, 0.0).item() == pytest.approx(expected, rel=1e-6)
    assert seen["clip"].tolist() == [0, 1] and torch.equal(seen["boxes"], batch["boxes"][:, 0])
    batch["valid"][:] = False
    assert detection_loss(forward, batch, 0.0).item() == 0.0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "model.safetensors"
    torch.manual_seed(0)
    sizes = {"image_size": 32, "num_frames": 4, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
    checkpoint.save(
        MaskedAutoencoder(MaskedAutoencoderConfig(**sizes, decoder_width=32, decoder_depth=1, decoder_num_heads=1)), path
    )
    return path


def test_a_detector_learns_what_is_done_where(pretrained, tmp_path, capsys):
    """Action 1 is in the bright half of a frame, 2 in the dark one: only the box says which. By the preset, at small size."""
    root, lines = tmp_path / "videos", []
    root.mkdir()
    for number in range(4):
        write_halves(root / f"v{number}.mp4", bright_left=number % 2 == 0)
        for second in (0, 1):
            left, right = (1, 2) if number % 2 == 0 else (2, 1)
            lines += [f"v{number},{second},0.0,0.0,0.45,1.0,{left},0", f"v{number},{second},0.55,0.0,1.0,1.0,{right},1"]
    annotations = tmp_path / "train.csv"
    annotations.write_text("\n".join(lines) + "\n")
    persons = tmp_path / "persons.csv"
    persons.write_text("".join(",".join([*line.split(",")[:6], "", "0.9"]) + "\n" for line in lines))
    argv = ["--preset", "paper-large-finetune-ava", "--data", str(annotations), "--test_data", str(annotations)]
    argv += ["--data_root", str(root), "--checkpoint", str(pretrained), "--output", str(tmp_path / "run"), "--clips.stride", "1"]
    argv += [
        "--optimizer.batch",
        "4",
        "--optimizer.epochs",
        "10",
        "--optimizer.warmup_epochs",
        "2",
        "--optimizer.base_lr",
        "0.3",
        "--model.num_classes",
        "3",
        "--run.device",
        "cpu",
    ]
    argv += ["--run.workers", "0", "--run.tensorboard", "false", "--clips.crop_pct", "[0.9,1.0]", "--test_boxes", str(persons)]
    assert cli.main(["finetune", "detector", *argv]) == 0
    assert "detected boxes" in capsys.readouterr().out
    assert isinstance(checkpoint.load(tmp_path / "run" / "model.safetensors"), ActionDetector)
    command = ["test", "detector", "--checkpoint", str(tmp_path / "run"), "--data", str(annotations), "--data_root", str(root)]
    assert cli.main([*command, "--clips.stride", "1", "--output", str(tmp_path / "out.json")]) == 0
    assert "8 frames (0 left out)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["average_precision"] == {"1": 1.0, "2": 1.0} and found["mAP"] == 1.0
    (tmp_path / "excluded.csv").write_text("v0,0\n")
    (tmp_path / "classes.pbtxt").write_text("item {\n id: 2\n}\n")
    more = ["--excluded", str(tmp_path / "excluded.csv"), "--classes", str(tmp_path / "classes.pbtxt")]
    assert cli.main([*command, "--clips.stride", "1", *more]) == 0
    assert "7 frames (0 left out)" in (said := capsys.readouterr().out) and said.endswith("over 1 action\n")
    assert cli.main(["test", "--checkpoint", str(tmp_path / "run"), "--data", str(root)]) == 1
    assert "holds a ActionDetector, and a test needs a classifier" in capsys.readouterr().err


def write_halves(path, bright_left):
    """A video of two seconds, bright on one half and dark on the other."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 96, 64
        for number in range(20):
            frame = np.full((64, 96, 3), 30, np.uint8)
            frame[:, : 48 if bright_left else 96] = 30 if not bright_left else 220
            if not bright_left:
                frame[:, 48:] = 220
            frame[number % 60 : number % 60 + 4, :, 0] = 128  # something moves
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
