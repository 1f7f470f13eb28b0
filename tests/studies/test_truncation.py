"""The simulation of V-JEPA's truncation: its mechanics by hand, its figures as the docs give them."""

import re
from pathlib import Path

import torch

from studies import truncation

PAGE = Path(__file__).parents[2] / "docs/packed.md"


def test_what_is_cut_are_the_last_of_the_visible():
    visible = torch.tensor([[[1, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 0, 0]]], dtype=torch.bool)
    assert truncation.truncated(visible).int().tolist() == [[[0, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]]


def test_blocks_span_all_slices_and_have_one_size():
    visible = truncation.visible_tokens(1, 0.15, 30, torch.Generator().manual_seed(0))
    assert bool((visible == visible[:, :1]).all()) and len(set(visible.sum(dim=(1, 2)).tolist())) == 1


def test_the_figures_of_the_docs(tmp_path):
    rows = dict(re.findall(r"\| (\d blocks of 0\.\d+) \| (\d+) % \|", PAGE.read_text()))
    assert rows.keys() == truncation.SETTINGS.keys()
    results = {name: truncation.simulate(*setting) for name, setting in truncation.SETTINGS.items()}
    for name, (total, slices) in results.items():
        assert round(100 * total) == int(rows[name]), (name, total)
        assert 0.93 < slices[-1] < 0.98 and slices[0] < 0.05 and slices == sorted(slices)
    truncation.picture(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
