"""Objectives beyond pixels of all masked patches: dual masking, and histograms of oriented gradients."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stmae import checkpoint, reference
from stmae.checkpoint import from_mae_st, to_mae_st
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, reconstruct
from stmae.models.hog import BINS, draw, hog, hog_patches
from tests.support.small_models import BACKENDS, RELATIVE, autoencoder, clip, error, random_noise

DUAL = {"decoder_mask_ratio": 0.5, "mask_strategy": "tube"}
HOG = {"target": "hog", "patch_size": (8, 16), "predicted_frames": 6}


# Dual masking


@pytest.mark.parametrize("class_token", ["own", "encoder", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_decoder_attends_to_visible_and_reconstructed_tokens_only(class_token, backend):
    """Its blocks over exactly these tokens, each with its own position, in the order of their ids."""
    changes = {"class_token": False} if class_token is None else {"decoder_class_token": class_token}
    model = autoencoder(**DUAL, **changes)
    model.backend = backend
    config, decoder = model.config, model.decoder
    keep, masked = model.sample_mask(2, noise=random_noise(config))
    assert keep.shape[1] + masked.shape[1] < config.num_tokens
    latent = model.encode(clip(config), keep)
    pred = model.decode(latent, keep, masked)

    for row in range(2):
        x = latent[row : row + 1] @ decoder.embed.weight.T + decoder.embed.bias
        position = decoder.position.of_patches()
        visible = x[:, -keep.shape[1] :] + position[keep[row]]
        hidden = decoder.mask_token + position[masked[row]]
        ids = torch.cat([keep[row], masked[row]])
        sequence = torch.cat([visible[0], hidden])[ids.argsort()][None]
        if class_token is not None:
            first = decoder.class_token[None] if class_token == "own" else x[:, :1]
            sequence = torch.cat([first + decoder.position.of_class_token(), sequence], dim=1)
        for block in decoder.blocks:
            sequence = block(sequence)
        out = decoder.head(decoder.norm(sequence))
        out = out[0, out.shape[1] - len(ids) :][torch.isin(ids.sort().values, masked[row])]
        assert error(pred[row], out) < RELATIVE


def test_the_decoders_blocks_are_as_short_as_what_they_see():
    model = autoencoder(**DUAL)
    lengths = []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    out = model(clip(model.config))
    assert out.masked.shape[1] == out.pred.shape[1] == 27  # of 54
    assert lengths == [1 + out.keep.shape[1] + 27] * 2


def test_the_loss_is_that_of_the_reconstructed_patches():
    model = autoencoder(**DUAL)
    video, config = clip(model.config), model.config
    out = model(video, noise=random_noise(config))
    expected = reference.patch_loss(
        out.pred, video, out.masked, patch_size=config.target_patch_size, frames=config.frames, mean=config.mean, std=config.std
    )
    assert error(out.loss, expected) < 1e-5


def test_the_encoders_mask_does_not_change_and_noise_says_everything():
    plain, dual = autoencoder(mask_strategy="tube"), autoencoder(**DUAL)
    noise = random_noise(dual.config)
    one, other = plain.sample_mask(2, noise=noise), dual.sample_mask(2, noise=noise)
    assert torch.equal(one[0], other[0])
    assert all(torch.isin(b, a).all() and len(b) == len(a) // 2 for a, b in zip(one[1], other[1]))
    assert torch.equal(dual.sample_mask(2, noise=noise)[1], other[1])
    assert torch.equal(dual.sample_mask(2, noise=noise, decoder_mask_ratio=0)[1], one[1])


@pytest.mark.parametrize("changes", [DUAL, HOG, {**DUAL, **HOG}], ids=["dual", "hog", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast_and_compilation(changes, backend):
    model = autoencoder(**changes)
    model.backend = backend
    video, noise = clip(model.config), random_noise(model.config)
    exact = model(video, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(video, noise=noise)
    assert out.loss.dtype == torch.float32 and error(out.loss, exact.loss) < 0.01
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(video, noise=noise)
    assert error(compiled.loss, exact.loss) < 1e-4 and error(compiled.pred, exact.pred) < 1e-4
    assert model(clip(model.config, batch=0)).loss == 0


@pytest.mark.parametrize("changes", [DUAL, HOG], ids=["dual", "hog"])
def test_it_learns(changes):
    model = autoencoder(**changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ramp = torch.arange(32).mul(8) + torch.arange(6).mul(-20).view(-1, 1, 1)
    video = ramp.clamp(min=0).expand(1, 2, 6, 24, 32).to(torch.uint8)
    losses = []
    for _ in range(40):
        loss = model(video, noise=random_noise(model.config, batch=1)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_pictures_of_a_part_are_grey_where_nothing_was_predicted():
    model = autoencoder(**DUAL)
    video, config = clip(model.config), model.config
    out = model(video, noise=random_noise(config))
    pictures = model.reconstruct(video, out, fill=0.25)
    shape = pictures.original.shape

    def spread(ids):
        tokens = torch.zeros(2, config.num_tokens).scatter(1, ids, 1.0).view(2, 1, *config.grid)
        return tokens.repeat_interleave(4, dim=3).repeat_interleave(8, dim=4).bool().expand(shape)

    seen, predicted = spread(out.keep), spread(out.masked)
    assert torch.equal(pictures.reconstruction[seen], pictures.original[seen])
    assert (pictures.reconstruction[~seen & ~predicted] == 0.25).all() and (pictures.masked[~seen] == 0.25).all()
    assert (pictures.reconstruction[predicted] != 0.25).float().mean() > 0.9
    complete = model.reconstruct(video)  # by itself it reconstructs all
    assert (complete.reconstruction[complete.masked == 0.5] != 0.5).float().mean() > 0.9


# Histograms of oriented gradients


def slow_hog(frame):
    """A frame [H, W] -> [H / 8, W / 8, 9], pixel by pixel in float64."""
    height, width = frame.shape
    frame = frame.astype(np.float64)
    out = np.zeros((height // 8, width // 8, 9))
    for y in range(height):
        for x in range(width):
            dx = frame[y, x + 1] - frame[y, x - 1] if 0 < x < width - 1 else 0.0
            dy = frame[y + 1, x] - frame[y - 1, x] if 0 < y < height - 1 else 0.0
            degrees = np.degrees(np.arctan2(dy, dx)) % 180.0
            out[y // 8, x // 8, int(degrees // 20) % 9] += np.hypot(dx, dy)
    return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12)


def test_hog_agrees_with_a_loop_over_pixels():
    frame = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    frame[8:16, 8:24] = 77  # even cells
    frame[16:, :] = np.arange(40) * 5  # one direction
    got = hog(torch.from_numpy(frame)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(got, slow_hog(frame), atol=2e-6)
    assert got.shape == (3, 5, 9) and np.isclose(np.linalg.norm(got[0, 0]), 1)


def test_brightness_and_contrast_do_not_matter():
    frame = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(hog(frame * 0.5 + 16), hog(frame))
    assert (hog(torch.full((1, 1, 16, 16), 9.0)) == 0).all()


@pytest.mark.parametrize("degrees", [10, 50, 90, 130, 170])
def test_an_edge_falls_in_the_bin_of_its_direction_and_is_drawn_across_it(degrees):
    angle = torch.tensor(degrees * torch.pi / 180)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = x * angle.cos() + y * angle.sin()  # grows in the direction of angle, y downwards
    for sign in (1, -1):
        cell = hog((sign * ramp)[None, None])[0, 0, 1, 1]
        assert cell.argmax() == degrees // 20 and cell.max() > 0.99
    stroke = draw(torch.eye(BINS)[degrees // 20].view(1, 1, BINS))
    on = stroke > 0.5
    assert on.sum() >= 4
    centred = (x[:8, :8] - 3.5) * angle.cos() + (y[:8, :8] - 3.5) * angle.sin()
    assert centred[on].abs().max() < 1  # all along one line, at right angles to the gradient


def test_values_of_a_patch_come_by_frame_cell_channel_and_bin():
    config = autoencoder(**HOG).config
    video = clip(config)
    patches = hog_patches(video, config.frames, config.target_patch_size)
    assert patches.shape == (2, config.num_tokens, config.patch_values) and config.patch_values == 2 * 1 * 2 * 2 * 9
    t, h, w = config.grid
    assert (t, h, w) == (3, 3, 2)
    it, ih, iw, u, row, column, channel = 2, 1, 1, 1, 0, 1, 1
    frame = video[1, channel, config.frames[it * 2 + u]].numpy()
    cells = patches[1, (it * h + ih) * w + iw].view(2, 1, 2, 2, 9)
    np.testing.assert_allclose(cells[u, row, column, channel], slow_hog(frame)[ih + row, iw * 2 + column], atol=2e-6)


def test_the_loss_of_hog_is_the_mean_squared_error_of_the_masked_patches():
    model = autoencoder(**HOG)
    config, video = model.config, clip(model.config)
    out = model(video, noise=random_noise(config))
    target = hog_patches(video, config.frames, config.target_patch_size)
    target = torch.stack([target[row, ids] for row, ids in enumerate(out.masked)])
    assert error(out.loss, (out.pred - target).square().mean()) < 1e-6
    assert model.decoder.head.out_features == 72


def test_pictures_of_hog_are_strokes():
    model = autoencoder(**HOG)
    config, video = model.config, clip(model.config)
    keep, masked = model.sample_mask(2, noise=random_noise(config))
    target = hog_patches(video, config.frames, config.target_patch_size)
    pred = torch.stack([target[row, ids] for row, ids in enumerate(masked)])
    pictures = reconstruct(config, video, pred, masked)
    assert torch.equal(pictures.reconstruction, pictures.original) and pictures.patch_statistics == "predicted"
    strokes = draw(torch.from_numpy(slow_hog(video[1, 0, config.frames[4]].numpy())))
    torch.testing.assert_close(pictures.original[1, 0, 4], strokes.float(), atol=1e-5, rtol=0)
    assert model.reconstruct(video).masked.shape == (2, 2, 6, 24, 32)


# Checkpoints


@pytest.mark.parametrize("changes", [DUAL, HOG], ids=["dual", "hog"])
def test_a_checkpoint_keeps_the_objective(changes, tmp_path):
    model = autoencoder(**changes).eval()
    checkpoint.save(model, tmp_path / "model.safetensors")
    again = checkpoint.load(tmp_path / "model.safetensors")
    video, noise = clip(model.config), random_noise(model.config)
    assert again.config == model.config
    assert torch.equal(again(video, noise=noise).loss, model(video, noise=noise).loss)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_checkpoint_from_before_there_was_hog_loads(normalize, tmp_path):
    model = autoencoder(target="normalized_pixels" if normalize else "pixels")
    checkpoint.save(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["stmae"])
    del about["config"]["target"], about["config"]["decoder_mask_ratio"]
    about["config"]["normalize_target"] = normalize
    save_file(state, tmp_path / "old.safetensors", metadata={**metadata, "stmae": json.dumps(about)})
    assert checkpoint.load(tmp_path / "old.safetensors").config == model.config
    with pytest.raises(ValueError, match="unknown fields normalise_target"):
        MaskedAutoencoderConfig.from_dict({"normalise_target": True})


def test_mae_st_has_no_hog():
    model = MaskedAutoencoder(MaskedAutoencoderConfig(image_size=32, width=32, depth=1, num_heads=1, target="hog"))
    with pytest.raises(ValueError, match="mae_st has no model with target='hog'"):
        to_mae_st(model)
    config = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 1, "norm_pix_loss": True, "t_patch_size": 2}
    weights = to_mae_st(MaskedAutoencoder(model.config.replace(target="pixels", decoder_depth=8)))
    assert from_mae_st(weights, {**config, "sep_pos_embed": True, "cls_embed": True}).config.target == "normalized_pixels"
