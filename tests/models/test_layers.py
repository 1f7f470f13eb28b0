"""Every layer is called, and what the ops fuse where layers are plain equals what the layers compute one by one."""

import copy
import pickle

import pytest
import torch
from torch import nn

import stmae
from stmae.models.blocks import Block
from stmae.models.encoder import Encoder, PatchEmbed
from stmae.models.layers import is_plain, is_plain_linear
from stmae.models.masked_autoencoder import Decoder
from stmae.models.position import Position
from tests.support.small_models import BACKENDS, RELATIVE, autoencoder, classifier, clip, error, random_noise

LAYERS = (nn.Linear, nn.LayerNorm, nn.GELU, Block, Encoder, Decoder, PatchEmbed, Position)


def ignore(*_):
    return None


def loss_and_gradients(model):
    video = clip(model.config)
    model.zero_grad(set_to_none=True)
    if model.config.__class__.__name__.startswith("Masked"):
        loss = model(video, noise=random_noise(model.config)).loss
    else:
        loss = model(video).square().sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(model, other, tolerance=RELATIVE):
    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(model), loss_and_gradients(other)
    assert error(other_loss, loss) < tolerance
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert error(other_gradients[name], gradient) < 10 * tolerance, name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_hooks_fire_on_every_layer_and_change_no_result(make, backend):
    model = make().eval()
    model.backend = backend
    hooked = copy.deepcopy(model)
    calls = {kind: {} for kind in ("pre", "forward", "backward")}

    def count(kind, name):
        def hook(*_):
            calls[kind][name] = calls[kind].get(name, 0) + 1

        return hook

    names = [name for name, module in hooked.named_modules() if isinstance(module, LAYERS)]
    for name in names:
        module = hooked.get_submodule(name)
        module.register_forward_pre_hook(count("pre", name))
        module.register_forward_hook(count("forward", name))
        module.register_full_backward_hook(count("backward", name))
    assert len(names) > 2 * 8
    assert_same(model, hooked)
    once = dict.fromkeys(names, 1)
    assert calls["pre"] == calls["forward"] == calls["backward"] == once


@pytest.mark.parametrize("kind", LAYERS)
def test_one_kind_of_layer_called_equals_all_fused(kind):
    model = autoencoder()
    called = copy.deepcopy(model)
    modules = [module for module in called.modules() if isinstance(module, kind)]
    assert modules
    for module in modules:
        module.register_forward_hook(ignore)
    assert_same(model, called)


def test_a_hook_on_a_block_sees_the_stream():
    model = autoencoder()
    config = model.config
    seen = []
    for block in model.blocks():
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    video, noise = clip(config), random_noise(config)
    out = model(video, noise=noise)
    first, second, third, last = seen
    assert torch.equal(first[0], model.encoder.embed(video, out.keep))
    assert torch.equal(second[0], first[1]) and torch.equal(last[0], third[1])
    assert first[1].shape == (2, 1 + out.keep.shape[1], config.width)
    assert third[1].shape == (2, 1 + config.num_tokens, config.decoder_width)
    assert last[1].shape == (2, out.masked.shape[1], config.decoder_width)  # only the masked tokens leave the last block
    # The stream of a pre-norm transformer: the next block's input is the sum of all branches so far.
    assert error(model.encoder.norm(second[1]), model.encode(video, out.keep)) < 1e-5


def test_a_hook_may_change_what_a_layer_gives():
    model = autoencoder()
    video, noise = clip(model.config), random_noise(model.config)
    before = model(video, noise=noise).pred
    for name in ("encoder.blocks.0.fc1", "encoder.blocks.0", "encoder.patch_embed", "decoder.norm", "encoder.position"):
        handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 1.5)
        assert error(model(video, noise=noise).pred, before) > 1e-3, name
        handle.remove()
    assert torch.equal(model(video, noise=noise).pred, before)


def test_global_hooks_see_every_layer():
    model = autoencoder()
    expected = loss_and_gradients(model)[0]
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        loss = loss_and_gradients(model)[0]
    finally:
        handle.remove()
    assert {module for module in model.modules() if isinstance(module, LAYERS)} <= called
    assert error(loss, expected) < RELATIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_called_layers_are_as_precise_as_fused_ones(dtype):
    model = autoencoder()
    called = copy.deepcopy(model)
    for module in called.modules():
        module.register_forward_hook(ignore)
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    video, noise = clip(model.config), random_noise(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        fused, layered = model(video, noise=noise).pred, called(video, noise=noise).pred
    model.backend = "reference"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        reference = model(video, noise=noise).pred
    pixels = (video.double() / 255 - torch.tensor(model.config.mean).view(-1, 1, 1, 1)) / torch.tensor(model.config.std).view(
        -1, 1, 1, 1
    )
    expected = exact(pixels, noise=noise).pred
    bound = 2 * (reference.double() - expected).abs().max() + 2 * torch.finfo(dtype).eps * expected.abs().max()
    for result in (fused, layered):
        assert result.dtype == dtype
        assert (result.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast_with_called_layers_keeps_the_stream_in_float32(backend):
    model = autoencoder()
    model.backend = backend
    dtypes = []
    for module in model.modules():
        module.register_forward_hook(ignore)
    for block in model.blocks():
        block.register_forward_hook(lambda module, inputs, output: dtypes.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
    assert len(dtypes) == 8 and set(dtypes) == {torch.float32}
    assert loss.dtype == torch.float32 and all(gradient.isfinite().all() for gradient in gradients.values())


# --- what is plain ---


def test_what_is_plain():
    def hooked(register):
        layer = nn.Linear(2, 2)
        getattr(layer, register)(ignore)
        return layer

    class Double(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    overridden = nn.Linear(2, 2)
    overridden.forward = lambda x: x
    compiled = nn.Linear(2, 2)
    compiled.compile()
    subclassed = nn.Linear(2, 2)
    subclassed.weight = nn.Parameter(torch.Tensor._make_subclass(type("Quantized", (torch.Tensor,), {}), torch.ones(2, 2)))
    assert is_plain_linear(nn.Linear(2, 2)) and is_plain_linear(nn.Linear(2, 2, bias=False))
    assert is_plain(nn.GELU(), nn.GELU) and not is_plain(nn.ReLU(), nn.GELU)
    for layer in (
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        Double(2, 2),
        overridden,
        compiled,
        subclassed,
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.Identity(),
    ):
        assert not is_plain_linear(layer)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(ignore)
        try:
            assert not is_plain_linear(nn.Linear(2, 2))
        finally:
            handle.remove()
    assert is_plain_linear(pickle.loads(pickle.dumps(nn.Linear(2, 2))))


# --- layers in another's place ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qkv", "proj", "fc1", "fc2", "norm1", "norm2", "act"])
def test_a_layer_of_another_class_is_used(name, backend):
    model = autoencoder()
    model.backend = backend
    layer = getattr(model.encoder.blocks[1], name)

    class Other(type(layer)):
        def forward(self, x):
            return 3 * super().forward(x)

    other = copy.deepcopy(model)
    getattr(other.encoder.blocks[1], name).__class__ = Other
    video, noise = clip(model.config), random_noise(model.config)
    assert error(other(video, noise=noise).pred, model(video, noise=noise).pred) > 1e-3
    if name != "act":  # three times the layer is the layer with three times its parameters
        tripled = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in getattr(tripled.encoder.blocks[1], name).parameters():
                parameter.mul_(3)
        assert error(other(video, noise=noise).pred, tripled(video, noise=noise).pred) < RELATIVE


def test_norms_without_parameters_and_layers_without_biases():
    model = autoencoder()
    for block in model.blocks():
        width = block.norm1.normalized_shape
        block.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        block.norm2 = nn.LayerNorm(width, bias=False)
        block.fc1.bias = None
        block.proj.bias = None
    reference = copy.deepcopy(model)
    reference.backend = "reference"
    assert_same(reference, model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_head_can_be_replaced(backend):
    model = classifier().eval()
    model.backend = backend
    video = clip(model.config)
    features = model.features(video)
    model.head = nn.Identity()
    assert torch.equal(model(video), features)
    torch.manual_seed(0)
    model.head = nn.Sequential(nn.Linear(32, 7), nn.Tanh(), nn.Linear(7, 3))
    assert error(model(video), model.head(features)) < 1e-6
    mae = autoencoder()
    mae.backend = backend
    keep, masked = mae.sample_mask(2, noise=random_noise(mae.config))
    latent = mae.encode(clip(mae.config), keep)
    pred = mae.decode(latent, keep, masked)
    head, mae.decoder.head = mae.decoder.head, nn.Identity()
    assert error(head(mae.decode(latent, keep, masked)), pred) < 1e-5


def test_blocks_can_be_replaced():
    model = autoencoder()
    video, noise = clip(model.config), random_noise(model.config)
    model.encoder.blocks[0] = nn.Identity()
    shorter = autoencoder(depth=1)
    shorter.load_state_dict({key.replace("encoder.blocks.1", "encoder.blocks.0"): v for key, v in model.state_dict().items()})
    assert error(model(video, noise=noise).pred, shorter(video, noise=noise).pred) < RELATIVE
    model.decoder.blocks[-1] = nn.Identity()  # the masked tokens are taken all the same
    shorter.decoder.blocks = shorter.decoder.blocks[:-1]
    assert error(model(video, noise=noise).pred, shorter(video, noise=noise).pred) < RELATIVE


def test_the_backend_reaches_every_module_and_may_differ_in_one(monkeypatch):
    model = autoencoder()
    model.encoder.backend = "reference"
    assert model.backend == "ops" and model.decoder.backend == "ops"
    assert {block.backend for block in model.encoder.blocks} == {"reference"}
    expected = loss_and_gradients(autoencoder())[0]
    assert error(loss_and_gradients(model)[0], expected) < RELATIVE
    with pytest.raises(ValueError, match="Encoder: expected backend to be one of ops, reference, got 'cuda'"):
        model.encoder.backend = "cuda"
    model.backend = "reference"
    for name in stmae.ops.__all__:
        monkeypatch.setattr(stmae.ops, name, None)
    assert error(loss_and_gradients(model)[0], expected) < RELATIVE


def test_weights_keep_their_names():
    names = set(classifier().state_dict())
    layers = {f"{layer}.{p}" for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2") for p in ("weight", "bias")}
    assert {name for name in names if name.startswith("encoder.blocks.0.")} == {f"encoder.blocks.0.{name}" for name in layers}
    assert {name for name in names if "blocks" not in name} == {
        "encoder.patch_embed.weight",
        "encoder.patch_embed.bias",
        "encoder.position.spatial",
        "encoder.position.temporal",
        "encoder.position.class_token",
        "encoder.class_token",
        "encoder.norm.weight",
        "encoder.norm.bias",
        "head.weight",
        "head.bias",
    }
