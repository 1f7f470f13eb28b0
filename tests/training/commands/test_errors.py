"""What a user types wrong is reported in one line, whatever the source: a settings file, an option, a command."""

import subprocess
import sys

import pytest

from stmae.training.cli import main
from stmae.training.commands.test import TestConfig
from stmae.training.config import PretrainConfig, parse
from tests.support.synthetic_video import write_video


def configured(tmp_path, text, *arguments):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return parse(PretrainConfig, ["--data=a", f"--output={tmp_path}", f"--config={file}", *arguments], prog="p", description="")


def refusal(capsys, function, *arguments):
    with pytest.raises(SystemExit) as ended:
        function(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_right_values_arrive_as_their_types(tmp_path):
    text = "optimizer: {base_lr: 1e-3, clip_grad: null, batch: '8'}\nclips: {scale: [0.2, 1]}\nmodel: {image_size: [32, 64]}\n"
    config = configured(tmp_path, text)
    assert (config.optimizer.base_lr, config.optimizer.clip_grad, config.optimizer.batch) == (1e-3, None, 8)
    assert config.clips.scale == (0.2, 1.0) and config.model.image_size == (32, 64)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\n", "line 2: expected the value itself, got an alias"),
        ("optimizer: {bach: 3}\n", "there is no setting 'optimizer.bach'; did you mean 'optimizer.batch'?"),
        ("batch: 3\n", "there is no setting 'batch'; did you mean 'optimizer.batch'?"),
        ("preset: dmo\n", "got 'dmo'; did you mean 'demo'?"),
        ("model: {depth: {x: 1}}\n", "model.depth: expected a value, got further settings"),
        ("optimizer: {batch: 2020-01-01}\n", "optimizer.batch: expected an integer, got 2020-01-01"),
        ("data: [1]\n", "data: expected text, got [1]"),
        ("[" * 5000, "cannot read the settings"),
        ("x\0y", "cannot read the settings"),
    ],
)
def test_what_is_wrong_with_a_file_is_a_line(tmp_path, capsys, text, words):
    printed = refusal(capsys, configured, tmp_path, text)
    assert words in printed and len(printed[printed.index("error:") :].strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--optimizer.bach=3"], "there is no option --optimizer.bach; did you mean 'optimizer.batch'?"),
        (["--batch", "3"], "there is no option --batch; did you mean 'optimizer.batch'?"),
        (["--preset", "dmo"], "did you mean 'demo'?"),
    ],
)
def test_the_nearest_option_is_named(tmp_path, capsys, arguments, words):
    assert words in refusal(capsys, configured, tmp_path, "", *arguments)


def test_the_nearest_command_is_named(capsys):
    assert main(["pretrian"]) == 2
    assert "there is no command 'pretrian'; did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_help_into_a_pipe_that_closes_is_no_traceback(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "stmae.training", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    printed = process.stderr.read()
    assert process.wait() != 1 and not printed, printed


def test_data_check_exits_as_it_found(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "broken.mp4").write_text("not a video")
    assert main(["data", "check", str(folder), "--workers", "0"]) == 1
    write_video(folder / "complete.mp4", 80)
    assert main(["data", "check", str(folder), "--workers", "0"]) == 0
    assert main(["data", "check", str(folder), "--workers", "0", "--strict", "true"]) == 1


def test_a_section_with_its_own_defaults_is_read_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("views: {temporal: 2}\n")
    arguments = ["--checkpoint=a", "--data=b", f"--config={tmp_path / 'mine.yaml'}"]
    views = parse(TestConfig, arguments, prog="p", description="").views
    assert (views.temporal, views.spatial) == (2, 3)
