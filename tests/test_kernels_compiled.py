"""Every shipped configuration of the Triton kernels, compiled for GPUs that are not there: see tests/gpu/compile_report.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"
UPDATE = "python tests/gpu/compile_report.py --update"
PRODUCTS = ("masked_patchify", "grad_weight", "attention", "grad_q", "grad_kv")
# The most shared memory that one block may have, and what consumer cards of the sm_80 family (sm_86, sm_89) have at most.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CONSUMER = 99 * 1024


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The table as it is now, {"kernel | case | tiles | target": figures}, and what the command prints."""
    path = tmp_path_factory.mktemp("figures") / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, GPU / "compile_report.py", "--out", path], cwd=GPU.parents[1], env=environment, capture_output=True, text=True
    )
    assert path.exists(), run.stdout + run.stderr
    return json.loads(path.read_text()), run.stdout


def failing(report, holds, select=lambda kernel, case, tiles, target: True):
    """The keys and figures for which a property does not hold."""
    return [f"{key}: {value}" for key, value in report[0]["kernels"].items() if select(*key.split(" | ")) and not holds(key.split(" | "), value)]


def test_figures_are_those_checked_in(report):
    recorded = json.loads((GPU / "figures.json").read_text())
    assert report[0]["triton"] == recorded["triton"], f"figures.json is of triton {recorded['triton']}: look at the new one, then {UPDATE}"
    assert report[0]["kernels"] == recorded["kernels"], f"figures changed; if for the better, {UPDATE}\n{report[1]}"


def test_every_kernel_and_target_is_there(report):
    kernels = {(key.split(" | ")[0], key.split(" | ")[3]) for key in report[0]["kernels"]}
    names = {
        line.split("def ")[1].split("(")[0].lstrip("_")
        for file in (GPU.parents[1] / "kernels").glob("*.py")
        for before, line in zip(lines := file.read_text().splitlines(), lines[1:])
        if before == "@triton.jit"
    }
    helpers = {  # called by kernels
        "accumulate", "attend", "grad_kv_tile", "grad_q_tile", "head", "load", "load2", "load_patches", "patch_origins", "patch_values",
        "scores", "sort_keys", "store2", "target", "where",
    }  # fmt: skip
    assert kernels == {(name, target) for name in names - helpers for target in SHARED}


def test_nothing_spills(report):
    assert not failing(report, lambda key, x: x["spilled"] == 0)


def test_no_atomics(report):
    assert not failing(report, lambda key, x: x["atomics"] == 0)


def test_shared_memory_and_registers_leave_room(report):
    assert not failing(report, lambda key, x: x["shared"] <= SHARED[key[3]] and x["blocks_per_sm"] >= 1)
    assert not failing(report, lambda key, x: x["shared"] <= CONSUMER or not x["default"], lambda *key: key[3] == "sm_80")


def test_memory_bound_kernels_fill_a_multiprocessor(report):
    """Latency is hidden by warps in flight: at least a quarter of what a multiprocessor takes (64 warps, or 32 waves on gfx942)."""
    light = ("gather_rows", "inverse_ids", "restore_tokens", "restore_tokens_backward", "sum_rows", "grad_position", "patch_loss", "patch_loss_backward")
    holds = lambda key, x: x["blocks_per_sm"] * x["warps"] >= (8 if key[3] == "gfx942" else 16)  # noqa: E731
    assert not failing(report, holds, lambda *key: key[0] in light)


def test_products_run_on_tensor_cores(report):
    """Of the generation: warp-group instructions on sm_90 and tensor memory on sm_100 wherever a tile has the 64 rows they take."""

    def holds(key, x):
        large = min(int(tile.split("=")[1]) for tile in key[2].split() if tile[0] in "MD") >= 64 and x["warps"] >= 4 and "f32" not in key[1]
        kind = {"sm_80": "HMMA", "sm_90": "HGMMA" if large else None, "sm_100": "UTCMMA" if large else None, "gfx942": "MFMA"}[key[3]]
        return kind in x["mma"] if kind else bool(x["mma"])

    assert not failing(report, holds, lambda *key: key[0] in PRODUCTS)
    assert not failing(report, lambda key, x: not x["mma"], lambda *key: key[0] not in PRODUCTS)


def test_loads_and_stores_are_wide_where_the_layout_allows(report):
    """Rows of a multiple of 8 elements (16 for bytes) are loaded and stored 128 bits at a time. Not: patches of 14 and the pixels
    of a planar video that the loss takes channel by channel; ids, positions found by ids and sums of rows are narrow by nature."""
    streams = ("gather_rows", "restore_tokens", "restore_tokens_backward", "patch_loss_backward", *PRODUCTS)

    def select(kernel, case, tiles, target):
        return kernel in streams and "patch 14" not in case and not (target == "gfx942" and "head" in case)

    assert not failing(report, lambda key, x: x["loads"][0] > 0 and x["stores"][0] > 0, select)
