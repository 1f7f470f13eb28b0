"""Runs that 0.1.0 began: tests/golden/run_0_1_0 holds two in mid-run, and the weights that 0.1.0 ended with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stmae.training
from stmae.training import FinetuneConfig, PretrainConfig, finetune, pretrain
from stmae.training.config import parse

GOLDEN = Path(__file__).parents[2] / "golden" / "run_0_1_0"
ASSETS = Path(stmae.training.__file__).parent / "assets"
RUNS = pytest.mark.parametrize(
    "name, config_class, run", [("pretrain", PretrainConfig, pretrain), ("finetune", FinetuneConfig, finetune)]
)


def continued(name, config_class, tmp_path):
    """The settings of the copied run, its paths those of this machine."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    text = (folder / "config.yaml").read_text()
    places = {
        "DATA": ASSETS,
        "OUTPUT": folder,
        "LABELS": GOLDEN / "labelled.txt",
        "CHECKPOINT": GOLDEN / "pretrain" / "expected.safetensors",
    }
    for placeholder, path in places.items():
        text = text.replace(f": {placeholder}", f": {path}")
    (folder / "config.yaml").write_text(text)
    return parse(config_class, ["--config", str(folder / "config.yaml")], prog="stmae", description="")


@pytest.mark.parametrize(
    "name, config_class, run", [("pretrain", PretrainConfig, pretrain), ("finetune", FinetuneConfig, finetune)]
)
def test_a_run_of_0_1_0_continues(name, config_class, run, tmp_path):
    config = continued(name, config_class, tmp_path)
    folder = Path(config.output)
    (state_file,) = folder.glob("state-*.safetensors")
    step = int(state_file.stem.rpartition("-")[2])
    state = run(config)
    assert state.done and state.step > step and state.before and state.after
    before = load_file(state_file)
    prefix = "average." if any(key.startswith("average.") for key in before) else "model."
    after, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("qkv.bias"):  # the gradient of the keys' bias is zero but for rounding, which AdamW scales up
            continue
        change = (value - before[prefix + key]).norm()
        # On the processor that wrote them, the weights are the same bits; others round in another order.
        assert (after[key] - value).norm() <= 0.05 * change, key
    steps = [line["step"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == state.step


def test_a_setting_of_0_1_0_that_differs_is_named(tmp_path):
    config = continued("pretrain", PretrainConfig, tmp_path)
    config.optimizer.base_lr = 0.1
    with pytest.raises(stmae.training.RunFolderError, match=r"optimizer.base_lr 0.4 -> 0.1"):
        pretrain(config)


def process_state():
    import signal
    import warnings

    import torch._dynamo.config as dynamo

    return {
        "random": torch.get_rng_state().tolist(),
        "filters": list(warnings.filters),
        "dynamo": (dynamo.optimize_ddp, dynamo.recompile_limit),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize(
    "name, config_class, run", [("pretrain", PretrainConfig, pretrain), ("finetune", FinetuneConfig, finetune)]
)
def test_a_run_leaves_the_process_as_it_was(name, config_class, run, tmp_path):
    config = continued(name, config_class, tmp_path)
    config.run.workers = 1
    torch.manual_seed(11)
    before = process_state()
    assert run(config).done
    after = process_state()
    assert {key: value for key, value in after.items() if value != before[key]} == {}


def test_a_run_in_another_thread(tmp_path):
    """Where no signal can be handled."""
    from concurrent.futures import ThreadPoolExecutor

    config = continued("pretrain", PretrainConfig, tmp_path)
    config.run.workers = 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pretrain, config).result().done
