"""Features on the way through the encoder, attention maps, models without a head, masks as values, counts of full models."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import stmae
from stmae import checkpoint
from stmae.masking import Mask
from stmae.models import MaskedAutoencoderConfig
from tests.support.small_models import BACKENDS, RELATIVE, autoencoder, classifier, clip, error, random_noise


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_intermediate_layers(backend, class_token):
    model = autoencoder(depth=4, class_token=class_token)
    model.backend = backend
    encoder, video, first = model.encoder, clip(model.config), int(class_token)
    streams = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: streams.append(output)) for block in encoder.blocks]
    final = encoder(video)
    for hook in hooks:
        hook.remove()
    assert final.shape == (2, first + 72, 32)
    assert error(final, encoder.forward_features(video)) < RELATIVE
    outs = encoder.get_intermediate_layers(video, n=3)
    assert len(outs) == 3
    for out, stream in zip(outs, streams[1:]):
        assert error(out, stream[:, first:]) < RELATIVE
    chosen = encoder.get_intermediate_layers(video, n=[-1, 0], norm=True, return_prefix_tokens=True)
    for (patches, prefix), stream in zip(chosen, (streams[0], streams[3])):
        assert error(patches, encoder.norm(stream)[:, first:]) < RELATIVE
        assert prefix.shape == (2, first, 32)
        assert not first or error(prefix, encoder.norm(stream)[:, :1]) < RELATIVE
    assert error(chosen[1][0], final[:, first:]) < RELATIVE
    (grid,) = encoder.get_intermediate_layers(video, reshape=True)
    assert error(grid.flatten(2).transpose(1, 2), outs[-1]) < RELATIVE and grid.shape == (2, 32, *model.config.grid)
    keep = torch.tensor([[0, 5, 9], [1, 2, 70]])
    (out,) = encoder.get_intermediate_layers(video, keep=keep, norm=True)
    assert error(out, model.encode(video, keep)[:, first:]) < RELATIVE


@pytest.mark.parametrize("n", [0, 5, [4], [-5], []])
def test_blocks_that_are_not_there_are_refused(n):
    encoder = autoencoder(depth=4).encoder
    for get in (encoder.get_intermediate_layers, encoder.get_attention_maps):
        with pytest.raises(ValueError, match=f"{get.__name__}: expected n at least one of the 4 blocks"):
            get(clip(encoder.config), n=n)
    with pytest.raises(ValueError, match="expected reshape only with all patches"):
        encoder.get_intermediate_layers(clip(encoder.config), keep=torch.zeros(2, 1).long(), reshape=True)
    with pytest.raises(ValueError, match=r"Encoder: expected video \[B, 2, 6, 24, 32\]"):
        encoder(clip(encoder.config)[:, :1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_maps_are_what_the_attention_multiplies_values_by(backend):
    model = autoencoder(depth=3)
    model.backend = backend
    encoder, video = model.encoder, clip(model.config)
    inputs, outputs = {}, {}
    for index, block in enumerate(encoder.blocks):
        block.qkv.register_forward_hook(lambda module, x, output, index=index: inputs.update({index: output}))
        block.proj.register_forward_hook(lambda module, x, output, index=index: outputs.update({index: x[0]}))
    encoder(video)
    inputs, outputs = dict(inputs), dict(outputs)
    maps = encoder.get_attention_maps(video, n=[0, 2])
    assert len(maps) == 2
    for index, weights in zip((0, 2), maps):
        assert weights.shape == (2, 2, 73, 73) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 73))
        values = inputs[index].unflatten(2, (3, 2, 16))[:, :, 2].transpose(1, 2)
        assert error((weights @ values).transpose(1, 2).flatten(2), outputs[index]) < RELATIVE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder.get_attention_maps(video)[0].dtype == torch.float32
    keep = torch.tensor([[0, 5, 9], [1, 2, 70]])
    assert encoder.get_attention_maps(video, keep=keep)[0].shape == (2, 2, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_classifier_without_a_head_gives_features(backend):
    model = classifier().eval()
    model.backend = backend
    video = clip(model.config)
    features, logits = model.features(video), model(video)
    tokens = model.forward_features(video)
    assert tokens.shape == (2, 73, 32)
    assert torch.equal(model.forward_head(tokens), logits)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), features)
    bare = checkpoint.resize(model, num_classes=0)
    assert isinstance(bare.head, nn.Identity) and not [name for name in bare.state_dict() if name.startswith("head")]
    assert torch.equal(bare(video), features)
    again = checkpoint.resize(bare, num_classes=3)
    assert again(video).shape == (2, 3) and torch.equal(again.features(video), features)
    model.reset_classifier(0)
    assert torch.equal(model(video), features) and model.config.num_classes == 0
    model.reset_classifier(7)
    assert model(video).shape == (2, 7) and model.config.num_classes == 7
    with pytest.raises(ValueError, match="num_classes to be a positive integer, got -1"):
        model.reset_classifier(-1)


def test_a_classifier_without_a_head_is_saved_and_read(tmp_path):
    model = classifier(num_classes=0).eval()
    checkpoint.save(model, tmp_path / "model.safetensors")
    again = checkpoint.load(tmp_path / "model.safetensors").eval()
    assert torch.equal(again(clip(model.config)), model(clip(model.config)))
    from_mae = checkpoint.classifier_from_autoencoder(autoencoder(), num_classes=0).eval()
    assert from_mae(clip(from_mae.config)).shape == (2, 32)


# --- masks ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_a_value(backend):
    model = autoencoder(decoder_mask_ratio=0.5)
    model.backend = backend
    video, noise = clip(model.config), random_noise(model.config)
    phase = torch.tensor([3, 1])
    mask = model.sample_mask(2, noise=noise, phase=phase)
    assert isinstance(mask, Mask)
    counts = model.config.token_counts()
    assert (mask.keep.shape, mask.masked.shape) == ((2, counts.visible), (2, counts.reconstructed))
    expected, out = model(video, noise=noise, phase=phase), model(video, mask=mask)
    assert torch.equal(out.pred, expected.pred)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)  # summed in another order
    assert torch.equal(out.keep, mask.keep) and torch.equal(out.masked, mask.masked)
    assert not torch.equal(model(video, noise=noise).masked, mask.masked)  # another phase
    assert torch.equal(model(video, noise=noise).masked, model(video, noise=noise, phase=0 * phase).masked)
    drawn = [model.sample_mask(2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].masked, drawn[1].masked) and not torch.equal(drawn[0].masked, drawn[2].masked)


def test_masks_that_do_not_fit_are_refused():
    model = autoencoder()
    video, noise = clip(model.config), random_noise(model.config)
    mask = model.sample_mask(2, noise=noise)
    for beside in ({"noise": noise}, {"mask_ratio": 0.5}, {"generator": torch.Generator()}, {"phase": torch.zeros(2).long()}):
        with pytest.raises(ValueError, match=f"expected a mask or what one is made of, got mask and {next(iter(beside))}"):
            model(video, mask=mask, **beside)
    for bad, message in (
        (mask.keep, r"mask to be a Mask\(keep, masked\), got Tensor"),
        (Mask(mask.keep[:1], mask.masked), r"mask.keep \[2, \*\] \(B, tokens\) int64, got \[1, 18\]"),
        (Mask(mask.keep, mask.masked.float()), r"mask.masked \[2, \*\] .* got \[2, 54\] torch.float32"),
        (Mask(mask.masked, mask.masked), "with 72 tokens at most, got 54 and 54"),
        (Mask(mask.keep, mask.keep), "no token twice in a row of mask.keep and mask.masked"),
    ):
        with pytest.raises(ValueError, match=message):
            model(video, mask=bad)
    tubes = autoencoder(mask_strategy="tube")
    with pytest.raises(ValueError, match="expected noise that keeps or masks complete tubes"):
        tubes(video, noise=noise)
    assert tubes(video, mask=mask).loss.isfinite()  # a mask that is given is taken as it is


# --- what torch's state must not change ---


def test_the_default_dtype_changes_no_frames():
    configs = [MaskedAutoencoderConfig(num_frames=frames) for frames in (16, 32, 64)]
    expected = [config.frames for config in configs]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [config.frames for config in configs] == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert 28 in expected[1] and 29 not in expected[1]


@pytest.mark.parametrize("width, heads", [(36, 3), (20, 2), (272, 2), (4, 1)])
def test_heads_without_a_kernel_are_refused_with_the_configuration(width, heads):
    with pytest.raises(ValueError, match=f"width to be num_heads {heads} times a head dim that is a multiple of 8"):
        autoencoder(width=width, num_heads=heads)
    with pytest.raises(ValueError, match=f"decoder_width to be decoder_num_heads {heads} times a head dim"):
        autoencoder(decoder_width=width, decoder_num_heads=heads)


# --- torch.func and the FLOP counter on full models ---


def test_functional_gradients_of_a_model():
    results = {}
    model = autoencoder()
    video, noise = clip(model.config, 3), random_noise(model.config, 3)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, video, noise):
        return functional_call(model, parameters, (video,), {"noise": noise}).loss

    for backend in BACKENDS:
        model.backend = backend
        results[backend] = grad(loss)(parameters, video, noise)
        each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, video[:, None], noise[:, None])
        for name, value in results[backend].items():  # the loss is a mean over clips of equal masks
            assert error(each[name].mean(dim=0), value) < 10 * RELATIVE, name
    for name, value in results["reference"].items():
        assert error(results["ops"][name], value) < 10 * RELATIVE, name
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
    model.backend = "ops"
    with pytest.raises(RuntimeError, match="forward mode .* use stmae.reference"):
        jvp(lambda parameters: loss(parameters, video, noise), (parameters,), (tangents,))
    model.backend = "reference"
    assert jvp(lambda parameters: loss(parameters, video, noise), (parameters,), (tangents,))[1].abs() > 0


@pytest.mark.parametrize("make", [autoencoder, classifier])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_flops_of_a_model_are_those_of_the_reference(make, checkpointed):
    model = make()
    model.checkpoint_activations = checkpointed
    config, counts = model.config, {}
    noise = {"noise": random_noise(config)} if make is autoencoder else {}
    for backend in BACKENDS:
        model.backend = backend
        with FlopCounterMode(display=False) as counter:
            out = model(clip(config), **noise)
            forward = counter.get_total_flops()
            (out.loss if make is autoencoder else out.sum()).backward()
        counts[backend] = forward, counter.get_total_flops() - forward
    if make is autoencoder:  # the reference projects all patches, forward and backward, the kernels the visible ones
        tokens = config.token_counts()
        more = 2 * 2 * tokens.masked * config.width * config.in_channels * 2 * 4 * 8
        counts["reference"] = tuple(count - more for count in counts["reference"])
    assert counts["ops"] == counts["reference"]
    assert counts["ops"][0] > 0


def test_dir_shows_what_there_is():
    shown = dir(stmae)
    assert {"checkpoint", "masking", "models", "ops", "reference", "show_config", "training"} <= set(shown)
    assert all(hasattr(stmae, name) for name in shown)
    assert not {"os", "Path"} & set(shown)
    assert shown == sorted(shown)
