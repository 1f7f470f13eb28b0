"""The study of mixed clips: batches of equal tokens, features of any shape, a tiny run, its page against what was recorded."""

import json
from pathlib import Path

import pytest
import torch

from studies import mixture
from studies.mixture import SHAPES, STANDARD, TESTED, UNSEEN, Plan, Study
from studies.motion import clips
from studies.motion.experiments import autoencoder

from .test_motion import blobs, folder  # noqa: F401  a fixture

DOCS = Path(__file__).parents[2] / "docs"
TINY = Plan(
    unlabelled=56,
    train=16,
    few=16,
    test=16,
    width=32,
    depth=1,
    num_heads=2,
    decoder_width=16,
    tokens=2048,
    steps=1,
    long_steps=2,
    warmup=1,
)


def test_tokens_of_shapes():
    assert mixture.num_tokens(STANDARD) == 256 and mixture.num_tokens((4, 48, 48)) == 288
    assert all(side % patch == 0 for shape in TESTED for side, patch in zip(shape, mixture.PATCH))
    assert set(TESTED) <= set(SHAPES["mixture"]) | set(UNSEEN) and not set(SHAPES["mixture"]) & set(UNSEEN)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_batch_has_no_more_than_its_tokens_and_lacks_less_than_a_clip(shapes):
    generator = torch.Generator().manual_seed(0)
    batches = [mixture.draw_batch(shapes, 16384, generator) for _ in range(50)]
    sizes = [sum(count * mixture.num_tokens(shape) for count, shape in zip(counts, shapes)) for counts in batches]
    assert max(sizes) <= 16384 and min(sizes) > 16384 - max(map(mixture.num_tokens, shapes))
    assert all(sum(counts[index] for counts in batches) for index in range(len(shapes)))
    assert shapes != (STANDARD,) or batches == [[64]] * 50


def test_features_are_as_many_for_every_shape_and_those_of_a_clip_alone():
    model = autoencoder(TINY, 0, patch_size=mixture.PATCH[1]).eval()
    for shape in (STANDARD, (4, 48, 48), (12, 40, 40)):
        part = clips.draw(blobs(30, 0), 3, 0, frames=shape[0], size=shape[1:])
        features = mixture.features(model, part)
        assert features.shape == (3, mixture.CELLS**3 * TINY.width)
        torch.testing.assert_close(features[1:2], mixture.features(model, clips.Clips(part.clips[1:2], part.labels[1:2])))


def test_clips_of_another_shape_move_as_the_standard_ones():
    """A larger frame shows the standard one in its middle; a shape changes no draw of pictures, colours and classes."""
    standard, larger = (clips.draw(blobs(30, 0), 8, 0, size=size) for size in ((32, 32), (48, 40)))
    assert torch.equal(larger.clips[:, :, 8:40, 4:36], standard.clips) and torch.equal(larger.labels, standard.labels)
    assert clips.draw(blobs(30, 0), 8, 0, frames=12).clips.shape == (8, 12, 32, 32, 3)


def test_the_loss_on_test_clips_is_the_mean_of_the_batches(folder, tmp_path):  # noqa: F811
    model = autoencoder(TINY, 0, patch_size=mixture.PATCH[1], mask_ratio=TINY.mask_ratio).eval()
    part = Study(str(folder), TINY, str(tmp_path)).part("test", 12, 0, (4, 24, 48))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), mixture.autocast():
        losses = [model(list(part.video(rows).unbind()), generator=generator).loss.item() for rows in (slice(8), slice(8, 12))]
    assert mixture.test_loss(model, part, 3, batch=8) == pytest.approx((8 * losses[0] + 4 * losses[1]) / 12, rel=1e-12)


def test_models_are_trained_and_probed_on_all_shapes(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mixture, "TESTED", (STANDARD, UNSEEN[-1]))
    study = Study(str(folder), TINY, str(tmp_path))
    assert {experiment.arguments["name"] for experiment in mixture.all_experiments([0])} == set(SHAPES)
    monkeypatch.setattr(mixture, "PARTS", mixture.PARTS[:1])
    monkeypatch.setattr(mixture, "CONTROLS", (3,))
    experiments = mixture.all_experiments([0])
    found = {item.name: getattr(mixture, item.function)(study, {}, **item.arguments) for item in experiments}
    for item in experiments:
        numbers = found[item.name]
        assert list(numbers["at"]) == (["1", "2"] if item.function == "train_long" else ["1"]) and numbers[
            "tokens_a_step"
        ] <= item.arguments.get("tokens", 2048)
        for measured in numbers["at"].values():
            assert set(measured) == {*mixture.MEASURES, "test_loss"}
            assert all(set(values) == set(map(mixture.show_shape, mixture.TESTED)) for values in measured.values())
            standard = mixture.show_shape(STANDARD)
            assert measured["accuracy"][standard] == measured["few_labels"][standard] == measured["transfer"][standard]
    assert found["standard-seed0"]["clips_a_step"] == 8 and found["standard-seed0"]["tokens_a_step"] == 2048
    assert [found[f"standard, {count} clips-seed0"]["clips_a_step"] for count in mixture.CONTROLS] == list(mixture.CONTROLS)
    records = {
        name: {"found": json.loads(json.dumps(numbers)), "torch": "", "precision": "", "cpu_seconds": 60.0}
        for name, numbers in found.items()
    }
    mixture.write(tmp_path, TINY, [0], records)
    written = json.loads((tmp_path / "mixed-clips.json").read_text())
    assert written["cpu_minutes"] == len(experiments) and (tmp_path / "mixed-clips.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_gives_what_was_recorded():
    recorded, page = json.loads((DOCS / "mixed-clips.json").read_text()), (DOCS / "mixed-clips.md").read_text()
    found, seeds, plan = recorded["experiments"], recorded["seeds"], Plan()
    assert recorded["plan"] == plan.to_dict() and len(seeds) == 3
    for step in (plan.steps, plan.long_steps):
        assert mixture.text(found, seeds, step, "accuracy") in page
    for measure in ("few_labels", "transfer"):
        assert mixture.text(found, seeds, plan.long_steps, measure) in page
    assert mixture.loss_text(found, seeds, plan.long_steps) in page and mixture.clips_text(found, seeds[0], plan.steps) in page
    assert recorded["processor"] in page and recorded["date"] in page and "](mixed-clips.png)" in page
    for shape in SHAPES["mixture"]:
        assert mixture.show_shape(shape) in page
