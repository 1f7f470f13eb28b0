"""``stmae plan``: the numbers of a recipe on given GPUs, and the memory that it expects."""

import dataclasses
import functools
import math
import re

import pytest
import torch

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.training import cli
from stmae.training.commands import plan
from stmae.training.config import DetectionConfig, FinetuneConfig, PretrainConfig, parse
from stmae.training.data.batch_sampler import VideoOrder
from stmae.training.data.clip_shapes import ClipShapes
from stmae.training.data.loader import ClipLoader
from stmae.training.data.packed_batch_sampler import PackedBatchSampler, PackedOrder
from stmae.training.data.packed_clips import PackedClips
from stmae.training.planning import memory as estimates
from tests.support.synthetic_video import write_video

ENCODER = {"image_size": 64, "num_frames": 8, "patch_size": 8, "width": 64, "depth": 3, "num_heads": 2}
AUTOENCODER = MaskedAutoencoderConfig(**ENCODER, decoder_width=48, decoder_depth=2, decoder_num_heads=3)
CLASSIFIER = VideoClassifierConfig(**ENCODER, num_classes=5)


def saved_bytes(config, batch, bf16, checkpointed, clips=None):
    """Bytes of all that the forward pass keeps for the backward pass, but parameters and the video; of a list of ``clips`` (T, H,
    W), ``batch`` times each."""
    torch.manual_seed(0)
    model = (MaskedAutoencoder if isinstance(config, MaskedAutoencoderConfig) else VideoClassifier)(config)
    model.checkpoint_activations = checkpointed
    video = torch.randint(0, 256, (batch, *config.video_shape), dtype=torch.uint8)
    if clips is not None:
        video = batch * [torch.randint(0, 256, (3, *clip), dtype=torch.uint8) for clip in clips]
        model([*video[:1]])  # positions of grids are kept by grid
    given = {tensor.untyped_storage().data_ptr() for tensor in (*video, *model.parameters())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is given out twice
        return tensor

    def keeping(residual, *inputs):
        for x in inputs[:2]:
            if x is not None:
                keep(x)
        return residual(*inputs)

    if checkpointed:  # a block's input is then held by what computes it again, not by the graph
        for block in model.blocks():
            block.residual = functools.partial(keeping, block.residual)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, bf16):
        model(video)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        AUTOENCODER,
        AUTOENCODER.replace(mask_ratio=0.5, predicted_frames=8, class_token=False),
        AUTOENCODER.replace(mask_strategy="tube", decoder_depth=1),
        AUTOENCODER.replace(decoder_mask_ratio=0.5),
        AUTOENCODER.replace(target="hog"),
        CLASSIFIER,
        CLASSIFIER.replace(class_token=False, mlp_ratio=2.0),
    ],
    ids=["plain", "half", "tube", "dual", "hog", "classifier", "narrow classifier"],
)
def test_the_estimate_of_activations_is_what_a_forward_pass_keeps(config, bf16, checkpointed):
    """Within 5 %: what is left out are ids and the ends' small tensors. The difference of two batches, for copies of weights."""
    measured = (saved_bytes(config, 4, bf16, checkpointed) - saved_bytes(config, 2, bf16, checkpointed)) / 2
    expected, _ = estimates.activation_bytes(config, bf16=bf16, checkpointed=checkpointed, gpu=False)
    assert expected == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_estimate_of_packed_batches_is_what_a_forward_pass_keeps(bf16, checkpointed):
    clips = [(8, 96, 64), (16, 64, 48), (2, 104, 104)]
    measured = [saved_bytes(AUTOENCODER, batch, bf16, checkpointed, clips) for batch in (4, 2)]
    counts = [AUTOENCODER.token_counts(grid=(T // 2, H // 8, W // 8)) for T, H, W in clips]
    options = {"bf16": bf16, "checkpointed": checkpointed, "gpu": False}
    expected = sum(estimates.activation_bytes(AUTOENCODER, counts=own, **options)[0] for own in counts)
    assert expected == pytest.approx((measured[0] - measured[1]) / 2, rel=0.05)


def test_state_is_16_bytes_a_parameter_and_what_ddp_fsdp_and_bf16_add():
    size, blocks = estimates.parameters(AUTOENCODER)
    assert size == sum(p.numel() for p in MaskedAutoencoder(AUTOENCODER).parameters()) and len(blocks) == 5
    alone = plan.Config(recipe="x", memory=1, precision="float32")

    def state(**changes):
        return estimates.estimate(AUTOENCODER, dataclasses.replace(alone, **changes)).state

    assert state() == 16 * size
    assert state(precision="bf16") == 18 * size
    assert state(gpus=4) == 20 * size
    assert state(gpus=4, parallel="fsdp") == 4 * size + 8 * max(blocks)
    assert state(checkpoint_activations=True, precision="bf16") == 16 * size + 2 * max(blocks)


def make(**settings):
    return plan.run(plan.Config(**{"recipe": "paper-large", "memory": 80, "gpus": 8, **settings}))


def test_the_papers_plan(capsys):
    numbers = make()
    assert numbers["steps"] == 93_750 and numbers["steps of warm-up"] == 14_062  # 200 passes over 240,000 videos; 30 of them
    assert numbers["learning rate"] == pytest.approx(1.6e-3) and numbers["clips a step"] == 2048
    assert numbers["clips on a GPU at a time"] * 8 * numbers["micro-batches a step"] == 2048
    printed = capsys.readouterr().out
    assert re.search(r"GPUs +8 +128\n", printed) and re.search(r"videos a step +512 +512\n", printed)
    assert numbers["command"].startswith(
        "torchrun --nproc_per_node 8 -m stmae.training pretrain --preset paper-large --data DATA"
    )


def test_another_batch_and_data_change_rate_and_steps_by_the_rule(capsys):
    numbers = make(batch=64, gpus=1, videos=1000)
    assert numbers["learning rate"] == pytest.approx(2e-4) and numbers["steps"] == 3125  # 200 * 1000 / 64
    assert "--optimizer.batch 64" in numbers["command"] and numbers["command"].startswith("stmae pretrain")
    assert re.search(r"videos a step +64 +512\n", capsys.readouterr().out)  # what the paper used stands beside it


def test_repeats_count_in_finetunings_rate():
    numbers = make(recipe="paper-large-finetune", memory=24, batch=128)
    assert numbers["learning rate"] == pytest.approx(2.4e-3)  # 4.8e-3 at 512 clips, here 256
    assert "--checkpoint WEIGHTS" in numbers["command"]


@pytest.mark.parametrize("memory", [16, 80])
def test_what_is_planned_fits_and_fewer_parts_would_not(memory):
    numbers = make(memory=memory, gpus=4)
    parts = numbers["micro-batches a step"]
    estimate = estimates.estimate(plan.read_recipe("paper-large")[1].model, plan.Config(recipe="x", memory=memory, gpus=4))
    assert numbers["GB of a GPU: in all, expected"] <= memory
    assert parts == 1 or estimate.total(128 // (parts // 2) * 4) > memory * 1e9


@pytest.mark.parametrize("name", ["paper-huge", "videomae-base-ssv2", "paper-base-finetune", "paper-large-finetune-ava"])
def test_the_planned_command_is_understood(name):
    numbers = make(recipe=name, gpus=4, memory=80, parallel="fsdp", checkpoint_activations=True)
    command, _, options = numbers["command"].partition("stmae.training ")[2].partition(" --")
    config = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "finetune detector": DetectionConfig}[command]
    made = parse(config, f"--{options}".split(), prog="stmae", description="")
    assert made.optimizer.accumulate == numbers["micro-batches a step"]
    assert made.run.parallel == "fsdp" and made.run.checkpoint_activations


def test_a_plan_of_packed_batches(capsys):
    numbers = make(recipe="one-gpu-base-native", memory=24, gpus=1)
    recipe = plan.read_recipe("one-gpu-base-native")[1]
    shapes = ClipShapes(recipe.model, recipe.clips)
    assert numbers["tokens a step"] == recipe.optimizer.tokens == 256 * 1724
    assert numbers["videos a step"] == pytest.approx(recipe.optimizer.tokens / shapes.mean_cost)
    assert numbers["steps"] == math.ceil(50 * 240_000 / numbers["videos a step"])
    assert numbers["learning rate"] == pytest.approx(make(recipe="one-gpu-base", memory=24, gpus=1)["learning rate"])
    assert numbers["GB of a GPU: in all, expected"] <= 24 and "Batches are packed" in capsys.readouterr().out
    more = make(recipe="one-gpu-base-native", memory=40, gpus=2, tokens=10**6)
    assert more["learning rate"] == pytest.approx(1.6e-3 / 512 * 10**6 / (4 * 1724))
    assert more["micro-batches a step"] < 10 and "--optimizer.tokens 1000000" in more["command"]
    options = more["command"].partition(" --preset")[2]
    made = parse(PretrainConfig, f"--preset{options}".split(), prog="stmae", description="")
    assert made.optimizer.tokens == 10**6 and made.optimizer.accumulate == more["micro-batches a step"]
    counted = make(recipe="one-gpu-base-native", memory=24, gpus=1, batch=32)
    assert counted["videos a step"] == 32 and "--optimizer.batch 32 --optimizer.tokens null" in counted["command"]


@pytest.mark.parametrize("more", [{}, {"batch": 32}])
def test_the_planned_memory_of_the_data_workers_is_what_they_take(more):
    numbers = make(recipe="one-gpu-base-native", memory=40, gpus=1, videos=5000, **more)
    recipe = plan.read_recipe("one-gpu-base-native")[1]
    settings = more or {"tokens": recipe.optimizer.tokens}
    shapes, steps = ClipShapes(recipe.model, recipe.clips), math.ceil(5000 / numbers["videos a step"])
    order = PackedOrder(VideoOrder([(5000, 1.0)], 0), shapes, [False] * 5000, seed=0, **settings)
    parts = numbers["micro-batches a step"]
    sampler = PackedBatchSampler(order, num_steps=steps, accumulate=parts)
    dataset = PackedClips([None] * 5000, recipe.clips, shapes=shapes, seed=0, sample_mask=None)
    loader = ClipLoader(dataset, sampler, 24, held=2 * parts)
    assert numbers["GB beside a GPU: clips of data workers"] == pytest.approx(loader.shared_bytes / 1e9, rel=0.1)


def test_a_token_of_a_packed_plan_costs_no_less_than_in_any_clip():
    recipe = plan.read_recipe("cpu-small-native")[1]
    shapes, config = ClipShapes(recipe.model, recipe.clips), plan.Config(recipe="x", memory=1)
    token = estimates.estimate(recipe.model, config, shapes).clip
    for slices in shapes.slices:
        for area in range(shapes.areas[0], shapes.areas[1] + 1, 5):
            counts = shapes.counts(slices, area)
            clip = sum(estimates.activation_bytes(recipe.model, bf16=True, counts=counts)) + counts.tokens * shapes.token_bytes
            assert clip <= token * shapes.cost(slices, area) * 1.05  # in between rounding makes some of them a little dearer


def test_several_machines():
    words = make(gpus=16)["command"]
    assert words.startswith("torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29400 --nproc_per_node 8 ")


def test_a_file_of_settings_and_weights_are_recipes_too(tmp_path):
    write_video(tmp_path / "clip.mp4", 20)
    checkpoint.save(VideoClassifier(CLASSIFIER), tmp_path / "model.safetensors")
    (tmp_path / "mine.yaml").write_text("command: finetune\noptimizer: {batch: 4}\n")
    numbers = make(
        recipe=str(tmp_path / "mine.yaml"), gpus=1, data=str(tmp_path), encoder=str(tmp_path / "model.safetensors"), memory=2
    )
    assert numbers["videos in the data"] == 1 and numbers["videos a step"] == 4
    assert f"finetune --config {tmp_path}/mine.yaml --data {tmp_path}" in numbers["command"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"memory": 4},
            r"a single video of 4 clips needs 10\.\d GB, of which 7\.\d GB .* a GPU has 4 GB; .*both needs 2\.\d GB$",
        ),
        ({"memory": 4, "gpus": 1}, r"a GPU has 4 GB; --checkpoint_activations true needs \d\.\d GB$"),
        ({"gpus": 3}, r"a batch of 512 videos does not divide into 3 GPUs: try --batch 510 or 513"),
        ({"batch": 2}, r"try --batch 8$"),
        (
            {"recipe": "one-gpu-base-native", "tokens": 30_000},
            r"of 30000 tokens does not divide into 8 GPUs: expected 1",
        ),
        ({"recipe": "one-gpu-base-native", "memory": 4, "gpus": 1}, r"it does not fit: .* a GPU has 4 GB; --checkpoint_act"),
        ({"recipe": "paper-base-finetune", "tokens": 1000}, "tokens: expected null for 'stmae finetune', got 1000"),
        ({"tokens": 1000, "batch": 8}, "tokens: expected null beside batch 8, got 1000"),
        ({"gpus": 0}, "gpus: expected more than 0, got 0"),
        ({"memory": 0}, "memory: expected more than 0, got 0"),
        ({"videos": 0}, "videos: expected more than 0, got 0"),
        ({"recipe": "nonsense"}, "recipe: expected a file of settings or one of the presets cpu-small, "),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_recipe_must_name_its_command(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("optimizer: {batch: 4}\n")
    assert cli.main(["plan", "--recipe", str(tmp_path / "mine.yaml"), "--memory", "24"]) == 1
    assert (
        "expected 'preset: NAME' or 'command: ' and one of pretrain, finetune, finetune detector at its top"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="encoder: expected a pre-training preset or weights"):
        (tmp_path / "mine.yaml").write_text("command: finetune\n")
        make(recipe=str(tmp_path / "mine.yaml"))


def test_a_recipe_with_a_data_set_of_its_own_is_planned_on_it(tmp_path, capsys):
    numbers = make(recipe="videomae-base-finetune-ucf101", gpus=1, memory=80)
    assert numbers["videos in the data"] == 9537 and numbers["steps"] == -(-100 * 9537 // 128)
    assert "videomae-base-finetune-ucf101, on UCF101" in capsys.readouterr().out
    images = make(recipe="paper-large-finetune-imagenet", gpus=8, memory=80)
    assert images["videos in the data"] == 1_281_167
    clips = make(recipe="paper-large-finetune", gpus=8, memory=80)
    assert images["GB of a GPU: activations"] / images["clips on a GPU at a time"] < 0.2 * (
        clips["GB of a GPU: activations"] / clips["clips on a GPU at a time"]
    )  # 196 tokens instead of 1568
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("a,1,0,0,1,1,1,0\na,1,0,0,1,0.5,2,1\nb,1,0,0,1,1,1,0\n")
    assert make(recipe="paper-large-finetune-ava", data=str(boxes))["videos in the data"] == 2
