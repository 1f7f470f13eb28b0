"""The study of the mask ratio: its arithmetic by hand, a tiny run, its page against what was recorded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studies import mask_ratio
from studies.mask_ratio import GRIDS, RATIOS, Grid, Plan, Results
from studies.motion import clips
from studies.motion.schedule import load

from .test_motion import folder  # noqa: F401  a fixture

DOCS = Path(__file__).parents[2] / "docs"
TINY = Plan(unlabelled=32, train=32, test=40, width=32, depth=1, num_heads=2, decoder_width=16, batch=16, warmup=2)


def test_cells_are_means_of_boxes():
    grid = (2, 4, 4)
    t, h, w = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    tokens = (100.0 * t + 10 * h + w).flatten()[None, :, None]
    cells = mask_ratio.cells(tokens, grid, (1, 2, 2))
    assert cells[0, :, 0].tolist() == [5.5, 7.5, 25.5, 27.5, 105.5, 107.5, 125.5, 127.5]
    assert torch.equal(mask_ratio.cells(tokens, grid, (1, 1, 1)), tokens)


def test_interpolation_is_straight_over_the_logarithm():
    assert mask_ratio.interpolate([1, 100], [0.0, 1.0], 10) == pytest.approx(0.5)
    assert mask_ratio.interpolate([1, 10, 100], [0.0, 1.0, 0.0], 100) == 0.0
    assert mask_ratio.interpolate([1, 10], [0.2, 1.0], 1) == 0.2
    assert mask_ratio.interpolate([1, 10], [0.0, 1.0], 11) is None is mask_ratio.interpolate([1, 10], [0.0, 1.0], 0.5)


def test_results_at_equal_steps_and_flops():
    grid = GRIDS[0]
    cheap = {"accuracy": {"1": 0.1, "4": 0.5}, "gflops_a_step": 1.0}
    dear = {"accuracy": {"1": 0.3, "4": 0.7}, "gflops_a_step": 2.0}
    found = {mask_ratio.name_of(grid, ratio, 0): numbers for ratio, numbers in ((0.5, dear), (0.9, cheap))}
    results = Results(found, [0, 1])
    assert results.at_step(grid, 0.9, 4) == {0: 0.5} and results.at_step(grid, 0.75, 4) == {}
    assert results.budget(grid) == 4
    assert results.at_flops(grid, 0.5, 4) == {0: pytest.approx(0.5)}  # half-way in the logarithm of 2 to 8
    assert mask_ratio.best({0.5: {0: 0.2, 1: 0.4}, 0.9: {0: 0.25, 1: 0.25}, 0.95: {}}) == "50%"


def test_every_grid_has_its_tokens_and_cells():
    for grid in GRIDS:
        config = mask_ratio.autoencoder(TINY, 0, **grid.changes()).config
        assert str(config.num_tokens) in grid.name
        assert all(side % mask_ratio.CELLS == 0 for side in config.grid)


@pytest.mark.parametrize("grid", [Grid("tiny", 8, 32, 8, (1, 3)), Grid("tiny", 16, 48, 12, (2,))], ids=["64", "128"])
def test_a_run_is_repeatable_and_probed_where_it_should(folder, grid, tmp_path):  # noqa: F811
    study = mask_ratio.Study(str(folder), TINY, str(tmp_path))
    found = mask_ratio.curve(study, {}, ratio=0.75, seed=0, **grid._asdict())
    assert tuple(found["accuracy"]) == grid.evaluate_at and all(0 <= value <= 1 for value in found["accuracy"].values())
    assert found["visible"] == found["tokens"] // 4 and found["gflops_a_step"] > 0
    assert mask_ratio.curve(study, {}, ratio=0.75, seed=0, **grid._asdict()) == found


def test_finished_experiments_are_found_again(tmp_path):
    """What is read back from a record is compared with the arguments, of which JSON makes no tuples."""
    study, experiment = mask_ratio.Study("", TINY, str(tmp_path)), mask_ratio.all_experiments([0])[0]
    record = {"plan": TINY.to_dict(), "arguments": experiment.arguments}
    (tmp_path / f"{experiment.name}.json").write_text(json.dumps(record))
    assert load(tmp_path, study, experiment)
    assert load(tmp_path, replace(study, plan=replace(TINY, lr=1.0)), experiment) is None


def test_the_page_gives_what_was_recorded(tmp_path):
    recorded, page = json.loads((DOCS / "mask-ratio.json").read_text()), (DOCS / "mask-ratio.md").read_text()
    results = Results(recorded["experiments"], recorded["seeds"])
    assert mask_ratio.text(results) in page and "](mask-ratio.png)" in page
    assert recorded["processor"] in page and recorded["date"] in page
    mask_ratio.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    tokens = {numbers["tokens"] for numbers in recorded["experiments"].values()}
    assert tokens in ({64, 256}, {64, 128, 256})
    assert len(RATIOS) == 4 and recorded["plan"] == Plan().to_dict() and len(clips.CLASSES) == 8
