"""Hugging Face's VideoMAE on this library's ops (`stmae.integrations.transformers.accelerate`) beside the same model on its own.

Forward and backward of a pre-training and of a classification step, from float clips as its image processor makes them; the
model on its own runs with SDPA.

Both sides have the same weights, clip and mask; the loss and all gradients are compared before anything is timed.
"""

import copy

import pytest
import torch

from bench.steps import precision

SIZES = {
    "small": dict(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        decoder_hidden_size=192,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=768,
    ),
    "base": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),  # VideoMAE's ViT-B, as is the rest by default
}
KINDS = {"pretraining": "VideoMAEForPreTraining", "classification": "VideoMAEForVideoClassification"}
TARGET = 1.5


def sides(kind, size, dtype, device, batch):
    """{name: a call that computes the loss and all gradients}; raises AssertionError where they differ."""
    import transformers

    from stmae.integrations.transformers import accelerate

    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**SIZES[size], attn_implementation="sdpa", norm_pix_loss=True)
    plain = getattr(transformers, KINDS[kind])(config).to(device).train()
    models = {"ours": accelerate(copy.deepcopy(plain)), "huggingface": plain}
    given = {"pixel_values": torch.randn(batch, config.num_frames, 3, config.image_size, config.image_size, device=device)}
    if kind == "pretraining":
        places = (config.image_size // config.patch_size) ** 2
        tube = torch.rand(batch, places).argsort(1).argsort(1) >= places // 10  # 19 of 196 places are visible
        given["bool_masked_pos"] = tube.repeat(1, config.num_frames // config.tubelet_size).to(device)
    else:
        given["labels"] = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(model):
        def run():
            model.zero_grad(set_to_none=True)
            with precision(dtype, device):
                loss = model(**given).loss
            loss.backward()
            return loss.detach()

        return run

    steps = {name: step(model) for name, model in models.items()}
    loss, expected = (steps[name]().item() for name in ("ours", "huggingface"))
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    assert abs(loss - expected) < tolerance * abs(expected), f"loss {loss}, theirs {expected}"
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    whole = sum(grad.float().square().sum() for grad in grads.values()) ** 0.5
    for name, parameter in models["ours"].named_parameters():
        assert (parameter.grad - grads[name]).norm() < 3 * tolerance * whole, f"{name}: gradients differ"
    return steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def bench_transformers(size, kind, dtype, compare, device, full):
    pytest.importorskip("transformers")
    if not full and size != "small":
        pytest.skip("--full runs the larger model")
    steps = sides(kind, size, dtype, device, batch=1 if device == "cpu" else 8)
    compare(**steps, target={"huggingface": TARGET}, seconds=60 if full else 6)
