"""What others do to a model's layers takes effect: adapters, parametrizations, pruning, quantization, sharding, compilation."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from stmae.models import VideoClassifier
from tests.support.small_models import BACKENDS, RELATIVE, autoencoder, classifier, clip, error, random_noise

TARGETS = ("qkv", "proj", "fc1", "fc2")


def run(model):
    config = model.config
    return model(clip(config)) if isinstance(model, VideoClassifier) else model(clip(config), noise=random_noise(config)).pred


def linears(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def on(backend, model):
    model.backend = backend
    return model


def train_twice(model):
    """Two steps of SGD; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = run(model).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_lora_trains_and_merges(make, backend):
    peft = pytest.importorskip("peft")
    model = on(backend, make())
    before = run(model).detach()
    config = peft.LoraConfig(r=2, target_modules=list(TARGETS), modules_to_save=["head"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    inputs = (clip(model.config),), ({} if make is classifier else {"noise": random_noise(model.config)})

    def forward():
        out = adapted(*inputs[0], **inputs[1])
        return out if make is classifier else out.pred

    assert error(forward(), before) < RELATIVE  # B starts at zero
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    after = forward()
    assert error(after, before) > 1e-2
    after.square().sum().backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(TARGETS) * len(model.blocks()) + 2
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
    merged = adapted.merge_and_unload()
    assert error(run(merged), after) < RELATIVE


@pytest.mark.parametrize("key_bias", [True, False])
def test_a_lora_adapter_learns_and_is_saved_loaded_and_merged(key_bias, tmp_path):
    """The recipe of docs/weights.md."""
    peft = pytest.importorskip("peft")
    model = classifier(num_classes=2, key_bias=key_bias).train()
    model.save_pretrained(tmp_path / "start")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), modules_to_save=["head"])
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    labels = torch.arange(4) % 2
    video = torch.randn(4, *model.config.video_shape) + labels.view(-1, 1, 1, 1, 1)
    losses = []
    for _ in range(15):
        losses.append(nn.functional.cross_entropy(adapted(video), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = adapted(video)
    again = peft.PeftModel.from_pretrained(VideoClassifier.from_pretrained(tmp_path / "start"), tmp_path / "adapter")
    assert error(again(video), expected) < 1e-6
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert error(VideoClassifier.from_pretrained(tmp_path / "merged")(video), expected) < RELATIVE


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_weights_stay_zero_through_training(backend):
    model, dense = (on(backend, autoencoder()) for _ in range(2))
    for network in (model, dense):
        for _, layer in linears(network):
            prune.l1_unstructured(layer, "weight", 0.5)
    for _, layer in linears(dense):
        prune.remove(layer, "weight")
    assert error(run(model), run(dense)) < RELATIVE
    train_twice(model)
    for _, layer in linears(model):
        prune.remove(layer, "weight")
        assert (layer.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "orthogonal"])
def test_parametrized_weights_are_used_and_trained(which, backend):
    model = on(backend, autoencoder().eval())
    before = run(model)
    apply = {
        "weight_norm": parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old spectral_norm": nn.utils.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }[which]
    for block in model.blocks():
        for name in TARGETS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm is deprecated
                apply(getattr(block, name))
    if which == "old spectral_norm":  # its power iterations run when the layer is called in training
        model.train()
        for _ in range(50):
            run(model)
        model.eval()
    after = run(model)
    if "weight_norm" in which:  # another parametrization of the same weight
        assert error(after, before) < RELATIVE
    else:
        assert error(after, before) > 1e-2
        for block in model.blocks():
            assert torch.linalg.matrix_norm(block.qkv.weight, 2).item() == pytest.approx(1, abs=0.3)
    plain = on(backend, autoencoder().eval())
    with torch.no_grad():
        for block, other in zip(model.blocks(), plain.blocks()):
            for name in TARGETS:
                getattr(other, name).weight.copy_(getattr(block, name).weight)
    assert error(after, run(plain)) < RELATIVE
    model.train()
    losses = train_twice(model)
    assert losses[0] != losses[1]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization(backend):
    model = on(backend, classifier(width=64).eval())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [name for name, _ in linears(quantized) if type(quantized.get_submodule(name)) is nn.Linear]
    with torch.no_grad():
        assert 0 < error(run(quantized), run(model)) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call(backend):
    model, other = on(backend, autoencoder(0)), on(backend, autoencoder(1))
    video, noise = clip(model.config), random_noise(model.config)
    parameters = {name: value.detach().requires_grad_() for name, value in other.named_parameters()}
    out = torch.func.functional_call(model, parameters, (video,), {"noise": noise})
    assert torch.equal(out.pred, run(other))
    out.loss.backward()
    other(video, noise=noise).loss.backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["none", "hooks", "parametrizations"])
def test_compiles_without_graph_breaks(change, backend):
    model = on(backend, autoencoder())
    if change == "hooks":
        model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        model.decoder.blocks[0].qkv.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "parametrizations":
        parametrizations.weight_norm(model.encoder.blocks[0].qkv)
    torch.compiler.reset()  # torch guards no hooks: a graph of a model without them would be taken for one with them
    video, noise = clip(model.config), random_noise(model.config)
    expected = model(video, noise=noise)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(video, noise=noise)
    assert error(out.pred, expected.pred) < RELATIVE
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[name]) < 10 * RELATIVE, name


def test_a_compiled_block_is_called_compiled():
    model = autoencoder()
    expected = run(model)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks():
        block.compile(backend=compiler)
    assert error(run(model), expected) < RELATIVE
    assert len(graphs) >= 3  # encoder, decoder, and the decoder's last, of which only masked tokens are wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_adapters_and_backend_survive_copies(backend):
    model = on(backend, autoencoder())
    model.encoder.blocks[0].register_forward_hook(_double)
    parametrized = copy.deepcopy(model)
    parametrizations.weight_norm(parametrized.encoder.blocks[0].fc1)
    for original, other in (
        (model, copy.deepcopy(model)),
        (model, pickle.loads(pickle.dumps(model))),
        (parametrized, copy.deepcopy(parametrized)),
    ):
        assert all(block.backend == backend for block in other.blocks())
        assert torch.equal(run(other), run(original))


def _double(module, inputs, output):
    return 2 * output


class Checkpointed(nn.Module):
    """A block that another library wraps."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_wrapped_blocks():
    model = autoencoder()
    expected = run(model)
    for blocks in (model.encoder.blocks, model.decoder.blocks):
        for index, block in enumerate(blocks):
            blocks[index] = Checkpointed(block)
    out = run(model)
    assert error(out, expected) < RELATIVE
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def _sharded(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        _compare_sharded(rank)
        gc.collect()
        torch.distributed.barrier()
    finally:  # as in training: with nothing of the group alive, its end joins gloo's threads, which else may abort at exit
        gc.collect()
        torch.distributed.destroy_process_group()


def _compare_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    for backend in BACKENDS:
        model = on(backend, autoencoder())
        video, noise = clip(model.config), random_noise(model.config)
        expected = model(video, noise=noise)
        expected.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        model = on(backend, autoencoder())
        called = []
        for block in model.blocks():
            block.fc1.register_forward_hook(lambda *_, called=called: called.append(1))
            fully_shard(block)
        fully_shard(model)
        out = model(video[rank : rank + 1], noise=noise[rank : rank + 1])
        out.loss.backward()
        assert len(called) == 4
        assert error(out.pred, expected.pred[rank : rank + 1]) < RELATIVE
        for name, parameter in model.named_parameters():
            assert error(parameter.grad.full_tensor(), gradients[name]) < 10 * RELATIVE, name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fsdp2_computes_what_one_process_does(tmp_path):
    torch.multiprocessing.spawn(_sharded, args=(str(tmp_path),), nprocs=2)
