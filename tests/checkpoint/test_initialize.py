"""Weights as the start of a new training: taken wholly, or refused by the choice that differs."""

import copy

import pytest
import torch

from stmae.checkpoint import CheckpointError, classifier_from_autoencoder, from_videomae, initialize, resize, save
from stmae.models import MaskedAutoencoder
from tests.support.golden import read_golden
from tests.support.small_models import autoencoder, clip, random_noise


def saved(model, tmp_path):
    save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_weights(model, expected, start=""):
    state, expected = model.state_dict(), expected.state_dict()
    for name, value in expected.items():
        if name.startswith(start):
            assert torch.equal(state[name], value), name


def test_every_weight_is_taken(tmp_path):
    source, model = autoencoder(0), autoencoder(1)
    report = initialize(model, saved(source, tmp_path))
    assert_weights(model, source)
    assert report.format == "stmae" and not report.new and not report.unused and not report.notes
    noise = random_noise(model.config)
    assert torch.equal(model(clip(model.config), noise=noise).pred, source(clip(model.config), noise=noise).pred)


def test_another_code_base_s_weights(tmp_path):
    official, _, weights, _ = read_golden("videomae_default")
    expected = from_videomae(weights, official)
    torch.manual_seed(1)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights}, path)
    # Its heads cannot be seen; VideoMAE's own sizes tell them, these small ones do not.
    with pytest.raises(CheckpointError, match=r"num_heads cannot be determined .* stmae convert"):
        initialize(MaskedAutoencoder(expected.config), path)
    path = saved(expected, tmp_path)
    model = MaskedAutoencoder(expected.config.replace(target="pixels", mask_strategy="random"))
    report = initialize(model, path)
    assert_weights(model, expected)
    assert report.notes == [
        "target was 'channel_normalized_pixels', and is 'pixels' from here on",
        "mask_strategy was 'tube', and is 'random' from here on",
    ]


def test_other_sizes_are_resized(tmp_path):
    source = autoencoder(0)
    model = MaskedAutoencoder(source.config.replace(num_frames=12, image_size=(48, 40)))
    report = initialize(model, saved(source, tmp_path))
    assert_weights(model, resize(source, num_frames=12, image_size=(48, 40)))
    assert "resized" in report.inferred["num_frames"] and "resized" in report.inferred["image_size"]


@pytest.mark.parametrize("kind", ["classifier", "encoder alone", "not asked for"])
def test_without_a_decoder_the_model_keeps_its_own(kind, tmp_path):
    source, model = autoencoder(0), autoencoder(1)
    before = copy.deepcopy(model)
    if kind == "not asked for":
        report = initialize(model, saved(source, tmp_path), decoder=False)
        assert all(name.startswith("decoder.") for name in report.unused)
    else:
        classifier = classifier_from_autoencoder(source, num_classes=3 if kind == "classifier" else 0)
        report = initialize(model, saved(classifier, tmp_path))
        assert set(report.unused) == ({"head.weight", "head.bias"} if kind == "classifier" else set())
    assert_weights(model, source, "encoder.")
    assert_weights(model, before, "decoder.")
    assert set(report.new) == {name for name in model.state_dict() if name.startswith("decoder.")}
    assert "new decoder.mask_token" in str(report)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_heads": 1}, "num_heads"),  # the same shapes
        ({"decoder_num_heads": 1}, "decoder_num_heads"),
        ({"decoder_class_token": "encoder"}, "decoder_class_token"),
        ({"width": 8, "num_heads": 1}, "width"),
        ({"mlp_ratio": 2.0, "decoder_mlp_ratio": 4.0}, "mlp_ratio"),
        ({"key_bias": False}, "key_bias"),
        ({"layer_scale": 0.1}, "layer_scale"),
        ({"separable_position": False, "position": "sincos"}, "position"),
        ({"class_token": False}, "class_token"),
        ({"predicted_frames": 6}, "predicted_frames"),
        ({"target": "hog"}, "target"),
    ],
)
def test_a_choice_that_differs_is_refused_by_name(change, named, tmp_path):
    source = autoencoder(0, patch_size=8)
    path = saved(source, tmp_path)
    model = MaskedAutoencoder(source.config.replace(**change))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"cannot start from .*: its weights are of a model with .*{named} ") as refused:
        initialize(model, path)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if named.startswith("decoder_") or named in ("predicted_frames", "target"):
        assert "without its decoder they fit" in str(refused.value)
        initialize(model, path, decoder=False)
        assert_weights(model, source, "encoder.")


def test_fixed_positions_of_another_grid_are_said(tmp_path):
    config = autoencoder(0).config.replace(separable_position=False, position="sincos")
    source = MaskedAutoencoder(config)
    path = saved(source, tmp_path)
    longer = config.replace(num_frames=8)
    with pytest.raises(CheckpointError, match=r"position_grid \(3, \d, \d\), not None"):
        initialize(MaskedAutoencoder(longer), path)
    model = MaskedAutoencoder(longer.replace(position_grid=config.grid))
    initialize(model, path)
    assert torch.equal(model.encoder.position.table, resize(source, num_frames=8).encoder.position.table)
