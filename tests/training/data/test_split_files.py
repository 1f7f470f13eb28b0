"""UCF101 and HMDB51 as they are distributed: their folders and split files."""

import re

import pytest

from stmae.training.commands import data_check
from stmae.training.data.split_files import HMDB51_CLASSES
from stmae.training.data.video_list import Entry, class_numbers, find_labelled_videos, find_train_and_test, find_videos
from tests.support.synthetic_video import write_video

UCF_CLASSES = ("ApplyEyeMakeup", "Archery", "YoYo")


@pytest.fixture
def ucf(tmp_path):
    """UCF-101/ and ucfTrainTestlist/ with three classes: a training and a test video each; lines end as the originals'."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for name in UCF_CLASSES:
        (tmp_path / "UCF-101" / name).mkdir(parents=True)
        for group in ("08", "01"):
            (tmp_path / "UCF-101" / name / f"v_{name}_g{group}_c01.avi").touch()
    (lists / "classInd.txt").write_bytes(b"".join(b"%d %s\r\n" % (n, c.encode()) for n, c in enumerate(UCF_CLASSES, 1)))
    train = (f"{name}/v_{name}_g08_c01.avi {number}\r\n" for number, name in enumerate(UCF_CLASSES, 1))
    (lists / "trainlist01.txt").write_bytes("".join(train).encode())
    (lists / "testlist01.txt").write_bytes("".join(f"{c}/v_{c}_g01_c01.avi\r\n" for c in UCF_CLASSES).encode())
    return lists


def ucf_entries(folder, group):
    return [Entry(str(folder / c / f"v_{c}_g{group}_c01.avi"), label) for label, c in enumerate(UCF_CLASSES)]


def test_ucf101_counts_from_one_and_this_from_zero(ucf):
    videos = ucf.parent / "UCF-101"
    assert find_labelled_videos(ucf / "trainlist01.txt") == ucf_entries(videos, "08")
    assert find_labelled_videos(ucf / "testlist01.txt") == ucf_entries(videos, "01")  # no labels: by classInd.txt
    assert find_videos(ucf / "testlist01.txt") == ucf_entries(videos, "01")
    assert find_train_and_test(ucf / "trainlist01.txt", ucf / "testlist01.txt")[1] == ucf_entries(videos, "01")
    assert class_numbers(ucf / "trainlist01.txt") is None


def test_ucf101_without_its_class_index(ucf, tmp_path):
    index = (ucf / "classInd.txt").rename(tmp_path / "index.txt")
    videos = tmp_path / "UCF-101"
    assert find_labelled_videos(ucf / "trainlist01.txt") == ucf_entries(videos, "08")
    with pytest.raises(ValueError, match=r"testlist01.txt, line 1: expected a label, got none.*--data_labels"):
        find_labelled_videos(ucf / "testlist01.txt")
    assert [entry.label for entry in find_videos(ucf / "testlist01.txt")] == [-1, -1, -1]  # to pre-train on
    assert find_labelled_videos(ucf / "testlist01.txt", labels=index) == ucf_entries(videos, "01")
    (tmp_path / "own.txt").write_text("YoYo\nArchery\nApplyEyeMakeup\n")  # numbers of one's own, from 0
    assert [entry.label for entry in find_labelled_videos(ucf / "trainlist01.txt", labels=tmp_path / "own.txt")] == [2, 1, 0]


def test_the_videos_may_lie_elsewhere(ucf, tmp_path):
    (tmp_path / "UCF-101").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"trainlist01.txt, line 1: .*Makeup_g08_c01.avi lies in none of .*--data_root"):
        find_labelled_videos(ucf / "trainlist01.txt")
    assert find_labelled_videos(ucf / "trainlist01.txt", root=tmp_path / "elsewhere") == ucf_entries(tmp_path / "elsewhere", "08")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("trainlist01.txt", "Archery/v_a.avi 2\nv_b.avi 2\n", r"line 2: expected UCF101's 'Class/video.avi'.*got 'v_b.avi 2'"),
        ("trainlist02.txt", "Archery/v_a.avi 0\n", r"trainlist02.txt, line 1: expected .* label of 1 or more"),
        ("trainlist03.txt", "Archery/v_a.avi 2\n\nArchery/v_b.avi 3\n", r"line 3: expected label 2 for the class Archery.*got 3"),
        ("trainlist01.txt", "Archery/v_a.avi 3\n", r"line 1: expected label 2, as .*classInd.txt says, got 3"),
        ("testlist02.txt", "Archery/v_a.avi\nSkiing/v_b.avi\n", r"line 2: .*classInd.txt has no number for the class Skiing"),
        ("trainlist01.txt", "Archery/v_a.avi two\n", r"line 1: expected UCF101's"),
        ("testlist01.txt", "\n", r"testlist01.txt names no videos"),
        ("classInd.txt", "1 ApplyEyeMakeup\n2 Archery\n2 YoYo\n", r"classInd.txt, line 3: expected every class and every number"),
        ("classInd.txt", "1 ApplyEyeMakeup\nArchery\n", r"classInd.txt, line 2: expected 'number class'"),
        ("classInd.txt", "ApplyEyeMakeup\n", r"classInd.txt: expected a line 'number class' for each class"),
    ],
)
def test_a_wrong_ucf101_file_is_named_with_its_line(name, text, message, ucf):
    (ucf / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_labelled_videos(ucf / (name if "list" in name else "trainlist01.txt"))


@pytest.fixture(scope="module")
def hmdb(tmp_path_factory):
    """hmdb51_org/ and splits/ with 51 classes: a training, a test and an unused video each."""
    folder = tmp_path_factory.mktemp("hmdb")
    (folder / "splits").mkdir()
    for number in range(HMDB51_CLASSES):
        name = f"class_{number:02d}"
        (folder / "hmdb51_org" / name).mkdir(parents=True)
        lines = []
        for use in (2, 1, 0):
            video = f"April_09_#{name}_{use};u.avi"
            (folder / "hmdb51_org" / name / video).touch()
            lines.append(f"{video} {use} \n")
        (folder / "splits" / f"{name}_test_split1.txt").write_text("".join(lines))
    return folder


def hmdb_entries(folder, use):
    names = [f"class_{number:02d}" for number in range(HMDB51_CLASSES)]
    return [Entry(str(folder / name / f"April_09_#{name}_{use};u.avi"), label) for label, name in enumerate(names)]


def test_hmdb51_is_named_with_a_star_and_the_part(hmdb):
    train, test = (hmdb / "splits" / f"*_test_split1.txt:{part}" for part in ("train", "test"))
    assert find_train_and_test(train, test) == (hmdb_entries(hmdb / "hmdb51_org", 1), hmdb_entries(hmdb / "hmdb51_org", 2))
    assert find_videos(train, root=hmdb) == hmdb_entries(hmdb, 1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("*_test_split1.txt", r"expected all of HMDB51's classes and a part, '.*:train' or ':test'$"),
        ("*_test_split1.txt:val", r"expected all of HMDB51's classes and a part"),
        ("class_00_test_split1.txt", r"'.*\*_test_split1.txt:train' or ':test'; this is the file of one class"),
        ("*_test_split2.txt:train", r"expected 51 files, a class each, got 0"),
    ],
)
def test_what_names_no_part_of_hmdb51_is_refused(name, message, hmdb):
    with pytest.raises(ValueError, match=message):
        find_labelled_videos(hmdb / "splits" / name)


@pytest.mark.parametrize("line", ["a.avi 3", "a.avi", "1", "sub/a.avi 1", "a b.avi 1"])
def test_a_wrong_hmdb51_line_is_named(line, hmdb, tmp_path):
    for file in (hmdb / "splits").iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "class_07_test_split1.txt").write_text(f"ok.avi 1\n{line}\n")
    message = rf"class_07_test_split1.txt, line 2: expected HMDB51's 'video.avi 0'.*got {re.escape(repr(line))}"
    with pytest.raises(ValueError, match=message):
        find_labelled_videos(tmp_path / "*_test_split1.txt:train", root=hmdb)


def test_a_part_of_the_classes_needs_their_numbers(hmdb, tmp_path):
    for name in ("class_03", "class_05"):
        file = f"{name}_test_split1.txt"
        (tmp_path / file).write_text((hmdb / "splits" / file).read_text())
    source = tmp_path / "*_test_split1.txt:test"
    with pytest.raises(ValueError, match=r"expected 51 files, a class each, got 2 .*--data_labels"):
        find_labelled_videos(source, root=hmdb / "hmdb51_org")
    (tmp_path / "classes.txt").write_text("class_05\nclass_03\n")
    found = find_labelled_videos(source, root=hmdb / "hmdb51_org", labels=tmp_path / "classes.txt")
    assert [entry.label for entry in found] == [1, 0]
    (tmp_path / "classes.txt").write_text("class_05\n")
    with pytest.raises(ValueError, match=r"class_03_test_split1.txt, line 1: the class 'class_03' has no number among 1"):
        find_labelled_videos(source, root=hmdb / "hmdb51_org", labels=tmp_path / "classes.txt")


def test_a_list_of_ones_own_keeps_its_name(tmp_path):
    (tmp_path / "my_test_split1.txt").write_text("a.mp4 7\n")
    assert find_labelled_videos(tmp_path / "my_test_split1.txt") == [Entry(str(tmp_path / "a.mp4"), 7)]


def test_the_videos_are_read(ucf, tmp_path, capsys):
    for file in (tmp_path / "UCF-101").rglob("*.avi"):
        write_video(file, frames=8, codec="mpeg4")
    config = data_check.CheckConfig(data=str(ucf / "trainlist01.txt"), frames=2, stride=2, workers=0)
    good, errors = data_check.run(config)
    assert (len(good), errors) == (3, []) and "3 classes, 1 to 1 videos each" in capsys.readouterr().out
