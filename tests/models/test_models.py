"""The models against the official implementations' numbers, and what else must hold of them."""

import copy
import json
import math
import pickle

import pytest
import torch

import stmae
from stmae.checkpoint import from_mae_st, from_slowfast
from stmae.masking import STRATEGIES
from stmae.models import (
    MaskedAutoencoderConfig,
    VideoClassifierConfig,
    reconstruct,
)
from stmae.models.blocks import drop_path
from stmae.models.position import Position, interpolate_position
from tests.support.golden import read_golden
from tests.support.small_models import BACKENDS, RELATIVE, SMALL, SMALL_MAE, autoencoder, classifier, clip, error, random_noise


def golden(name):
    config, tensors, weights, grads = read_golden(name)
    bridge = from_slowfast if name.startswith("slowfast") else from_mae_st
    # Gradients carry the parameters' names and shapes: as a "model" of gradients they come by our names.
    gradients = dict(bridge(grads, config).named_parameters())
    return config, tensors, bridge(weights, config), gradients


def assert_gradients_agree(model, expected):
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("qkv.weight"):  # three matrices: each by its own scale
            for key, a, b in zip("qkv", got[name].chunk(3), value.chunk(3)):
                assert error(a, b) < RELATIVE, f"{name} {key}"
        else:  # the gradient of the bias of k is zero but for rounding, so qkv.bias goes by the scale of the three
            assert error(got[name], value) < RELATIVE, name


def at(x, ids):
    """x [B, N, D] at ids [B, M]: [B, M, D]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


# --- the official implementations ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["default", "head_dim_32_full_prediction", "joint_pos_no_cls", "pixels_75"])
def test_autoencoder_agrees_with_mae_st(name, backend):
    config, official, model, gradients = golden(f"mae_st_{name}")
    model.backend = backend
    out = model(official["video"], noise=official["noise"])
    out.loss.backward()
    assert torch.equal(out.keep, official["ids_keep"].sort(dim=1).values)
    assert torch.equal(out.masked, official["mask"].nonzero()[:, 1].view(out.masked.shape))
    assert error(out.loss, official["loss"][0]) < RELATIVE
    assert error(out.pred, at(official["pred"], out.masked)) < RELATIVE
    latent = model.encode(official["video"], out.keep)[:, int(config["cls_embed"]) :]
    assert error(latent, at(official["latent"], official["ids_keep"].argsort(dim=1))) < RELATIVE
    assert_gradients_agree(model, gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["default", "two_decoder_heads_pixels"])
def test_autoencoder_agrees_with_slowfast(name, backend):
    _, official, model, gradients = golden(f"slowfast_{name}")
    model.backend = backend
    out = model(official["video"], noise=official["noise"])
    out.loss.backward()
    assert torch.equal(out.keep, official["ids_keep"].sort(dim=1).values)
    assert error(out.loss, official["loss"][0]) < RELATIVE
    assert error(out.pred.flatten(0, 1), official["pred_masked"]) < RELATIVE
    latent = model.encode(official["video"], out.keep)
    patches = at(official["latent_with_class"][:, 1:], official["ids_keep"].argsort(dim=1))
    assert error(latent[:, 1:], patches) < RELATIVE
    assert error(latent[:, :1], official["latent_with_class"][:, :1]) < RELATIVE
    assert_gradients_agree(model, gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mae_st_vit_classify", "slowfast_classify"])
def test_classifier_agrees_with_the_official_ones(name, backend):
    _, official, model, gradients = golden(name)
    model.backend = backend
    logits = model(official["video"])
    assert error(logits, official["logits"]) < RELATIVE
    (logits * torch.arange(logits.numel()).float().sin().view_as(logits)).sum().backward()
    assert_gradients_agree(model, gradients)


# --- what the two code bases do differently, each silently wrong if mistaken ---


def test_target_frames():
    config = MaskedAutoencoderConfig()
    assert config.frames == [0, 2, 4, 6, 8, 10, 12, 15]
    assert config.replace(frame_choice="stride").frames == [0, 2, 4, 6, 8, 10, 12, 14]
    assert config.replace(predicted_frames=16).frames == list(range(16))
    assert config.replace(predicted_frames=16, frame_choice="stride").frames == list(range(16))
    assert config.replace(num_frames=32).frames == torch.linspace(0, 31, 16).long().tolist()
    assert config.replace(num_frames=32).patch_values == config.patch_values == 768


@pytest.mark.parametrize("change", [{"frame_choice": "stride"}, {"target": "pixels"}])
def test_the_target_changes_the_loss_but_not_the_prediction(change):
    model = autoencoder()
    other = autoencoder(**change)
    other.load_state_dict(model.state_dict())
    video, noise = clip(model.config), random_noise(model.config)
    a, b = model(video, noise=noise), other(video, noise=noise)
    assert torch.equal(a.pred, b.pred)
    assert abs(a.loss.item() - b.loss.item()) > 1e-3


@pytest.mark.parametrize("change", [{"decoder_num_heads": 1}, {"num_heads": 1}, {"layer_norm_eps": 1e-2}])
def test_what_the_weights_do_not_show_changes_the_prediction(change):
    model, other = autoencoder(), autoencoder(**change)
    other.load_state_dict(model.state_dict())
    video, noise = clip(model.config), random_noise(model.config)
    assert error(other(video, noise=noise).pred, model(video, noise=noise).pred) > 1e-3


def test_the_decoders_class_token_is_its_own_or_the_encoders():
    own, passed = autoencoder(), autoencoder(decoder_class_token="encoder")
    assert "decoder.class_token" in own.state_dict()
    assert "decoder.class_token" not in passed.state_dict()
    for model, reaches in ((own, False), (passed, True)):
        keep, masked = model.sample_mask(2, noise=random_noise(model.config))
        latent = model.encode(clip(model.config), keep).detach().requires_grad_()
        model.decode(latent, keep, masked).sum().backward()
        assert (latent.grad[:, 0].abs().max() > 0) == reaches
        assert latent.grad[:, 1:].abs().amax(dim=2).min() > 0


def test_fused_qkv_starts_as_three_matrices():
    model = autoencoder(width=128, num_heads=2)
    for part in model.encoder.blocks[0].qkv.weight.chunk(3):
        bound = math.sqrt(6 / (128 + 128))
        assert 0.98 * bound < part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_initialisation():
    model = autoencoder(width=128, decoder_width=128)
    encoder, decoder = model.encoder, model.decoder
    for tokens in (encoder.class_token, decoder.mask_token, *encoder.position.parameters(), *decoder.position.parameters()):
        assert 0.01 < tokens.std() < 0.03
    assert decoder.class_token.abs().max() == 0
    weight = encoder.patch_embed.weight.flatten(1)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.05)
    for name, value in model.state_dict().items():
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (value == 0).all(), name
    head = classifier(width=128, num_classes=500).head
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (head.bias == 0).all()


def test_tokens_and_positions_are_told_apart_for_weight_decay():
    names = autoencoder().no_weight_decay()
    assert names == {
        "encoder.class_token",
        "encoder.position.spatial",
        "encoder.position.temporal",
        "encoder.position.class_token",
        "decoder.class_token",
        "decoder.mask_token",
        "decoder.position.spatial",
        "decoder.position.temporal",
        "decoder.position.class_token",
    }
    parameters = dict(autoencoder().named_parameters())
    assert all(parameters[name].dim() == 2 for name in names)
    assert all(value.dim() == 1 for name, value in parameters.items() if "norm" in name or name.endswith("bias"))


# --- any shape, every switch, both back ends ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False},
        {"separable_position": False},
        {"separable_position": False, "class_token": False},
        {"decoder_separable_position": False},
        {"decoder_class_token": "encoder"},
        {"qkv_bias": False},
        {"target": "pixels"},
        {"decoder_mask_ratio": 0.5},
        {"decoder_mask_ratio": 0.75, "class_token": False, "mask_strategy": "tube"},
        {"decoder_mask_ratio": 0.25, "decoder_class_token": "encoder", "decoder_separable_position": False},
        {"target": "hog", "patch_size": 8},
        {"target": "hog", "patch_size": (8, 16), "predicted_frames": 6, "decoder_mask_ratio": 0.5},
        {"predicted_frames": 6},
        {"frame_choice": "stride"},
        {"tubelet_size": 3},
        {"num_frames": 2, "tubelet_size": 1},
        {"in_channels": 5, "mean": 0.45, "std": 0.225},
        {"decoder_depth": 1, "depth": 1},
        {"mask_strategy": "tube"},
        {"mask_strategy": "frame", "mask_ratio": 0.5},
        {"mask_strategy": "block"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_both_back_ends_agree(changes):
    model = autoencoder(**changes)
    config = model.config
    video = clip(config)
    results = {}
    for backend in BACKENDS:
        model.backend = backend
        model.zero_grad(set_to_none=True)
        out = model(video, generator=torch.Generator().manual_seed(3))
        out.loss.backward()
        results[backend] = out, {name: parameter.grad for name, parameter in model.named_parameters()}
    (expected, expected_grad), (out, grad) = results["reference"], results["ops"]
    assert torch.equal(out.keep, expected.keep) and torch.equal(out.masked, expected.masked)
    masked = config.num_tokens - out.keep.shape[1]
    assert out.pred.shape == (2, masked - int(masked * config.decoder_mask_ratio), config.patch_values)
    assert out.loss.dtype == torch.float32 and out.loss.shape == ()
    assert error(out.loss, expected.loss) < RELATIVE
    assert error(out.pred, expected.pred) < RELATIVE
    for name, value in expected_grad.items():
        assert value is not None and error(grad[name], value) < 10 * RELATIVE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_uint8_frames_in_any_layout_equal_normalised_floats(backend):
    model = autoencoder()
    model.backend = backend
    video, noise = clip(model.config), random_noise(model.config)
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (model.config.mean, model.config.std))
    expected = model((video / 255 - mean) / std, noise=noise)
    decoded = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # [T, H, W, C] frames, seen as [C, T, H, W]
    assert not decoded.is_contiguous()
    for frames in (video, decoded):
        out = model(frames, noise=noise)
        assert error(out.loss, expected.loss) < 1e-5
        assert error(out.pred, expected.pred) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast_keeps_the_residual_stream_in_float32(backend):
    model = autoencoder()
    model.backend = backend
    video, noise = clip(model.config), random_noise(model.config)
    exact = model(video, noise=noise)
    dtypes = []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_hook(lambda module, inputs, output: dtypes.extend([inputs[0].dtype, output[0].dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(video, noise=noise)
    assert len(dtypes) == 8 and set(dtypes) == {torch.float32}
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert 0 < error(out.pred.float(), exact.pred) < 0.05
    assert error(out.loss, exact.loss) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    model = autoencoder()
    model.backend = backend
    out = model(clip(model.config, batch=0))
    assert out.pred.shape == (0, 54, 64) and out.loss == 0


def test_the_masked_pixels_are_never_read_by_the_encoder():
    model = autoencoder()
    config = model.config
    video, noise = clip(config).float(), random_noise(config)
    keep, masked = model.sample_mask(2, noise=noise)
    hidden = torch.zeros(2, config.num_tokens).scatter(1, masked, 1.0).view(2, 1, *config.grid)
    for axis, size in enumerate((config.tubelet_size, *config.patch_size)):
        hidden = hidden.repeat_interleave(size, dim=axis + 2)
    poisoned = video.masked_fill(hidden.bool(), float("nan"))
    assert torch.equal(model.encode(poisoned, keep), model.encode(video, keep))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("class_token", [True, False])
def test_computing_only_the_masked_tokens_changes_no_result(class_token, backend):
    model = autoencoder(class_token=class_token)
    model.backend = backend
    config = model.config
    keep, masked = model.sample_mask(2, noise=random_noise(config))
    latent = model.encode(clip(config), keep)
    everything = torch.arange(config.num_tokens).expand(2, -1)
    assert error(model.decode(latent, keep, masked), at(model.decode(latent, keep, everything), masked)) < 1e-6


def test_one_head_dimension_of_eighty():
    model = autoencoder(width=160, num_heads=2)
    video, noise = clip(model.config), random_noise(model.config)
    ours = model(video, noise=noise).pred
    model.backend = "reference"
    assert error(ours, model(video, noise=noise).pred) < RELATIVE


def test_it_learns():
    model = autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ramp = torch.arange(32).mul(8) + torch.arange(6).mul(-20).view(-1, 1, 1)  # brighter to the right, darker over time
    video = ramp.clamp(min=0).expand(1, 2, 6, 24, 32).to(torch.uint8)
    noise = random_noise(model.config, batch=1)
    losses = []
    for _ in range(40):
        loss = model(video, noise=noise).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    model = autoencoder()
    model.backend = backend
    video, noise = clip(model.config), random_noise(model.config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, expected = compiled(video, noise=noise), model(video, noise=noise)
    assert error(out.pred, expected.pred) < 1e-5
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- masking, back end, state ---


def test_mask_ratio_generator_and_noise():
    model = autoencoder()
    video = clip(model.config)
    a, b, c = (model(video, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.keep, b.keep) and torch.equal(a.pred, b.pred)
    assert not torch.equal(a.keep, c.keep)
    assert a.keep.shape == (2, int(72 * 0.25))
    assert model(video, mask_ratio=0.9).keep.shape == (2, int(72 * (1 - 0.9)))
    noise = random_noise(model.config)
    out = model(video, noise=noise, mask_ratio=0.5)
    assert torch.equal(out.keep, noise.argsort(dim=1)[:, :36].sort(dim=1).values)


def test_backend_is_validated_and_is_no_part_of_the_weights():
    model = autoencoder()
    assert model.backend == "ops"
    with pytest.raises(ValueError, match="backend to be one of ops, reference, got 'cuda'"):
        model.backend = "cuda"
    model.backend = "reference"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.backend == "reference"
        assert other.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert not [name for name in model.state_dict() if "backend" in name]


def test_the_reference_back_end_calls_no_op(monkeypatch):
    video, noise = clip(autoencoder().config), random_noise(autoencoder().config)
    for name in stmae.ops.__all__:
        monkeypatch.setattr(stmae.ops, name, None)
    model = autoencoder()
    with pytest.raises(TypeError):
        model(video, noise=noise)
    model.backend = "reference"
    assert model(video, noise=noise).loss.isfinite()


# --- the classifier ---


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"separable_position": False}, {"qkv_bias": False}])
def test_classifier_on_both_back_ends(changes):
    model = classifier(**changes).eval()
    video = clip(model.config)
    logits = model(video)
    assert logits.shape == (2, 5)
    model.backend = "reference"
    assert error(logits, model(video)) < RELATIVE


@pytest.mark.parametrize("class_token", [True, False])
def test_features(class_token):
    model = classifier(class_token=class_token).eval()
    video = clip(model.config)
    tokens = model.features(video, pooled=False)
    assert tokens.shape == (2, 72, 32)
    pooled = model.features(video)
    # Every patch counts; without a class token, the first one, too.
    assert error(pooled, model.encoder.norm(tokens.mean(dim=1))) < 1e-6
    assert error(model(video), model.head(pooled)) < 1e-6
    keep = torch.arange(0, 72, 3).expand(2, -1)
    assert model.features(video, keep=keep, pooled=False).shape == (2, 24, 32)
    assert error(model(video, keep=torch.arange(72).expand(2, -1)), model(video)) < 1e-6
    assert error(model(video, keep=keep), model(video)) > 1e-4


def test_dropout_and_drop_path_work_in_training_alone():
    video = clip(classifier().config)
    for changes in ({"dropout": 0.5}, {"drop_path": 0.5}):
        model = classifier(**changes)
        assert not torch.equal(model(video), model(video))
        model.eval()
        assert torch.equal(model(video), model(video))
    assert torch.equal(classifier().train()(video), classifier().eval()(video))


def test_drop_path_grows_linearly_in_depth():
    rates = [block.drop_path for block in classifier(depth=5, drop_path=0.2).encoder.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [block.drop_path for block in classifier(depth=1, drop_path=0.2).encoder.blocks] == [0]


def test_drop_path_drops_samples_whole_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(2000, 3, 4, dtype=torch.bfloat16)
    out = drop_path(x, 0.25)
    assert out.dtype == x.dtype
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, 1.3359375}  # 4 / 3 in bfloat16
    assert out.float().mean().item() == pytest.approx(1, abs=0.05)


# --- pictures ---


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("predicted_frames", [3, 6])
def test_a_perfect_prediction_reconstructs_the_original(normalize, predicted_frames, floating):
    model = autoencoder(target="normalized_pixels" if normalize else "pixels", predicted_frames=predicted_frames)
    config = model.config
    video = clip(config)
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.mean, config.std))
    normalised = (video / 255 - mean) / std
    _, masked = model.sample_mask(2, noise=random_noise(config))
    # The target by a plain loop over patches: frames of the slice, rows, columns, colour last.
    u, p, q = config.target_patch_size
    frames = normalised[:, :, config.frames]
    t, h, w = config.grid
    target = torch.stack(
        [
            frames[:, :, i * u : (i + 1) * u, j * p : (j + 1) * p, k * q : (k + 1) * q].permute(0, 2, 3, 4, 1).flatten(1)
            for i in range(t)
            for j in range(h)
            for k in range(w)
        ],
        dim=1,
    )
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    pred = at(target, masked)
    loss = stmae.reference.patch_loss(
        pred, video, masked, patch_size=(u, p, q), frames=config.frames, normalize=normalize, mean=config.mean, std=config.std
    )
    assert loss < 1e-10  # it is the target that the model is trained on

    pictures = reconstruct(config, normalised if floating else video, pred, masked)
    assert pictures.frames == config.frames
    assert pictures.patch_statistics == ("original" if normalize else "predicted")
    original = video[:, :, config.frames] / 255
    torch.testing.assert_close(pictures.original, original, rtol=0, atol=1e-6)
    torch.testing.assert_close(pictures.reconstruction, original, rtol=0, atol=1e-5)


def test_pictures_show_what_was_masked_and_predicted():
    model = autoencoder().train()
    config = model.config
    video = clip(config)
    out = model(video, noise=random_noise(config))
    pictures = model.reconstruct(video, out, fill=0.25)
    shape = (2, 2, 3, 24, 32)
    assert pictures.original.shape == pictures.masked.shape == pictures.reconstruction.shape == shape
    assert not pictures.reconstruction.requires_grad
    hidden = torch.zeros(2, config.num_tokens).scatter(1, out.masked, 1.0).view(2, 1, *config.grid)
    hidden = hidden.repeat_interleave(4, dim=3).repeat_interleave(8, dim=4).bool().expand(shape)
    assert (pictures.masked[hidden] == 0.25).all()
    for image in (pictures.masked, pictures.reconstruction):
        assert torch.equal(image[~hidden], pictures.original[~hidden])
        assert image.min() >= 0 and image.max() <= 1
    assert (pictures.reconstruction[hidden] != pictures.original[hidden]).float().mean() > 0.9
    torch.manual_seed(0)
    assert model.reconstruct(video).masked.shape == shape  # masks by itself, and leaves the mode as it was
    assert model.training


# --- positions for another grid ---


def test_interpolation_to_the_same_grid_changes_nothing():
    values = torch.randn(24, 5)
    assert torch.equal(interpolate_position(values, (2, 3, 4), (2, 3, 4)), values)


@pytest.mark.parametrize("new", [(4, 3, 4), (2, 6, 8), (3, 5, 2), (1, 1, 1)])
def test_interpolation_keeps_a_constant_and_the_sum_of_separable_parts(new):
    old, width = (2, 3, 4), 5
    constant = torch.full((24, width), 0.7)
    torch.testing.assert_close(interpolate_position(constant, old, new), torch.full((math.prod(new), width), 0.7))
    space, time = torch.randn(12, width), torch.randn(2, width)
    joint = interpolate_position((time[:, None] + space).flatten(0, 1), old, new)
    space = interpolate_position(space, (1, 3, 4), (1, *new[1:]))
    time = interpolate_position(time, (2, 1, 1), (new[0], 1, 1))
    torch.testing.assert_close(joint, (time[:, None] + space).flatten(0, 1))


def test_interpolation_keeps_axes_apart():
    values = torch.arange(24.0).view(2, 3, 4)
    wider = interpolate_position(values.reshape(24, 1), (2, 3, 4), (2, 3, 8)).view(2, 3, 8)
    assert (wider.diff(dim=0) == 12).all()  # what grows along time still grows by as much
    torch.testing.assert_close(wider.mean(dim=2), values.mean(dim=2))
    assert (wider.diff(dim=2)[..., 1:-1] > 0).all()
    with pytest.raises(ValueError, match=r"expected values \[24, D\] for grid 2x3x4, got \[23, 1\]"):
        interpolate_position(torch.zeros(23, 1), (2, 3, 4), (2, 3, 4))


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_position_order(separable, class_token):
    position = Position((2, 3, 4), 5, separable=separable, class_token=class_token)
    everything = position()
    assert everything.shape == (24 + class_token, 5)
    assert torch.equal(everything[int(class_token) :], position.of_patches())
    if class_token:
        assert torch.equal(everything[:1], position.of_class_token())
    if separable:  # token (it * h + ih) * w + iw
        expected = position.temporal[1] + position.spatial[2 * 4 + 3]
        assert torch.equal(position.of_patches()[(1 * 3 + 2) * 4 + 3], expected)


# --- factories and configurations ---


@pytest.mark.parametrize(
    "name, width, depth, heads, patch",
    [
        ("small_patch16", 384, 12, 6, 16),
        ("base_patch16", 768, 12, 12, 16),
        ("large_patch16", 1024, 24, 16, 16),
        ("huge_patch14", 1280, 32, 16, 14),
    ],
)
def test_factories(name, width, depth, heads, patch):
    with torch.device("meta"):
        encoder = getattr(stmae.models, f"vit_{name}")(num_classes=174)
        mae = getattr(stmae.models, f"mae_vit_{name}")(mask_ratio=0.95)
    for model in (encoder, mae):
        config = model.config
        assert (config.width, config.depth, config.num_heads, config.patch_size) == (width, depth, heads, (patch, patch))
        assert len(model.encoder.blocks) == depth
        assert config.grid == (8, 224 // patch, 224 // patch)
    assert encoder.head.out_features == 174
    assert mae.config.mask_ratio == 0.95
    assert len(mae.decoder.blocks) == 4 and mae.config.decoder_num_heads == 16
    assert mae.decoder.head.out_features == patch * patch * 3
    with pytest.raises(ValueError, match="MaskedAutoencoderConfig: unknown fields widht"):
        getattr(stmae.models, f"mae_vit_{name}")(widht=5)


def test_parameter_count_of_vit_base():
    with torch.device("meta"):
        model = stmae.models.vit_base_patch16(num_classes=400)
    blocks = 12 * (12 * 768**2 + 13 * 768)
    patches = 768 * (3 * 2 * 16 * 16) + 768
    positions = (196 + 8 + 1 + 1) * 768  # space, time, class token's, class token
    head = 768 * 400 + 400
    assert sum(p.numel() for p in model.parameters()) == blocks + patches + positions + 2 * 768 + head


def test_configurations_turn_into_json_and_back():
    for config in (MaskedAutoencoderConfig(**SMALL_MAE), VideoClassifierConfig(**SMALL), MaskedAutoencoderConfig()):
        again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and hash(again) == hash(config)
    assert MaskedAutoencoderConfig(image_size=64).image_size == (64, 64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 25}, "image_size to be a multiple of patch_size 4 in height, got 25"),
        ({"image_size": (24, 30)}, "image_size to be a multiple of patch_size 8 in width, got 30"),
        ({"image_size": (24, 32, 3)}, r"image_size to be a positive size or \(height, width\), got \(24, 32, 3\)"),
        ({"patch_size": 0}, "patch_size to be a positive size"),
        ({"num_frames": 7}, "num_frames to be a multiple of tubelet_size 2, got 7"),
        ({"num_heads": 3}, "width to be a multiple of num_heads 3, got 32"),
        ({"decoder_num_heads": 3}, "decoder_width to be a multiple of decoder_num_heads 3, got 16"),
        ({"depth": 0}, "depth to be a positive integer, got 0"),
        ({"decoder_depth": 1.5}, "decoder_depth to be a positive integer, got 1.5"),
        ({"mlp_ratio": 0}, "mlp_ratio to be positive"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean to be a number or one for each of 2 channels"),
        ({"std": 0.0}, "std to be positive"),
        ({"predicted_frames": 4}, "predicted_frames to be a multiple of the 3 time slices, at most 6, got 4"),
        ({"predicted_frames": 9}, "predicted_frames to be a multiple of the 3 time slices, at most 6, got 9"),
        ({"mask_ratio": 1.0}, "mask_ratio to lie between 0 and 1"),
        ({"decoder_mask_ratio": 0.6}, "decoder_mask_ratio to be 0, 0.25, 0.5 or 0.75, got 0.6"),
        ({"target": "tokens"}, "target to be one of pixels, normalized_pixels, channel_normalized_pixels, hog, got 'tokens'"),
        ({"target": "hog"}, r"patch_size to be a multiple of 8, the cell of target hog,, got \(4, 8\)"),
        ({"mask_strategy": "cube"}, "mask_strategy to be one of random, tube, frame, block, multi_block, got 'cube'"),
        ({"frame_choice": "all"}, "frame_choice to be one of linspace, stride, got 'all'"),
        ({"decoder_class_token": "none"}, "decoder_class_token to be one of own, encoder"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"MaskedAutoencoderConfig: expected {message}"):
        MaskedAutoencoderConfig(**{**SMALL_MAE, **changes})


@pytest.mark.parametrize("changes", [{"num_classes": -1}, {"dropout": 1.0}, {"drop_path": -0.1}, {"pooling": "max"}])
def test_bad_classifier_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=f"VideoClassifierConfig: expected {next(iter(changes))}"):
        VideoClassifierConfig(**{**SMALL, **changes})


# --- bad input ---


@pytest.mark.parametrize("model", [autoencoder(), classifier()], ids=["autoencoder", "classifier"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v[0], r"video \[B, 2, 6, 24, 32\] \(B, C, T, H, W\), got \[2, 6, 24, 32\]"),
        (lambda v: v[:, :1], r"got \[2, 1, 6, 24, 32\]"),
        (lambda v: v[:, :, :5], r"got \[2, 2, 5, 24, 32\]"),
        (lambda v: v[..., :30], r"got \[2, 2, 6, 24, 30\]"),
        (lambda v: v.transpose(1, 2), r"got \[2, 6, 2, 24, 32\]"),
        (lambda v: v.long(), "video uint8 or normalised floating point, got torch.int64"),
        (lambda v: v.numpy(), "video to be a tensor or a list of clips, got ndarray"),
    ],
    ids=["dimensions", "channels", "frames", "size", "order", "dtype", "type"],
)
def test_bad_videos_are_refused(model, backend, change, message):
    model.backend = backend
    with pytest.raises(ValueError, match=f"{type(model).__name__}: expected .*{message}"):
        model(change(clip(model.config)))


def test_bad_masks_are_refused():
    model = autoencoder()
    video, noise = clip(model.config), random_noise(model.config)
    with pytest.raises(ValueError, match=r"expected noise \[2, 72\] \(B, N\), got \[2, 71\]"):
        model(video, noise=noise[:, :71])
    with pytest.raises(ValueError, match="float32"):
        model(video, noise=noise.double())
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        model(video, noise=noise.index_fill(1, torch.tensor([5]), float("nan")))
    for ratio, word in ((0.999, "nothing"), (1e-17, "everything")):
        with pytest.raises(ValueError, match=f"keeps {word}"):
            model(video, mask_ratio=ratio)
    for ratio in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="mask ratio between 0 and 1"):
            model(video, mask_ratio=ratio)
    keep = torch.arange(18).expand(2, -1)
    for bad in (keep + 60, keep - 1, torch.zeros_like(keep)):
        with pytest.raises((ValueError, RuntimeError), match="keep"):
            model.encode(video, bad)


def test_predictions_of_the_wrong_shape_make_no_pictures():
    model = autoencoder()
    out = model(clip(model.config))
    with pytest.raises(ValueError, match=r"expected pred \[2, 54, 64\] \(B, M, P\), got \[2, 54, 63\]"):
        reconstruct(model.config, clip(model.config), out.pred[..., :63], out.masked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_reach_the_model(strategy):
    model = autoencoder(mask_strategy=strategy, mask_ratio=0.5)
    _, masked = model.sample_mask(4)
    mask = torch.zeros(4, 72).scatter(1, masked, 1.0).view(4, *model.config.grid)
    assert (mask.amax(dim=1) == mask.amin(dim=1)).all() == (strategy == "tube")
    assert (mask.amax(dim=(2, 3)) == mask.amin(dim=(2, 3))).all() == (strategy == "frame")
