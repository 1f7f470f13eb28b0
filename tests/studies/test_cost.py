"""The study of cost: its counts against the paper's, its arithmetic by hand, its page against what was recorded."""

import json
import math
import re
from pathlib import Path

import pytest

from stmae.models import MaskedAutoencoder
from studies import cost

DOCS = Path(__file__).parents[2] / "docs"
TINY = cost.SMALL.replace(image_size=64, num_frames=4, width=64, depth=1, num_heads=2, decoder_width=32, decoder_num_heads=1)


@pytest.fixture(scope="module")
def found():
    return json.loads((DOCS / "cost.json").read_text())


@pytest.fixture(scope="module")
def counted():
    return cost.count_large()


def test_flops_are_the_paper_s(counted):
    for name, gflops in cost.PAPER.items():
        assert counted[name] == pytest.approx(gflops, rel=0.003)  # the paper gives four and three digits


def test_flops_are_those_of_a_vit_by_hand(counted):
    """Multiply-adds of the dense model: the encoder's blocks over 1569 tokens and the decoder's over as many."""

    def block(n, d):
        return n * 12 * d * d + 2 * n * n * d

    encoder = 1568 * 1536 * 1024 + 24 * block(1569, 1024)
    decoder = 157 * 1024 * 512 + 4 * block(1569, 512) + 1568 * 512 * 768
    assert counted["dense"] == pytest.approx((encoder + decoder) / 1e9, rel=1e-3)  # the last layer predicts the masked alone
    assert counted["ops"] < counted["sparse"]


def test_recorded_counts_are_today_s(found, counted):
    assert found["large"]["gflops"] == counted


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponent_of_a_power(power):
    xs = [1, 2, 4, 16]
    assert cost.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power)


def test_exponent_of_scattered_points_is_the_least_squares_one():
    assert cost.exponent([1, math.e, math.e**2], [1, math.e**3, math.e**2]) == pytest.approx(1)


def test_sides_alternate_and_the_first_round_is_not_counted():
    calls, ticks = [], iter(range(100))
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = cost.alternate(sides, 2, clock=lambda: next(ticks))
    assert calls == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [1, 1]}


def test_steps_of_both_encoders_train_the_same_model():
    for encoder in ("sparse", "dense"):
        step = cost.Step(TINY, 1, encoder=encoder)
        before = MaskedAutoencoder.state_dict(step.model)["encoder.blocks.0.qkv.weight"].clone()
        step()
        assert not before.equal(step.model.state_dict()["encoder.blocks.0.qkv.weight"]), encoder
    assert cost.small_gflops(TINY, "dense") > cost.small_gflops(TINY, "sparse") > 0


def test_the_page_gives_what_was_recorded(found, tmp_path):
    page, numbers = (DOCS / "cost.md").read_text(), cost.summary(found)
    assert {name: pytest.approx(value) for name, value in numbers.items()} == found["summary"]
    for row in cost.table_rows(found):
        assert f"| {' | '.join(row)} |" in page, row
    assert found["processor"] in page and found["date"] in page and re.search(r"!\[[^]]+\]\(cost\.png\)", page)
    cost.draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
