"""Files that say of their model what none can be: refused as checkpoints, before anything of that size is built."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from stmae import checkpoint
from stmae.checkpoint import CheckpointError, CheckpointMismatch
from stmae.checkpoint.files import describe
from stmae.checkpoint.huggingface import _DEFAULTS, to_huggingface
from stmae.models import ActionDetectorConfig, MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifierConfig
from stmae.models import config as limits
from tests.support import small_models

HUGE = [65537, 10**9, 2**31, 2**63, 10**30, [10**9, 10**9], 1e308]
ODD = [*HUGE, -1, 0, True, None, 1.5, math.nan, math.inf, -math.inf, "x", "", "4", [], [1], [1, 2, 3], [[1]], {}, [None, None]]
REFUSED = (CheckpointError, CheckpointMismatch)
PROCESSOR_SECONDS = 5  # of one file; each takes milliseconds, and what is prevented took 25 s or all memory

MODELS = {
    "autoencoder": small_models.autoencoder,
    "classifier": small_models.classifier,
    "fixed positions": lambda: small_models.autoencoder(position="sincos", separable_position=False),
}


@pytest.fixture(scope="module", autouse=True)
def first_load(tmp_path_factory):
    """The first model that is built imports a good part of torch, which takes seconds."""
    path = tmp_path_factory.mktemp("first") / "first.safetensors"
    checkpoint.save(small_models.autoencoder(), path)
    checkpoint.load(path)


def refuse_or_read(path):
    """Whether ``path`` is read; anything but a refusal by name is an error."""
    started = time.thread_time()
    try:
        checkpoint.load(path)
        return True
    except REFUSED as error:
        assert len(str(error)) < 20_000
        return False
    finally:
        assert time.thread_time() - started < PROCESSOR_SECONDS


@pytest.mark.parametrize("make", MODELS)
def test_every_field_with_every_odd_value(make, tmp_path):
    model, path = MODELS[make](), tmp_path / "odd.safetensors"
    about, state = describe(model), dict(model.state_dict())
    for field in about["config"]:
        for value in ODD:
            save_file(state, path, {"stmae": json.dumps({**about, "config": {**about["config"], field: value}})})
            read = refuse_or_read(path)
            assert not read or value not in HUGE or field not in limits.LARGEST, f"{field}={value!r}"


def test_every_odd_description(tmp_path):
    model, path = small_models.autoencoder(), tmp_path / "odd.safetensors"
    about, state = describe(model), dict(model.state_dict())
    deep = "[" * 100_000
    texts = ["null", "[]", "1", '"x"', "{}", deep, '{"kind":' * 50_000, "NaN", '{"kind": []}']
    texts += [json.dumps({**about, key: value}) for key in about for value in ODD]
    texts.append(json.dumps({**about, "config": None})[:-5] + "[" * 900 + "]" * 900 + "}")
    for text in texts:
        save_file(state, path, {"stmae": text})
        assert not refuse_or_read(path), text[:100]


@pytest.mark.filterwarnings("ignore:.*all zeros")
def test_every_odd_value_of_a_hub_config(tmp_path):
    torch.manual_seed(0)
    shape = {"image_size": 32, "num_frames": 4, "patch_size": 8, "width": 48, "depth": 1, "num_heads": 2}
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 1, "decoder_embed_bias": False}
    decoder |= {"decoder_norm_eps": 1e-5, "predicted_frames": 4, "target": "channel_normalized_pixels", "target_range": "unit"}
    fixed = {"position": "sincos", "separable_position": False, "class_token": False, "key_bias": False, "mask_strategy": "tube"}
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    weights, config = to_huggingface(MaskedAutoencoder(MaskedAutoencoderConfig(**shape, **decoder, **fixed, **colours)))
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "model.safetensors")
    for field in sorted({*config, *_DEFAULTS}):
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
            refuse_or_read(tmp_path)
    for text in ("null", "[]", '{"stmae": 1}', '{"stmae": null}', '{"stmae": []}', "[" * 100_000, '{"model_type": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert not refuse_or_read(tmp_path)


@pytest.mark.parametrize("make", ["autoencoder", "classifier"])
def test_weights_that_are_no_numbers_are_said(make, tmp_path):
    model = MODELS[make]()
    name = next(iter(model.state_dict()))
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = math.nan
    checkpoint.save(model, tmp_path / "nan.safetensors")
    with pytest.warns(UserWarning, match=f"nan.safetensors: {name} holds values that are not finite"):
        loaded = checkpoint.load(tmp_path / "nan.safetensors")
    assert loaded.load_report.notes == [f"{name} holds values that are not finite"]


@pytest.mark.parametrize("field", [*limits.LARGEST])
def test_a_limit_names_the_field(field):
    others = {"num_classes": VideoClassifierConfig, "roi_size": ActionDetectorConfig}
    config_class = others.get(field, MaskedAutoencoderConfig)
    value = limits.LARGEST[field] + 1
    with pytest.raises(ValueError, match=f"expected {field} .* got "):
        config_class(**{field: value})


def test_products_are_limited_too():
    with pytest.raises(ValueError, match="expected mlp_ratio times width 768 to lie between 1 and"):
        MaskedAutoencoderConfig(mlp_ratio=1e9)
    with pytest.raises(ValueError, match="expected width times the tokens of a grid"):
        MaskedAutoencoderConfig(num_frames=2**16, image_size=2**12)
    with pytest.raises(ValueError, match="expected patch_size to give a patch of at most"):
        MaskedAutoencoderConfig(image_size=2**13, patch_size=2**13)
