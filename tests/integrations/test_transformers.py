"""Hugging Face's VideoMAE on this library's ops: the same outputs and gradients as on its own."""

import copy
import io

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from stmae.integrations.transformers import accelerate, restore  # noqa: E402
from tests.support.small_models import SMALL_VIDEOMAE  # noqa: E402

KINDS = ["VideoMAEForPreTraining", "VideoMAEForVideoClassification", "VideoMAEModel"]


def make(kind, **changes):
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**{**SMALL_VIDEOMAE, **changes})
    config.num_labels = 5
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(kind, model):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(2, config.num_frames, config.num_channels, 32, 32, generator=generator)
    tokens = config.num_frames // config.tubelet_size * 16
    mask = torch.rand(2, tokens, generator=generator).argsort(1) >= tokens // 4
    if kind == "VideoMAEForVideoClassification":
        return {"pixel_values": clip, "labels": torch.tensor([1, 3])}
    return {"pixel_values": clip, "bool_masked_pos": mask}


def run(model, given):
    model.zero_grad(set_to_none=True)
    out = model(**given, output_hidden_states=True)
    scalar = out.last_hidden_state.square().mean() if out.get("loss") is None else out.loss
    scalar.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out, grads


def error(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize(
    "changes", [{}, {"use_mean_pooling": False, "qv_bias": False}, {"norm_pix_loss": False, "tubelet_size": 4}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_and_gradients(kind, changes):
    model = make(kind, **changes)
    given = inputs(kind, model)
    expected, expected_grads = run(model, given)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert accelerate(model) is model
    out, grads = run(model, given)
    assert out.keys() == expected.keys()
    for name in ("loss", "logits", "last_hidden_state"):
        if expected.get(name) is not None:
            assert error(out[name], expected[name]) < 1e-5, name
    for ours, theirs in zip(out.hidden_states, expected.hidden_states):
        assert error(ours, theirs) < 1e-5
    for name, value in expected_grads.items():
        assert (value is None) == (grads[name] is None), name
        if value is not None:
            assert error(grads[name], value) < 1e-4, name
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    restore(model)
    again, _ = run(model, given)
    first = "loss" if expected.get("loss") is not None else "last_hidden_state"
    assert torch.equal(again[first], expected[first])


def test_autocast():
    model = make("VideoMAEForPreTraining")
    given = inputs("VideoMAEForPreTraining", model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**given)
        out = accelerate(model)(**given)
    exact = make("VideoMAEForPreTraining").double()(given["pixel_values"].double(), given["bool_masked_pos"]).loss
    assert abs(out.loss - exact) <= 2 * abs(expected.loss - exact) + 2**-8 * exact


def test_it_is_saved_copied_and_loaded_as_before(tmp_path):
    model = accelerate(make("VideoMAEForPreTraining"))
    given = inputs("VideoMAEForPreTraining", model)
    loss = model(**given).loss
    model.save_pretrained(tmp_path)
    plain = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path)
    assert error(plain(**given).loss, loss) < 1e-5
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.decoder.head.bias.add_(1)
    assert copied(**given).loss != loss and model(**given).loss == loss
    torch.save(model, io.BytesIO())


def test_hooks_and_adapters_count():
    model = accelerate(make("VideoMAEModel"))
    given = inputs("VideoMAEModel", model)
    before = model(**given).last_hidden_state
    seen = []
    layer = model.encoder.layer[0]
    handles = [layer.register_forward_hook(lambda *_: seen.append("layer"))]
    for name in ("attention.attention.query", "attention.output", "layernorm_after", "intermediate", "output"):
        handles.append(layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)))
    assert error(model(**given).last_hidden_state, before) < 1e-5
    expected = ["attention.attention.query", "attention.output", "layernorm_after", "intermediate", "output", "layer"]
    assert seen == expected
    for handle in handles:
        handle.remove()

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer.attention.attention.value = Twice(layer.attention.attention.value)
    assert error(model(**given).last_hidden_state, before) > 1e-3


def test_a_clip_with_another_number_of_masked_patches_is_refused():
    model = accelerate(make("VideoMAEForPreTraining"))
    given = inputs("VideoMAEForPreTraining", model)
    given["bool_masked_pos"][0, given["bool_masked_pos"][0].nonzero()[0]] = False
    with pytest.raises(ValueError, match="as many masked patches in each clip"):
        model(**given)
    with pytest.raises(ValueError, match="pixel_values"):
        model(torch.zeros(1, 4, 3, 40, 32), inputs("VideoMAEForPreTraining", model)["bool_masked_pos"][:1])


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"hidden_dropout_prob": 0.1}, {"attention_probs_dropout_prob": 0.1}])
def test_what_it_cannot_compute_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        accelerate(make("VideoMAEModel", **change))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="expected a VideoMAE model of transformers, got Linear"):
        accelerate(nn.Linear(2, 2))
