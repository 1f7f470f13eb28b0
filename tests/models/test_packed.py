"""A list of clips is one packed batch: each clip as by itself, nothing padded, nothing dropped."""

import math

import pytest
import torch

from stmae import masking
from stmae.masking import Blocks, Mask
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.models.position import KEPT_TABLES, interpolate_position

SMALL = dict(image_size=32, num_frames=4, patch_size=8, width=32, depth=2, num_heads=2)
DECODER = dict(decoder_width=16, decoder_depth=2, decoder_num_heads=2)
VARIANTS = {
    "default": {},
    "sincos": dict(class_token=False, separable_position=False, position="sincos", mask_ratio=0.6),
    "joint": dict(separable_position=False, decoder_class_token="encoder"),
    "decoder mask": dict(decoder_mask_ratio=0.5, mask_strategy="tube", mask_ratio=0.75),
    "hog": dict(target="hog", loss_reduction="clip"),
    "blocks": dict(mask_strategy="multi_block", mask_blocks=2, mask_block_scale=(0.2, 0.4), loss_reduction="clip"),
    "unit": dict(target="channel_normalized_pixels", target_range="unit", predicted_frames=4, frame_choice="stride"),
}


def autoencoder(**options):
    torch.manual_seed(0)
    return MaskedAutoencoder(MaskedAutoencoderConfig(**SMALL, **DECODER, **options))


def clips():
    """Three aspect ratios and lengths, and a picture."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 4, 32, 32), (3, 2, 48, 16), (3, 8, 24, 40), (3, 32, 24))
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_clip_as_by_itself(variant, threads):
    """Predictions bit for bit, at any number of threads. A parameter's gradient is a sum over tokens, of the same terms in
    another order: each order is off by at most (n - 1) eps times the sum of the terms' sizes."""
    model, batch = autoencoder(**VARIANTS[variant]), clips()
    threads(1)
    out = model(batch, generator=torch.Generator().manual_seed(1))
    together = gradients(model, out.loss)
    masked = [len(ids) for ids in out.masked]
    assert [tuple(p.shape[:1]) for p in out.pred] == [(n,) for n in masked]
    weights = [n / sum(masked) if model.config.loss_reduction == "patch" else 1 / len(batch) for n in masked]
    loss, summed = 0.0, {}
    for count, (clip, keep, ids, pred, weight) in enumerate(zip(batch, out.keep, out.masked, out.pred, weights)):
        threads(1 + count % 3)
        alone = model([clip], mask=[Mask(keep, ids)])
        assert torch.equal(alone.pred[0], pred)
        loss += weight * alone.loss.item()
        for name, grad in gradients(model, weight * alone.loss).items():
            summed[name] = summed.get(name, 0) + grad.double()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    tokens = sum(len(keep) + len(ids) for keep, ids in zip(out.keep, out.masked))
    for name, grad in together.items():
        bound = tokens * torch.finfo(torch.float32).eps * max(1e-3, summed[name].abs().max().item())
        assert (grad - summed[name]).abs().max() <= bound, name


def test_a_clip_of_the_usual_size_is_as_in_a_batch():
    model, clip = autoencoder(), clips()[0]
    mask = model.sample_mask(1, generator=torch.Generator().manual_seed(0))
    dense = model(clip[None], mask=mask)
    (pred,) = model([clip], mask=[Mask(*(ids[0] for ids in mask))]).pred
    assert torch.equal(dense.pred[0], pred)
    assert torch.equal(model.encode([clip])[0], model.encode(clip[None])[0])


@pytest.mark.parametrize("variant", ["default", "joint", "decoder mask"])
def test_the_reference_agrees(variant):
    model, batch = autoencoder(**VARIANTS[variant]), clips()
    out = model(batch, generator=torch.Generator().manual_seed(1))
    model.backend = "reference"
    plain = model(batch, mask=[Mask(k, m) for k, m in zip(out.keep, out.masked)])
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(out.pred, plain.pred):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_same_noise_makes_the_mask_of_a_batch():
    model, clip = autoencoder(), clips()[0]
    noise = torch.rand(2, model.config.num_tokens)
    dense = model(clip.expand(2, -1, -1, -1, -1), noise=noise)
    packed = model([clip, clip], noise=list(noise))
    assert torch.equal(torch.stack(packed.keep), dense.keep) and torch.equal(torch.stack(packed.masked), dense.masked)
    assert torch.equal(torch.stack(packed.pred), dense.pred)
    torch.testing.assert_close(packed.loss, dense.loss)


def test_mask_ratios():
    model, batch = autoencoder(), clips()
    tokens = [32, 12, 60, 12]
    each = model(batch, mask_ratio=[0.5, 0.75, 0.9, 0.6])
    assert [len(ids) for ids in each.keep] == [int(n * (1 - r)) for n, r in zip(tokens, (0.5, 0.75, 0.9, 0.6))]
    drawn = model(batch * 4, mask_ratio=(0.5, 0.8), generator=torch.Generator().manual_seed(0))
    ratios = [len(m) / (len(m) + len(k)) for k, m in zip(drawn.keep, drawn.masked)]
    assert all(0.49 < ratio < 0.9 for ratio in ratios) and len(set(ratios[::4])) > 1
    for bad, message in (
        ([0.5], "one mask_ratio for each clip, 4 in all, got 1"),
        ((0.9, 0.5), "a range"),
        ((0.1, 0.2, 0.3), "a range"),
        ((0.5, float("nan")), "a range"),
        ((0, 0.5), "a range .lowest, highest. between 0 and 1"),
        ((0.5, 1), "a range .lowest, highest. between 0 and 1"),
        ((0.5, 0.99), "masks some of the tokens of grid 1x3x4, 12 in all, got 0.99|of grid"),  # whatever is drawn
        (["0.5", 0.5, 0.5, 0.5], "a number, a tuple"),
        ("0.5", "a number, a tuple"),
        ([0.5, None, 0.5, 0.5], "a number, a tuple"),
    ):
        with pytest.raises(ValueError, match=f"(MaskedAutoencoder|masking): expected .*{message}"):
            model(batch, mask_ratio=bad)


def test_a_picture_is_a_clip_of_one_tubelet():
    model, picture = autoencoder(), clips()[3]
    tubelet = picture[:, None].expand(-1, 2, -1, -1).contiguous()
    assert torch.equal(model.encode([picture])[0], model.encode([tubelet])[0])


def test_positions_of_other_grids_are_learned():
    """Interpolated as a checkpoint's are, and gradients reach the table; the fixed table is computed once for a grid."""
    position = autoencoder().encoder.position
    own, other = position([(2, 4, 4), (4, 3, 5)])
    assert torch.equal(own, position())
    space = interpolate_position(position.spatial, (1, 4, 4), (1, 3, 5))
    time = interpolate_position(position.temporal, (2, 1, 1), (4, 1, 1))
    assert torch.equal(other[1:], (time[:, None] + space).flatten(0, 1))
    other.sum().backward()
    assert position.spatial.grad.abs().min() > 0 and position.temporal.grad.abs().min() > 0
    fixed = autoencoder(**VARIANTS["sincos"]).encoder.position
    assert fixed.of_patches((3, 2, 4)) is fixed.of_patches((3, 2, 4)) and fixed.of_patches((3, 2, 4)).shape == (24, 32)


def test_hooks_fire_and_replaced_layers_count():
    model, batch = autoencoder(), clips()
    mask = model.sample_masks([(2, 4, 4), (1, 6, 2), (4, 3, 5), (1, 4, 3)], generator=torch.Generator().manual_seed(0))
    plain = model(batch, mask=mask)
    calls = []
    for module in (model.encoder.patch_embed, model.encoder.blocks[0], model.decoder.blocks[1], model.decoder.blocks[1].proj):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    hooked = model(batch, mask=mask)
    assert calls == ["PatchEmbed", "Block", "Linear", "Block"]
    for a, b in zip(plain.pred, hooked.pred):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpointed_activations_give_the_same():
    model, batch = autoencoder(), clips()
    results = []
    for on in (False, True):
        model.checkpoint_activations = on
        results.append(gradients(model, model(batch, generator=torch.Generator().manual_seed(1)).loss))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_classifier():
    torch.manual_seed(0)
    model = VideoClassifier(VideoClassifierConfig(**SMALL, num_classes=5, drop_path=0.5)).eval()
    batch = clips()
    logits = model(batch)
    assert logits.shape == (4, 5)
    for clip, own in zip(batch, logits):
        assert torch.equal(model([clip])[0], own)
    assert torch.equal(model(batch[0][None])[0], logits[0])
    tokens = model.features(batch, pooled=False)
    assert [x.shape for x in tokens] == [(n, 32) for n in (32, 12, 60, 12)]
    assert torch.equal(model.features(batch)[2], model.pool(tokens[2][None])[0])
    model.train()
    model(batch).sum().backward()
    assert all(x.grad is not None for x in model.encoder.parameters())


def test_drop_path_drops_whole_clips():
    from stmae.models.blocks import drop_path

    torch.manual_seed(0)
    lengths = [3, 1, 5] * 10
    x = drop_path(torch.ones(1, sum(lengths), 2), 0.5, torch.tensor([0, *lengths]).cumsum(0))
    kept = [set(part.flatten().tolist()) for part in x[0].split(lengths)]
    assert all(len(values) == 1 for values in kept) and set().union(*kept) == {0.0, 2.0}


BAD = [
    ([], "expected videos a list of one clip or more"),
    ([torch.zeros(3, 4, 32, 30)], r"expected videos\[0\] \[3, T, H, W\] with T, H and W multiples of the patch \(2, 8, 8\)"),
    ([torch.zeros(3, 3, 32, 32)], r"expected videos\[0\] .*got \[3, 3, 32, 32\]"),
    ([torch.zeros(1, 4, 32, 32)], r"expected videos\[0\] .*got \[1, 4, 32, 32\]"),
    ([torch.zeros(3, 4, 32, 32), torch.zeros(3, 4, 32, 32).bfloat16()], "expected videos of one dtype and device"),
    ([torch.zeros(3, 4, 32, 32).long()], r"expected videos\[0\] uint8 or normalised floating point, got torch.int64"),
    ([None], r"expected videos\[0\] to be a tensor, got NoneType"),
    ("clips", "expected the video to be a tensor or a list of clips, got str"),
]


@pytest.mark.parametrize(("videos", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_clips(videos, message):
    for model in (autoencoder(), VideoClassifier(VideoClassifierConfig(**SMALL, num_classes=2)).encoder):
        with pytest.raises(ValueError, match=f"{type(model).__name__}: {message}"):
            model(videos)


def test_bad_masks():
    model, batch = autoencoder(), clips()[:2]
    keep, masked = torch.tensor([0, 1]), torch.tensor([2, 3])
    good = Mask(keep, masked)
    for mask, message in (
        (good, "expected mask a list of a Mask"),
        ([good], "mask.keep: expected a list of ids for each clip, 2 in all, got 1"),
        ([good, (keep.int(), masked)], r"mask.keep\[1\]: expected ids \[K\] int64, got \[2\] torch.int32"),
        ([good, (keep, keep)], "expected no token twice"),
    ):
        with pytest.raises(ValueError, match=f"MaskedAutoencoder: {message}"):
            model(batch, mask=mask)
    with pytest.raises(RuntimeError, match="masked_patchify_varlen: expected keep of sequence 1"):
        model(batch, mask=[good, (torch.tensor([12]), masked)])
    with pytest.raises(ValueError, match="expected a mask or what one is made of, got mask and mask_ratio"):
        model(batch, mask=[good, good], mask_ratio=0.5)


def test_multi_block():
    """The union of blocks of the sizes asked for, full length, within the clip; another for each clip; repeatable."""
    generator = torch.Generator().manual_seed(0)
    grid, one = (8, 14, 14), Blocks(number=1, scale=(0.15, 0.15), aspect=(1.0, 1.0))
    for _ in range(20):
        keep, masked = masking.multi_block(grid, one, generator=generator)
        block = torch.zeros(math.prod(grid), dtype=torch.bool).index_fill(0, masked, True).view(grid)
        assert torch.equal(torch.cat([keep, masked]).sort().values, torch.arange(math.prod(grid)))
        assert bool((block == block[0]).all()) and masked.numel() == 8 * 5 * 5  # sqrt(0.15 * 196) = 5.4
        rows, columns = block[0].any(1).nonzero()[:, 0], block[0].any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == 5 == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1
    partial = Blocks(number=1, length=(0.25, 0.5))
    depths = set()
    for _ in range(30):
        _, masked = masking.multi_block(grid, partial, generator=generator)
        depths.add(len((masked // 196).unique()))
    assert depths == {2, 3, 4}
    grids = [grid, (2, 6, 8)]
    seeds = (torch.Generator().manual_seed(3) for _ in range(2))
    draws = [masking.make_masks("multi_block", grids, [0.9] * 2, generator=seed) for seed in seeds]
    assert all(torch.equal(a, b) for x, y in zip(*draws) for a, b in zip(x, y))
    tiny = masking.multi_block((1, 1, 2), Blocks(number=8, scale=(0.9, 1.0)), generator=generator)
    assert len(tiny.keep) >= 1 and len(tiny.keep) + len(tiny.masked) == 2
    with pytest.raises(ValueError, match="masking: expected a grid of two tokens or more, got 1x1x1"):
        masking.multi_block((1, 1, 1), Blocks())
    with pytest.raises(ValueError, match="with which every clip has its own"):
        autoencoder(mask_strategy="multi_block")(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.parametrize("grid, blocks", [((8, 14, 14), Blocks()), ((4, 6, 9), Blocks(2, (0.2, 0.6), length=(0.3, 1.0)))])
def test_multi_block_with_a_number_of_visible_tokens(grid, blocks):
    """No more than it says where that is possible, nearly as many, and masks that are as likely as without it."""
    generator, tokens = torch.Generator().manual_seed(1), math.prod(grid)
    counts = masking.visible_counts(grid, blocks, 400, torch.Generator().manual_seed(2))
    assert 0 < counts[0] < counts[-1] < tokens and torch.equal(counts, counts.sort().values)
    chosen = []
    for most in counts[20::10].tolist():
        keep, masked = masking.multi_block(grid, blocks, visible=most, generator=generator)
        assert torch.equal(torch.cat([keep, masked]).sort().values, torch.arange(tokens)) and len(keep) <= most
        chosen.append(len(keep))
    drawn = [len(masking.multi_block(grid, blocks, generator=generator).keep) for _ in range(400)]
    chosen, drawn = torch.tensor(chosen).double(), torch.tensor(drawn).double()
    assert abs(chosen.mean() - drawn.mean()) < 0.25 * drawn.std() and abs(chosen.std() / drawn.std() - 1) < 0.25
    assert (counts[20::10] - chosen).mean() < 0.25 * drawn.std()
    fewest = masking.multi_block(grid, blocks, visible=1, generator=generator)  # no such mask
    assert 1 < len(fewest.keep) <= counts[20]


RANGES = [
    ("mask_block_scale", (0.5, 0.2)),
    ("mask_block_scale", (0.5, 1.2)),
    ("mask_block_length", (0, 1)),
    ("mask_block_aspect", 1.0),
]


@pytest.mark.parametrize("field, value", [("mask_blocks", 0), ("loss_reduction", "mean"), *RANGES])
def test_bad_configuration(field, value):
    with pytest.raises(ValueError, match=field):
        MaskedAutoencoderConfig(**SMALL, **DECODER, **{field: value})


def test_a_fixed_table_is_kept_for_some_grids_alone():
    model = autoencoder(**VARIANTS["sincos"])
    position = model.encoder.position
    expected = position.of_patches((1, 2, 3)).clone()
    for width in range(1, 2 * KEPT_TABLES):
        position.of_patches((1, 1, width))
    assert len(position._tables) == KEPT_TABLES and torch.equal(position.of_patches((1, 2, 3)), expected)
