"""VideoMAE, VideoMAE V2 and Hugging Face's port: what they compute, this library computes from their weights."""

import copy

import pytest
import torch

from stmae.checkpoint import CheckpointMismatch, from_huggingface, from_videomae, load, to_huggingface, to_videomae
from stmae.masking import Mask
from stmae.models import MaskedAutoencoder, VideoClassifier
from tests.support.golden import read_golden
from tests.support.small_models import BACKENDS, RELATIVE, SMALL_VIDEOMAE, error


def assert_gradients_agree(model, expected):
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        parts = 3 if name.endswith("qkv.weight") else 1  # three matrices: each by its own scale
        for a, b in zip(got[name].chunk(parts), value.chunk(parts)):
            assert error(a, b) < RELATIVE, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["videomae_default", "videomae_pixels_no_bias"])
def test_pretraining_agrees_with_videomae(name, backend):
    config, official, weights, grads = read_golden(name)
    model = from_videomae(weights, config)
    model.backend = backend
    out = model(official["video"], noise=official["mask"].float())
    out.loss.backward()
    assert torch.equal(out.masked, official["mask"].nonzero()[:, 1].view(out.masked.shape))
    assert error(out.loss, official["loss"][0]) < RELATIVE
    assert error(out.pred, official["pred_masked"]) < RELATIVE
    assert error(model.encode(official["video"], out.keep), official["latent"]) < RELATIVE
    assert_gradients_agree(model, dict(from_videomae(grads, config).named_parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["videomae_classify", "videomae_v2_classify"])
def test_classifier_agrees_with_videomae(name, backend):
    config, official, weights, grads = read_golden(name)
    model = from_videomae(weights, config)
    model.backend = backend
    logits = model(official["video"])
    assert error(logits, official["logits"]) < RELATIVE
    (logits * torch.arange(logits.numel()).float().sin().view_as(logits)).sum().backward()
    assert_gradients_agree(model, dict(from_videomae(grads, config).named_parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_masking_agrees_with_videomae_v2(backend):
    config, official, weights, grads = read_golden("videomae_v2_dual_masking")
    model = from_videomae(weights, config)
    model.backend = backend
    keep, decoded = ((x.nonzero()[:, 1].view(2, -1)) for x in (~official["mask"], official["decoded"]))
    out = model(official["video"], mask=Mask(keep, decoded))
    out.loss.backward()
    assert error(out.loss, official["loss"][0]) < RELATIVE
    assert error(out.pred, official["pred_masked"]) < RELATIVE
    assert_gradients_agree(model, dict(from_videomae(grads, config).named_parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_v2_decodes_at_visible_places_is_no_part_of_the_loss(backend):
    config, official, weights, _ = read_golden("videomae_v2_dual_masking")
    model = from_videomae(weights, config)
    model.backend = backend
    keep, decoded = ((x.nonzero()[:, 1].view(2, -1)) for x in (~official["mask"], official["decoded"]))
    both = torch.cat([keep[:, ::2], decoded], dim=1).sort(dim=1).values
    out = model(official["video"], mask=Mask(keep, both))
    assert out.pred.shape[1] == both.shape[1]
    hidden = torch.stack([~torch.isin(row, seen) for row, seen in zip(both, keep)])
    pred = out.pred[hidden].view(2, decoded.shape[1], -1)
    assert error(out.loss, model._patch_loss(pred, official["video"], decoded)) < 1e-6
    # The mask tokens at visible places are attended to: they change what is predicted elsewhere.
    assert error(pred, model(official["video"], mask=Mask(keep, decoded)).pred) > 1e-3


@pytest.mark.parametrize("name", ["videomae_default", "videomae_pixels_no_bias", "videomae_v2_classify"])
def test_there_and_back_is_the_identity(name):
    config, _, weights, _ = read_golden(name)
    model = from_videomae(weights, config)
    back = to_videomae(model)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(back[key], value), key
    assert from_videomae(back, model.config).config == model.config


def test_our_configuration_serves_as_well():
    config, _, weights, _ = read_golden("videomae_default")
    model = from_videomae(weights, config)
    again = from_videomae({"module": {f"module.{key}": value for key, value in weights.items()}}, model.config)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_an_argument_that_videomae_does_not_have_is_refused():
    config, _, weights, _ = read_golden("videomae_default")
    with pytest.raises(ValueError, match="unknown arguments encoder_heads"):
        from_videomae(weights, {**config, "encoder_heads": 3})


# --- Hugging Face ---

HUB_CONFIGS = {
    "default": {},
    "norm": {"use_mean_pooling": False},
    "no-bias": {"qv_bias": False, "use_mean_pooling": False, "layer_norm_eps": 1e-6},
    "pixels": {"norm_pix_loss": False, "num_frames": 8, "tubelet_size": 4, "use_mean_pooling": False},
}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def hub_model(transformers, kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = transformers.VideoMAEConfig(**{**SMALL_VIDEOMAE, **changes})
    if kind == "VideoMAEForVideoClassification":
        config.num_labels = 5
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def hub_clip(config, batch=2):
    return torch.randn(batch, config.num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def hub_mask(config, batch=2):
    tokens = config.num_frames // config.tubelet_size * 16
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)).argsort(1) >= tokens // 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_pretraining_agrees_with_hugging_face(transformers, name, backend):
    theirs = hub_model(transformers, "VideoMAEForPreTraining", **HUB_CONFIGS[name])
    model = from_huggingface(theirs.state_dict(), theirs.config.to_dict())
    model.backend = backend
    clip, mask = hub_clip(theirs.config), hub_mask(theirs.config)
    expected = theirs(clip, mask, output_hidden_states=True)
    keep = (~mask).nonzero()[:, 1].view(len(clip), -1)
    masked = mask.nonzero()[:, 1].view(len(clip), -1)
    video = clip.transpose(1, 2)
    pred = model.decode(model.encode(video, keep), keep, masked)
    loss = model._patch_loss(pred, video, masked)
    assert error(pred, expected.logits) < 1e-5
    assert error(loss, expected.loss) < 1e-5
    hidden = model.encoder.get_intermediate_layers(video, n=range(2), keep=keep)
    for ours, value in zip(hidden, expected.hidden_states[1:]):
        assert error(ours, value) < 1e-5
    expected.loss.backward()
    loss.backward()
    grads = {key: value.grad for key, value in theirs.named_parameters()}
    assert_gradients_agree(model, dict(from_huggingface(grads, model.config).named_parameters()))


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_classifier_agrees_with_hugging_face(transformers, backend, pooling):
    theirs = hub_model(transformers, "VideoMAEForVideoClassification", use_mean_pooling=pooling)
    model = from_huggingface(theirs.state_dict(), theirs.config.to_dict())
    model.backend = backend
    clip = hub_clip(theirs.config)
    assert error(model(clip.transpose(1, 2)), theirs(clip).logits) < 1e-5


@pytest.mark.parametrize("pooling", [True, False])
def test_encoder_agrees_with_hugging_face(transformers, pooling):
    theirs = hub_model(transformers, "VideoMAEModel", use_mean_pooling=pooling)
    model = from_huggingface(theirs.state_dict(), theirs.config.to_dict())
    clip = hub_clip(theirs.config)
    assert error(model.encoder(clip.transpose(1, 2)), theirs(clip).last_hidden_state) < 1e-5


@pytest.mark.parametrize("kind", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification", "VideoMAEModel"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_hugging_face_folders_are_read_and_written(transformers, tmp_path, kind, safe):
    theirs = hub_model(transformers, kind, use_mean_pooling=False)
    theirs.save_pretrained(tmp_path / "hub")
    if not safe:
        (tmp_path / "hub" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "hub" / "pytorch_model.bin")
    model = load(tmp_path / "hub")
    assert model.load_report.format == "huggingface-videomae"
    weights, config = to_huggingface(model)
    again = getattr(transformers, kind)(transformers.VideoMAEConfig.from_dict(config))
    # transformers calls the biases query.bias in memory and q_bias in files.
    renamed = {key.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): value for key, value in weights.items()}
    again.load_state_dict(renamed)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    other = from_huggingface(weights, config)
    assert other.config == model.config


def test_biases_by_either_name_and_never_by_both(transformers):
    theirs = hub_model(transformers, "VideoMAEModel", use_mean_pooling=False)
    new = theirs.state_dict()
    old = {key.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value for key, value in new.items()}
    a, b = (from_huggingface(weights, theirs.config.to_dict()).state_dict() for weights in (new, old))
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert a["encoder.blocks.0.qkv.q_bias"].any()
    with pytest.raises(ValueError, match="got both"):
        from_huggingface({**new, **old}, theirs.config.to_dict())
    without = {key: value for key, value in new.items() if "value.bias" not in key}
    with pytest.raises(CheckpointMismatch, match="v_bias"):
        from_huggingface(without, theirs.config.to_dict())


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"hidden_dropout_prob": 0.1}, {"model_type": "vit"}])
def test_what_hugging_face_can_and_this_library_cannot_is_refused(transformers, change):
    theirs = hub_model(transformers, "VideoMAEModel")
    with pytest.raises(ValueError, match=next(iter(change))):
        from_huggingface(theirs.state_dict(), {**theirs.config.to_dict(), **change})


def test_what_the_others_do_not_have_is_not_exported():
    config, _, weights, _ = read_golden("videomae_default")
    model = from_videomae(weights, config)
    with pytest.raises(ValueError, match="target='normalized_pixels'"):
        to_videomae(MaskedAutoencoder(model.config.replace(target="normalized_pixels")))
    scaled = MaskedAutoencoder(model.config.replace(layer_scale=0.1))
    assert "encoder.blocks.0.gamma_1" in to_videomae(scaled)
    with pytest.raises(ValueError, match="layer_scale"):
        to_huggingface(scaled)
    with pytest.warns(UserWarning, match="decoder_norm_eps"):
        to_huggingface(model)


def test_layer_scale_comes_from_the_weights():
    config, _, weights, _ = read_golden("videomae_classify")
    model = VideoClassifier(from_videomae(weights, config).config.replace(layer_scale=0.1))
    again = from_videomae(to_videomae(model), {**config, "init_values": 0.1})
    assert torch.equal(again.encoder.blocks[1].ls2.gamma, model.encoder.blocks[1].ls2.gamma)
    assert copy.deepcopy(again).config == again.config
