"""timm's Vision Transformer on this library's ops: the same outputs and gradients as on its own."""

import copy
import io

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer  # noqa: E402

from stmae.integrations.timm import accelerate, restore  # noqa: E402
from tests.support.small_models import error  # noqa: E402


def make(**changes):
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    model = VisionTransformer(**{**small, **changes})
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def run(model, images, seed=2):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # of dropout
    out = model(images)
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CHANGES = {
    "default": {},
    "layer scale": {"init_values": 0.1, "qkv_bias": False},
    "norms everywhere": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "dropout": {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.2},
    "other activation": {"act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg"},
    "a head dim that no kernel takes": {"num_heads": 12},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_same_outputs_and_gradients(changes):
    model = make(**changes).train()
    expected, expected_grads = run(model, IMAGES)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert accelerate(model) is model
    out, grads = run(model, IMAGES)
    assert error(out, expected) < 1e-5
    assert grads.keys() == expected_grads.keys()
    largest = max(value.abs().max() for value in expected_grads.values())
    for name, value in expected_grads.items():  # that of k_norm.bias, which no softmax sees, is rounding alone
        assert (grads[name] - value).abs().max() <= 1e-4 * max(value.abs().max(), 1e-3 * largest), name
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert torch.equal(run(restore(model), IMAGES)[0], expected)


def test_autocast():
    model = make()
    exact = make().double()(IMAGES.double())
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IMAGES)
        out = accelerate(model)(IMAGES)
    assert (out - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2**-8 * exact.abs().max()


def test_a_mask_is_left_to_timm():
    model = make()
    x = torch.randn(2, 17, 48)
    mask = torch.rand(17, 17) > 0.3
    mask[:, 0] = True
    expected = model.blocks[0](x, attn_mask=mask)
    assert torch.equal(accelerate(model).blocks[0](x, attn_mask=mask), expected)


def test_it_is_copied_and_saved_as_before():
    model = accelerate(make())
    out = model(IMAGES)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.blocks[0].mlp.fc2.weight.mul_(3)
    assert error(copied(IMAGES), out) > 1e-2 and torch.equal(model(IMAGES), out)
    torch.save(model, io.BytesIO())


def test_hooks_and_adapters_count():
    model = accelerate(make())
    before = model(IMAGES)
    seen = []
    block = model.blocks[0]
    for name in ("attn.qkv", "norm2", "mlp.fc1", "ls1"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert error(model(IMAGES), before) < 1e-5
    assert seen == ["attn.qkv", "ls1", "norm2", "mlp.fc1"]

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, **kwargs):
            return 2 * self.inner(x, **kwargs)

    for name in ("attn", "mlp", "norm1"):
        changed = accelerate(make())
        setattr(changed.blocks[0], name, Twice(getattr(changed.blocks[0], name)))
        assert error(changed(IMAGES), before) > 1e-3
        assert error(changed(IMAGES), restore(copy.deepcopy(changed))(IMAGES)) < 1e-5


def test_another_model_is_refused():
    with pytest.raises(ValueError, match=r"timm\.models\.vision_transformer\.Block, got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got VisionTransformer"):
        accelerate(make(block_fn=ParallelScalingBlock))
