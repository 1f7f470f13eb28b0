"""The numbers of a recipe: learning rate, schedule, parameter groups, presets, precision."""

import dataclasses
import math
import re

import pytest
import torch

from stmae.checkpoint import from_videomae
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training import cli, config
from stmae.training.config import (
    DetectionConfig,
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    from_preset,
    parse,
    preset_files,
    presets,
    to_dict,
)
from stmae.training.config.preset_files import PRESETS
from stmae.training.data.clip_shapes import ClipShapes
from stmae.training.engine import device, optimizer
from tests.support.golden import read_golden

ENCODER = {"image_size": 16, "num_frames": 4, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
SMALL = MaskedAutoencoderConfig(**ENCODER, decoder_width=8, decoder_depth=1, decoder_num_heads=1)


# Learning rate


def test_the_papers_pretraining_schedule():
    """Batch 512, base 1.6e-3, 120 of 800 effective epochs of warm-up; Kinetics-400 has 234,584 videos here."""
    paper = OptimizerConfig()
    steps = optimizer.total_steps(paper, 234_584, repeats=4)
    assert steps == math.ceil(200 * 234_584 / 512)  # 800 effective epochs are 200 passes with 4 clips each
    assert optimizer.peak_learning_rate(paper, 512) == 1.6e-3
    warmup = round(steps * 120 / 800)
    at = (0, warmup // 2, warmup, (warmup + steps) // 2, steps)
    rates = [optimizer.learning_rate(step, steps, paper, 1.6e-3) for step in at]
    assert rates == pytest.approx([0, 0.8e-3, 1.6e-3, 0.8e-3, 0], rel=1e-3, abs=1e-9)


def test_repeats_are_not_counted_in_pretrainings_batch():
    """Four times the clips of a video change neither the rate nor the videos a step, only the number of passes."""
    settings = OptimizerConfig(batch=64, base_batch=512, base_lr=1.6e-3)
    assert optimizer.peak_learning_rate(settings, settings.batch) == pytest.approx(2e-4)
    assert optimizer.total_steps(settings, 6400, repeats=1) == 4 * optimizer.total_steps(settings, 6400, repeats=4)


def test_the_rate_never_jumps_and_ends_at_min_lr():
    settings = OptimizerConfig(epochs=10, warmup_epochs=2, base_lr=1.0, batch=1, base_batch=1, min_lr=0.1)
    rates = [optimizer.learning_rate(step, 100, settings, 1.0) for step in range(101)]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) <= 1 / 20 + 1e-9
    assert max(rates) == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_no_warm_up():
    settings = OptimizerConfig(epochs=10, warmup_epochs=0, base_lr=1.0, batch=1, base_batch=1)
    assert optimizer.learning_rate(0, 100, settings, 1.0) == 1.0


# Parameter groups


def names_of(model, group):
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_biases_and_norms_are_never_decayed_tokens_and_positions_in_pretraining_only():
    model = MaskedAutoencoder(SMALL)
    decayed, kept = optimizer.weight_decay_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    kept_names = names_of(model, kept)
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, _ in model.named_parameters():
        assert (name in kept_names) == (name.endswith("bias") or name.rpartition(".")[0] in norms), name
    assert {"decoder.mask_token", "encoder.class_token", "encoder.position.spatial"} <= names_of(model, decayed)

    decayed, kept = optimizer.weight_decay_groups(model, 0.05, decay_tokens=False)
    tokens = {"decoder.mask_token", "encoder.class_token", "encoder.position.spatial", "encoder.position.temporal"}
    assert tokens <= names_of(model, kept)
    assert len(names_of(model, decayed)) + len(names_of(model, kept)) == len(dict(model.named_parameters()))


# Configuration


PRETRAINING, FINETUNING, DETECTION = presets("pretrain"), presets("finetune"), presets("finetune detector")
KINETICS_400 = 240_000  # videos to train on, about


def config_of(name):
    """A preset's configuration, for whichever command it is."""
    if name in PRETRAINING:
        return from_preset(PretrainConfig, name, data="videos", output="run")
    if name in DETECTION:
        return from_preset(DetectionConfig, name, data="boxes.csv", data_root="videos", output="run", checkpoint="weights")
    return from_preset(FinetuneConfig, name, data="videos", output="run", checkpoint="weights")


def test_every_preset_is_of_one_command():
    assert sorted(PRETRAINING + FINETUNING + DETECTION) == presets() and DETECTION


@pytest.mark.parametrize("name", presets())
def test_every_preset_makes_its_configuration_and_model(name):
    made = config_of(name)
    source = made if name in PRETRAINING else config_of(config.preset_header(name)["pretrained"])
    with torch.device("meta"):
        assert sum(p.numel() for p in MaskedAutoencoder(source.model).parameters()) > 1e5
    # What a classifier sees must be what its weights were trained on; it would load without a word. A still has no stride.
    if name in FINETUNING and made.clips.spacing != "segments" and made.model.num_frames != 1:
        assert (made.clips.stride, made.clips.spacing) == (source.clips.stride, source.clips.spacing)


@pytest.mark.parametrize("name", presets())
def test_every_setting_of_a_preset_names_its_source(name):
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    settings = [line for line in lines if re.match(r" *\w+: \S", line) and line.partition(":")[0] not in preset_files.HEADER]
    assert settings and [line for line in settings if not re.search(r"  # \w", line)] == []


@pytest.mark.parametrize("name", presets())
def test_no_preset_repeats_its_base(name):
    *bases, (_, _, own) = preset_files.with_bases(PRESETS / f"{name}.yaml")
    inherited = {}
    for _, _, settings in bases:
        inherited.update(settings)
    assert [key for key, value in own.items() if key in inherited and inherited[key] == value] == []


@pytest.mark.parametrize(
    "name, passes, batch, peak, warmup",
    [
        ("paper-base", 200, 512, 1.6e-3, 30),
        ("paper-large", 200, 512, 1.6e-3, 30),
        ("paper-huge", 200, 512, 1.6e-3, 30),
        ("paper-large-1600", 400, 512, 1.6e-3, 30),
        ("paper-base-finetune", 75, 768, 1.6e-2, 5),
        ("paper-large-finetune", 50, 256, 4.8e-3, 5),
        ("paper-huge-finetune", 75, 256, 1.6e-3, 5),
        ("videomae-base", 1600, 2048, 1.2e-3, 40),  # 1.5e-4 * 2048 / 256
        ("videomae-large", 1600, 512, 3e-4, 40),
        ("videomae-huge", 1600, 1024, 6e-4, 40),
        ("videomaev2-large", 300, 1536, 6e-3, 30),
        ("videomae-base-finetune", 75, 384, 7.5e-4, 5),  # 5e-4 * 384 / 256
        ("videomae-large-finetune", 35, 128, 1e-3, 5),
        ("videomae-huge-finetune", 50, 512, 2e-3, 5),
        ("videomae-base-ucf101", 3200, 192, 2.25e-4, 40),  # 3e-4 * 192 / 256
        ("videomae-base-hmdb51", 4800, 192, 2.25e-4, 40),
        ("videomae-base-finetune-ucf101", 100, 128, 2.5e-4, 5),  # 5e-4 * 128 / 256
        ("videomae-base-finetune-hmdb51", 50, 128, 5e-4, 5),  # 1e-3 * 128 / 256
        ("paper-base-finetune-imagenet", 100, 1024, 2e-3, 5),  # 5e-4 * 1024 / 256
        ("paper-large-finetune-imagenet", 50, 1024, 4e-3, 5),
    ],
)
def test_steps_and_rate_on_kinetics_400_are_the_sources(name, passes, batch, peak, warmup):
    """passes: over the videos, each giving ``repeats`` clips; warmup: in passes."""
    made = config_of(name)
    settings, repeats = made.optimizer, made.clips.repeats
    assert settings.batch == batch and settings.epochs == passes * repeats and settings.warmup_epochs == warmup * repeats
    assert optimizer.total_steps(settings, KINETICS_400, repeats) == math.ceil(passes * KINETICS_400 / batch)
    counted = batch if name in PRETRAINING else batch * repeats  # clips in fine-tuning, videos in pre-training
    assert optimizer.peak_learning_rate(settings, counted) == pytest.approx(peak)
    assert settings.min_lr < 0.1 * peak


@pytest.mark.parametrize("name", ["one-gpu-base", "cpu-small"])
def test_a_native_preset_is_its_base_at_equal_tokens(name):
    """As many tokens a step, the same rate, and steps that fill: a batch's largest video is a small part of it."""
    base, made = config_of(name), config_of(f"{name}-native")
    shapes = ClipShapes(made.model, made.clips, pictures=True)
    assert made.packed and not base.packed and made.model == base.model
    assert made.optimizer.tokens == base.optimizer.batch * shapes.standard_cost
    assert made.optimizer.tokens >= 2 * shapes.most_cost * (made.optimizer.accumulate > 1)
    assert made.optimizer.tokens >= made.optimizer.accumulate * shapes.most_cost
    assert shapes.mean_cost < 2 * shapes.standard_cost and shapes.sides[0] < base.model.image_size[0] < shapes.sides[1]


def test_the_preset_of_ava_is_the_sources():
    made = config_of("paper-large-finetune-ava")
    assert optimizer.peak_learning_rate(made.optimizer, made.optimizer.batch) == 1.25e-4  # VideoMAE: 2.5e-4 * 128 / 256
    assert (made.optimizer.epochs, made.optimizer.warmup_epochs, made.layer_decay, made.model.drop_path) == (30, 5, 0.75, 0.2)


@pytest.mark.parametrize("value", ["0", "1.2"])
def test_a_crop_beyond_the_frame_is_refused(value, capsys):
    argv = ["--data", "d", "--output", "o", "--checkpoint", "c", "--views.crop_pct", value]
    with pytest.raises(SystemExit):
        parse(FinetuneConfig, argv, prog="stmae finetune", description="")
    assert f"views.crop_pct: expected more than 0 and at most 1, got {value}" in capsys.readouterr().err


def test_an_image_preset_makes_an_image_model():
    made = config_of("paper-large-finetune-imagenet")
    encoder = config_of("paper-large").model
    shape = encoder.replace(num_frames=made.model.num_frames, tubelet_size=made.model.tubelet_size)
    assert shape.grid == (1, 14, 14) and shape.video_shape == (3, 1, 224, 224)
    assert (made.views.temporal, made.views.spatial, made.views.crop_pct) == (1, 1, 224 / 256)


def test_the_papers_sizes():
    millions = {}
    for name in ("base", "large", "huge"):
        with torch.device("meta"):
            model = MaskedAutoencoder(from_preset(PretrainConfig, f"paper-{name}", data="d", output="o").model)
        millions[name] = round(sum(p.numel() for p in model.encoder.parameters()) / 1e6)
    assert millions == {"base": 86, "large": 304, "huge": 632}  # ViT's, with the patch of two frames


def test_a_preset_is_refused_by_another_command(capsys):
    with pytest.raises(SystemExit):
        parse_args("--preset", "paper-base-finetune")
    printed = capsys.readouterr().err
    assert "the preset paper-base-finetune is for 'stmae finetune'; expected one for 'stmae pretrain': cpu-small, " in printed
    with pytest.raises(SystemExit):
        parse(FinetuneConfig, ["--preset", "paper-base"], prog="stmae finetune", description="")
    assert "the preset paper-base is for 'stmae pretrain'" in capsys.readouterr().err


def test_a_configuration_file_starts_from_a_preset(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper-large-1600\noptimizer: {batch: 64}\n")
    made = parse_args("--config", str(file))
    assert made.optimizer.batch == 64 and made.optimizer.epochs == 1600 and made.model.depth == 24  # each from another file
    file.write_text("preset: paper-large-finetune\n")
    for arguments, message in (
        (["--config", str(file)], "its settings are for 'stmae finetune', not for 'stmae pretrain'"),
        (["--config", str(file), "--preset", "demo"], "expected one preset to start from, got --preset demo and another in"),
    ):
        with pytest.raises(SystemExit):
            parse_args(*arguments)
        assert message in capsys.readouterr().err
    file.write_text("preset: nonsense\n")
    with pytest.raises(SystemExit):
        parse_args("--config", str(file))
    assert "mine.yaml: expected preset to be the name of one, got 'nonsense'" in capsys.readouterr().err


def test_presets_that_lead_back_to_themselves_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preset_files, "PRESETS", tmp_path)
    (tmp_path / "a.yaml").write_text("preset: b\n")
    (tmp_path / "b.yaml").write_text("preset: a\n")
    with pytest.raises(ValueError, match="a.yaml: the presets that it starts from lead back to it"):
        preset_files.with_bases(tmp_path / "a.yaml")


def parse_args(*arguments):
    return parse(PretrainConfig, ["--data", "d", "--output", "o", *arguments], prog="stmae pretrain", description="")


def test_command_line_over_file_over_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer: {base_lr: 5.0e-4, batch: 8}\nclips: {scale: [0.3, 1.0]}\n")
    made = parse_args("--optimizer.batch", "16", "--config", str(tmp_path / "mine.yaml"), "--preset", "demo")
    assert made.optimizer.batch == 16 and made.optimizer.base_lr == 5e-4 and made.clips.scale == (0.3, 1.0)
    demo = from_preset(PretrainConfig, "demo", output="o")
    assert made.model == demo.model and made.data == "d"


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    (tmp_path / "mine.json").write_text('{"data": "videos", "held_out": "/elsewhere"}')
    made = parse(PretrainConfig, ["--config", str(tmp_path / "mine.json"), "--output", "o"], prog="p", description="")
    assert made.data == str(tmp_path / "videos") and made.held_out == "/elsewhere"


def test_a_written_configuration_reads_back_the_same(tmp_path):
    import yaml

    made = parse_args("--model.image_size", "[32, 48]", "--optimizer.clip_grad", "null", "--model.mean", "[0.4, 0.5, 0.6]")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(made)))
    again = parse_args("--config", str(tmp_path / "config.yaml"))
    assert dataclasses.asdict(again) == dataclasses.asdict(made)
    assert made.model.image_size == (32, 48) and made.optimizer.clip_grad is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer.base_lr", "fast"], "optimizer.base_lr"),
        (["--no_such_setting", "3"], "no_such_setting"),
        (["--preset", "nonsense"], "expected --preset to be one of"),
        (["--config", "/nowhere.yaml"], "cannot read the settings in /nowhere.yaml"),
        (["--model.image_size", "70"], "expected image_size to be a multiple of patch_size 16 in height, got 70"),
        (["--run.precision", "fp8"], "run.precision"),
    ],
)
def test_what_is_not_understood_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(*arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_setting_in_a_file_is_named_with_the_file(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("optimizer: {learning_rate: 3}\n")
    with pytest.raises(SystemExit):
        parse_args("--config", str(tmp_path / "mine.yaml"))
    assert "mine.yaml: there is no setting 'optimizer.learning_rate'" in capsys.readouterr().err


def test_help_shows_what_would_be_used(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args("--preset", "demo", "--help")
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "--optimizer.base_lr" in printed
    batch = from_preset(PretrainConfig, "demo", output="o").optimizer.batch
    assert f"default: {batch})" in printed[printed.index("--optimizer.batch BATCH") :].partition("--optimizer.accumulate")[0]


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
    assert cli.main(["pertrain"]) == 2
    assert "no command 'pertrain'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and printed.startswith(f"usage: stmae {command}")


# Devices


def test_precision_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert device.choose_precision("float32", cpu) == (None, "float32, as requested")
    assert device.choose_precision("bf16", cpu)[0] is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert device.choose_precision("auto", cpu)[0] is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    dtype, why = device.choose_precision("auto", cpu)
    assert dtype is None and "no bf16 instructions" in why


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no CUDA device"):
        device.choose_device("cuda")
    with pytest.raises(ValueError, match="got 'gpu0'"):
        device.choose_device("gpu0")


@pytest.mark.parametrize("name", [name for name in presets("pretrain") if name.startswith("videomae")])
def test_videomae_s_presets_have_videomae_s_model_and_target(name):
    """All but sizes and masks is what VideoMAE's own code computes, whose golden file ours equals."""
    official, _, weights, _ = read_golden("videomae_default")
    theirs = from_videomae(weights, official).config.to_dict()
    made = config_of(name).model.to_dict()
    sizes = {"image_size", "patch_size", "num_frames", "predicted_frames", "mask_ratio", "decoder_mask_ratio"}
    sizes |= {f"{prefix}{size}" for prefix in ("", "decoder_") for size in ("width", "depth", "num_heads")}
    assert {key: made[key] for key in made.keys() - sizes} == {key: theirs[key] for key in made.keys() - sizes}
    assert made["predicted_frames"] == made["num_frames"]
