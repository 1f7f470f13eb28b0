"""`python -m bench.gpu`: what runs without a GPU, the limits of its parts, and the page that it writes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import report

ROOT = Path(__file__).parents[2]


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_reports_so_in_one_line(tmp_path):
    status, output, error = run("--output", str(tmp_path / "results"))
    assert status != 0 and not output
    assert len(error.splitlines()) == 1 and "finds no GPU" in error
    assert not (tmp_path / "results").exists()


def test_kernels_and_steps_run_on_a_cpu(tmp_path):
    """The same code at tiny sizes; the page's numbers are those of the files."""
    status, output, error = run("--device", "cpu", "--output", str(tmp_path), "--parts", "kernels,steps")
    assert status == 0, output + error + (tmp_path / "log.txt").read_text()
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert set(kernels["decoder attention"]["seconds"]) >= {"ours", "flash"}
    assert len(kernels) == 17 and not any("error" in result for result in kernels.values())
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [step["side"] for step in steps][:3] == ["ours", "reference", "tuned"]
    # The same weights, clips and masks: the losses after the same number of steps agree to bfloat16's precision.
    assert steps[1]["loss"] == pytest.approx(steps[0]["loss"], rel=2e-2)
    assert steps[2]["loss"] == pytest.approx(steps[0]["loss"], rel=2e-2)
    page = (tmp_path / "report.md").read_text()
    assert f"| {steps[0]['ms']:.1f} (" in page and "| kernels | ok |" in page
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    limit = 10
    assert command.Run(tmp_path, "cpu").call([sys.executable, "-c", parent], limit) == f"stopped after {limit} s"
    if pid.exists():  # on a very busy machine it may not have come so far
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_command_that_has_no_time_left_is_not_started(tmp_path):
    marker = tmp_path / "started"
    outcome = command.Run(tmp_path, "cpu", seconds=1).call([sys.executable, "-c", f"open({str(marker)!r}, 'w')"], 60)
    assert outcome == "not started: no time left" and not marker.exists()


def test_memcheck_runs_tests_that_there_are():
    """What it selects by name; each kernel that reads ids or rows is among it."""
    done = subprocess.run([*command.MEMCHECK, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    tests = ["ids_out_of_range", "masked_patchify[channels-last]", "patch_loss[channels-last]"]
    tests += ["attention_qkvpacked[bfloat16-1-157", "attention_qkvpacked[bfloat16-1-77"]
    for name in (*tests, "add_layer_norm_strided", "restore_tokens_strided"):
        assert f"test_{name}" in done.stdout, done.stdout + done.stderr


def test_what_cannot_run_is_an_outcome(tmp_path):
    run = command.Run(tmp_path, "cpu")
    assert run.call([sys.executable, "-c", "raise SystemExit(3)"], 60) == "exit status 3"
    assert "No such file" in run.call(["no-such-program"], 60)


def test_the_page_shows_ncus_metrics_by_launch():
    table = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_forward(float*)","Details","Duration","us","12.5"\n'
        '"0","_forward(float*)","Details","Achieved Occupancy","%","48.1"\n'
        '"1","_loss","Details","Registers Per Thread","register/thread","64"\n'
    )
    assert report.ncu(table)[-2:] == ["| `_forward` | 12.5 us |  | 48.1 |  |  |  |", "| `_loss` |  | 64 |  |  |  |  |"]


def test_the_page_names_failed_tests():
    text = "....\nFAILED tests/x.py::test_y[3] - assert 1\n1 failed, 4 passed in 3.21s\n"
    expected = ["## Tests", "", "- 1 failed, 4 passed in 3.21s", "- `FAILED tests/x.py::test_y[3] - assert 1`"]
    assert report.tests(text) == expected
    checked = text + "========= Invalid __global__ read of size 4 bytes\n" * 2 + "========= ERROR SUMMARY: 2 errors\n"
    found = ["- compute-sanitizer: Invalid __global__ read of size 4 bytes", "- compute-sanitizer: ERROR SUMMARY: 2 errors"]
    assert report.tests(checked) == [*expected, *found]
