"""Other libraries' models on this library's ops (`stmae.integrations`) beside the same models on their own, with SDPA.

Forward and backward of a step, without the optimizer:

    pretraining, classification   transformers' VideoMAE, a clip as its image processor makes it
    timm                          its VisionTransformer, images of 224 x 224

Both sides have the same weights and inputs; the loss and all gradients are compared before anything is timed.
"""

import copy

import pytest
import torch

from bench.steps import precision

SMALL_DECODER = dict(decoder_hidden_size=192, decoder_num_attention_heads=3, decoder_intermediate_size=768)
VIDEOMAE = {  # beside them, everything is VideoMAE's ViT-B
    "small": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **SMALL_DECODER),
    "base": {},
}
KINDS = {"pretraining": "VideoMAEForPreTraining", "classification": "VideoMAEForVideoClassification"}
TARGET = 1.5
IMAGES = 4


def videomae(kind, size, device, batch):
    """(model, keyword arguments of its loss)."""
    import transformers

    config = transformers.VideoMAEConfig(**VIDEOMAE[size], attn_implementation="sdpa", norm_pix_loss=True)
    model = getattr(transformers, KINDS[kind])(config)
    given = {"pixel_values": torch.randn(batch, config.num_frames, 3, config.image_size, config.image_size, device=device)}
    if kind == "pretraining":
        places = (config.image_size // config.patch_size) ** 2
        tubes = torch.rand(batch, places).argsort(1).argsort(1) >= places // 10  # 19 of 196 places are visible
        given["bool_masked_pos"] = tubes.repeat(1, config.num_frames // config.tubelet_size).to(device)
    else:
        given["labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return model, lambda model: model(**given).loss


def timm_vit(size, device, batch):
    import timm

    model = timm.create_model(f"vit_{size}_patch16_224")
    images = torch.randn(IMAGES * batch, 3, 224, 224, device=device)
    return model, lambda model: model(images).square().mean()


def sides(kind, size, dtype, device, batch):
    """{name: a call that computes the loss and all gradients}; raises AssertionError where they differ."""
    torch.manual_seed(0)
    if kind == "timm":
        from stmae.integrations.timm import accelerate

        plain, loss_of = timm_vit(size, device, batch)
    else:
        from stmae.integrations.transformers import accelerate

        plain, loss_of = videomae(kind, size, device, batch)
    plain = plain.to(device).train()
    models = {"ours": accelerate(copy.deepcopy(plain)), "plain": plain}

    def step(model):
        def run():
            model.zero_grad(set_to_none=True)
            with precision(dtype, device):
                loss = loss_of(model)
            loss.backward()
            return loss.detach()

        return run

    steps = {name: step(model) for name, model in models.items()}
    loss, expected = (steps[name]().item() for name in models)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    assert abs(loss - expected) < tolerance * abs(expected), f"loss {loss}, theirs {expected}"
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    norm = sum(grad.float().square().sum() for grad in grads.values()) ** 0.5
    for name, parameter in models["ours"].named_parameters():
        assert (parameter.grad - grads[name]).norm() < 3 * tolerance * norm, f"{name}: gradients differ"
    return steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [*KINDS, "timm"])
@pytest.mark.parametrize("size", VIDEOMAE)
def bench_integrations(size, kind, dtype, compare, device, full):
    pytest.importorskip("timm" if kind == "timm" else "transformers")
    if not full and size != "small":
        pytest.skip("--full runs the larger model")
    steps = sides(kind, size, dtype, device, batch=1 if device == "cpu" else 8)
    compare(**steps, target={"plain": TARGET} if kind in KINDS else None, seconds=60 if full else 6)
