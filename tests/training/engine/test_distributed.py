"""Several processes compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stmae.training.commands import pretrain
from stmae.training.config import PretrainConfig, parse
from stmae.training.engine.run_folder import RunFolder
from tests.support import two_processes
from tests.support.synthetic_video import write_video

ROOT = Path(__file__).parents[3]
TINY = """
clips: {stride: 2, repeats: 2}
model: {image_size: 32, num_frames: 4, patch_size: 8, width: 32, depth: 2, num_heads: 2, decoder_width: 32, decoder_depth: 1,
  decoder_num_heads: 1}
optimizer: {batch: 4, accumulate: 2, epochs: 10, warmup_epochs: 2, base_lr: 3.0e-3, base_batch: 4, clip_grad: 1.0}
run: {save_every: 2, log_every: 1, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""  # 5 videos: 7 steps

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def torchrun(arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stmae.training"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "pretrain", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_two_processes_give_the_losses_of_one(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in "abcd":
        write_video(tmp_path / "videos" / f"{name}.mp4", 30)
    (tmp_path / "videos" / "broken.mp4").write_text("not a video")
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path / "videos")]
    arguments += ["--held_out", str(tmp_path / "videos")]
    pretrain.run(parse(PretrainConfig, [*arguments, "--output", str(tmp_path / "one")], prog="p", description=""))

    done = torchrun([*arguments, "--output", str(tmp_path / "two")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, cpu" in done.stdout and "loss on held-out videos" in done.stdout
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 7 and one.keys() == two.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-3), step

    # One process continues what two began.
    folder = RunFolder(tmp_path / "two", read_only=True)
    before = load_file(folder.model_path)
    folder.state_path(folder.states()[0]).unlink()
    pretrain.run(parse(PretrainConfig, [*arguments, "--output", str(tmp_path / "two")], prog="p", description=""))
    after = load_file(folder.model_path)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-2, atol=1e-3)


def test_what_cannot_be_ends_all_processes(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 30)
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path / "videos"), "--output", str(tmp_path / "run")]
    done = torchrun([*arguments, "--optimizer.batch", "3"])
    assert done.returncode != 0
    assert "a batch of 3 videos does not divide into 2 micro-batches on 2 processes" in done.stderr


ABSENT = """
import sys, time, torch
from stmae.training.engine.distributed import Processes
processes = Processes(timeout=2.0)
with processes.process_group(torch.device("cpu")):
    for _ in range(4):
        assert processes.mean(float(processes.rank), device="cpu") == [0.5]
    if processes.rank == 1:
        time.sleep(60)
    try:
        processes.mean(0.0, device="cpu")
    except TimeoutError as error:
        print(error, flush=True)
        import os
        os._exit(3)
"""


def test_the_rank_that_does_not_come_is_named():
    port = str(two_processes.free_port())
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ABSENT], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
        )
        for rank in range(2)
    ]
    try:
        printed = processes[0].communicate(timeout=120)[0]
        assert processes[0].returncode == 3
        assert "rank 0 waited 2 s at the end of a step for rank 1 of 2, which did not come" in printed
    finally:
        for process in processes:
            process.kill()
            process.communicate()
