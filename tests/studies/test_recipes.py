"""The page of recipes has every preset once, and what `stmae plan` says of it."""

from pathlib import Path

import pytest

from stmae.training.config import presets
from studies import recipes

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text()


def test_every_preset_is_on_the_page_once():
    rows = [line.split("`")[1] for line in PAGE.split("\n") if line.startswith("| `")]
    assert sorted(rows) == presets()


@pytest.mark.parametrize("name", ["cpu-small", "one-gpu-base-native", "paper-large", "paper-large-finetune-ava"])
def test_the_costs_are_what_plan_says(name):
    assert recipes.row(name) in PAGE
