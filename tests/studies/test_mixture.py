"""The study of mixed clips: batches of equal tokens, features of any shape, a tiny run, its page against what was recorded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studies import mixture
from studies.mixture import MIXTURE, MODELS, SHAPES, STANDARD, TESTED, UNSEEN, Plan, Study
from studies.motion import clips
from studies.motion.experiments import autoencoder

from .test_motion import blobs, folder  # noqa: F401  a fixture

DOCS = Path(__file__).parents[2] / "docs"
TINY = Plan(unlabelled=56, train=16, test=16, width=32, depth=1, num_heads=2, decoder_width=16, tokens=512, steps=2, warmup=1)


def test_tokens_of_shapes():
    assert mixture.num_tokens(STANDARD) == 64 and mixture.num_tokens((4, 48, 48)) == 72
    assert all(side % patch == 0 for shape in TESTED for side, patch in zip(shape, mixture.PATCH))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_batch_has_no_more_than_its_tokens_and_lacks_less_than_a_clip(shapes):
    generator = torch.Generator().manual_seed(0)
    batches = [mixture.draw_batch(shapes, 4096, generator) for _ in range(50)]
    sizes = [sum(count * mixture.num_tokens(shape) for count, shape in zip(counts, shapes)) for counts in batches]
    assert max(sizes) <= 4096 and min(sizes) > 4096 - max(map(mixture.num_tokens, shapes))
    assert all(sum(counts[index] for counts in batches) for index in range(len(shapes)))
    assert shapes != (STANDARD,) or batches == [[64]] * 50


def test_features_are_as_many_for_every_shape_and_those_of_a_clip_alone():
    model = autoencoder(TINY, 0).eval()
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


def test_both_models_are_trained_and_tested_on_all_shapes(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mixture, "TESTED", (STANDARD, UNSEEN[0]))
    study = Study(str(folder), TINY, str(tmp_path))
    found = {f"{name}-seed0": mixture.train(study, {}, name, 0) for name in SHAPES}
    for numbers in found.values():
        assert set(numbers["accuracy"]) == set(map(mixture.show_shape, mixture.TESTED)) and numbers["tokens"] <= 1024
    assert found["standard-seed0"]["clips"] == 16
    found.update(
        {f"{name}-longer": mixture.train_longer(replace(study, plan=replace(TINY, long_steps=1)), {}, name, 0) for name in MODELS}
    )
    assert set(found) == {experiment.name for experiment in mixture.all_experiments([0])}
    records = {
        name: {"found": json.loads(json.dumps(numbers)), "torch": "", "precision": "", "cpu_seconds": 60.0}
        for name, numbers in found.items()
    }
    mixture.write(tmp_path, TINY, [0], records)
    written = json.loads((tmp_path / "mixed-clips.json").read_text())
    assert written["cpu_minutes"] == 6 and (tmp_path / "mixed-clips.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_gives_what_was_recorded():
    recorded, page = json.loads((DOCS / "mixed-clips.json").read_text()), (DOCS / "mixed-clips.md").read_text()
    assert mixture.text(recorded["experiments"], recorded["seeds"]) in page and "](mixed-clips.png)" in page
    assert mixture.longer_text(recorded["experiments"]) in page
    assert mixture.parts_text(recorded["experiments"], recorded["seeds"][0]) in page
    assert recorded["processor"] in page and recorded["date"] in page
    assert recorded["plan"] == Plan().to_dict() and len(recorded["seeds"]) == 3
    for shape in MIXTURE:
        assert mixture.show_shape(shape) in page
