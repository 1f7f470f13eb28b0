"""Fine-tuning, testing, probing and exporting: what is done with a pre-trained encoder."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.training import cli
from stmae.training.commands import data_check, features, finetune, probe
from stmae.training.commands import test as testing
from stmae.training.config import (
    FinetuneConfig,
    FinetuneOptimizerConfig,
    ViewConfig,
    parse,
)
from stmae.training.data import mixup, randaugment
from stmae.training.data.video_list import find_labelled_videos
from stmae.training.engine import optimizer
from stmae.training.evaluation import features as encoding
from stmae.training.evaluation import probes
from stmae.training.evaluation.classification import topk_accuracy
from stmae.training.tasks import finetuning
from tests.support.synthetic_video import numbered_frame, write_video

SIZES = {"image_size": 32, "num_frames": 4, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
TINY = """
clips: {stride: 2, repeats: 2, scale: [0.5, 1.0]}
augmentation: {operations: 0, erasing: 0.0, mixup: 0.2, cutmix: 0.2}
model: {dropout: 0.1, drop_path: 0.1}
optimizer: {batch: 4, epochs: 40, warmup_epochs: 8, base_lr: 2.0e-3, base_batch: 8}
run: {save_every: 5, log_every: 5, workers: 0, device: cpu, precision: float32, tensorboard: false}
"""  # 8 videos: 40 steps


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes, dark and bright, four videos each, in class folders."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, ground in (("bright", 200), ("dark", 20)):
        (folder / name).mkdir()
        for number in range(4):
            write_video(folder / name / f"{number}.mp4", 30, ground=ground + 5 * number)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = MaskedAutoencoder(MaskedAutoencoderConfig(**SIZES, decoder_width=32, decoder_depth=1, decoder_num_heads=1))
    checkpoint.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


def configure(videos, pretrained, output, *more):
    settings = output.parent / "tiny.yaml"
    settings.write_text(TINY)
    argv = ["--config", str(settings), "--data", str(videos), "--test_data", str(videos), "--checkpoint", str(pretrained)]
    return parse(FinetuneConfig, [*argv, "--output", str(output), *more], prog="stmae finetune", description="")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, videos, pretrained):
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    state = finetune.run(configure(videos, pretrained, folder))
    return folder, state


def test_it_learns(finished):
    folder, state = finished
    assert state.after == {"top1": 1.0, "top5": 1.0} and state.done
    assert isinstance(checkpoint.load(folder / "model.safetensors"), VideoClassifier)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(5, 41, 5))


@pytest.mark.parametrize("stop_after", [7, 20])
def test_stopped_and_continued_is_bit_for_bit_the_uninterrupted_run(
    stop_after, finished, videos, pretrained, tmp_path, monkeypatch
):
    """With dropout, drop path and mixing, which draw random numbers in the loop."""
    import signal

    loss_of, calls = finetuning.classification_loss, []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return loss_of(*arguments)

    monkeypatch.setattr(finetuning, "classification_loss", stopping)
    config = configure(videos, pretrained, tmp_path / "run")
    assert finetune.run(config).step == stop_after
    assert finetune.run(config).done
    complete, parts = (load_file(folder / "model.safetensors") for folder in (finished[0], tmp_path / "run"))
    for name in complete:
        assert torch.equal(complete[name], parts[name]), name


def test_the_average_of_the_weights_is_what_is_saved_and_survives_a_stop(videos, pretrained, tmp_path):
    config = configure(videos, pretrained, tmp_path / "run", "--average_decay", "0.5", "--optimizer.epochs", "12")
    finetune.run(config)
    state = load_file(sorted((tmp_path / "run").glob("state-*"))[-1])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], state[f"average.{name}"]) for name in saved)
    assert not torch.equal(state["model.head.weight"], state["average.head.weight"])


def test_random_weights_take_only_the_shape(videos, pretrained, tmp_path):
    config = configure(videos, pretrained, tmp_path / "run", "--random_weights", "true")
    torch.manual_seed(1)
    fresh = finetuning.classifier(config, 2)
    name = "encoder.blocks.0.attention.qkv.weight"
    loaded = finetuning.classifier(configure(videos, pretrained, tmp_path / "run"), 2).state_dict()
    assert fresh.config == VideoClassifierConfig(**SIZES, num_classes=2, dropout=0.1, drop_path=0.1)
    differing = [key for key, value in fresh.state_dict().items() if not torch.equal(value, loaded[key])]
    assert "encoder.patch_embed.weight" in differing, name


def test_other_clip_lengths_and_sizes_interpolate_positions(videos, pretrained, tmp_path):
    more = ["--model.num_frames", "8", "--model.image_size", "48", "--optimizer.epochs", "4", "--optimizer.warmup_epochs", "1"]
    finetune.run(configure(videos, pretrained, tmp_path / "run", *more))
    assert checkpoint.load(tmp_path / "run" / "model.safetensors").config.grid == (4, 6, 6)


def write_stills(folder, count=4):
    """Two classes, dark and bright, in class folders of images."""
    for name, ground in (("bright", 200), ("dark", 20)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = numbered_frame(number, 48, 64, ground=ground)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_images_are_fine_tuned_from_a_model_of_clips(pretrained, tmp_path, capsys):
    """The preset for ImageNet-1K, with fewer and smaller images: RandAugment, mixing, erasing and all."""
    stills, output = write_stills(tmp_path / "stills"), tmp_path / "run"
    argv = ["--preset", "paper-base-finetune-imagenet", "--data", str(stills), "--test_data", str(stills)]
    argv += ["--checkpoint", str(pretrained), "--output", str(output), "--optimizer.batch", "8", "--optimizer.base_lr", "0.02"]
    argv += ["--optimizer.epochs", "40", "--run.workers", "0", "--run.device", "cpu", "--run.tensorboard", "false"]
    assert cli.main(["finetune", *argv]) == 0
    assert "top-1 on" in capsys.readouterr().out
    model, video = checkpoint.load(output / "model.safetensors"), checkpoint.load(pretrained)
    assert model.config.grid == (1, 4, 4) and model.config.tubelet_size == 1
    assert cli.main(["test", "--checkpoint", str(output), "--data", str(stills), "--views.crop_pct", "0.875"]) == 0
    assert "top-1 100.00%" in capsys.readouterr().out
    # Before the first step, the kernel is that of the clips summed over time.
    config = parse(FinetuneConfig, argv, prog="stmae finetune", description="")
    start = finetuning.classifier(config, 2).encoder.patch_embed.weight
    torch.testing.assert_close(start, video.encoder.patch_embed.weight.sum(2, keepdim=True), rtol=0, atol=1e-6)


def test_masked_finetuning_hides_less_and_less(videos, pretrained, tmp_path):
    config = configure(videos, pretrained, tmp_path / "run", "--mask_ratio", "0.5")
    model, kept = finetuning.classifier(config, 2), []

    def forward(video, keep):
        kept.append(model.config.num_tokens if keep is None else keep.shape[1])
        return model(video, keep=keep)

    batch = {"clips": torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8), "label": torch.tensor([0, 1])}
    for epoch in (0, 20, 39.99):
        finetuning.classification_loss(config, model.config, forward, batch, epoch)
    assert kept == [16, 24, 31]  # of 32 tokens: masked 50 %, 25 %, next to nothing


def test_a_label_beyond_the_classes_is_refused(videos, pretrained, tmp_path):
    with pytest.raises(ValueError, match="expected a label below 1, got 1"):
        finetune.run(configure(videos, pretrained, tmp_path / "run", "--model.num_classes", "1"))


# The recipe


def test_the_learning_rate_of_finetuning_counts_repeats():
    settings = FinetuneOptimizerConfig(batch=256, base_lr=4.8e-3, base_batch=512)
    assert optimizer.peak_learning_rate(settings, 256 * 2) == 4.8e-3


def test_layer_decay():
    model = VideoClassifier(VideoClassifierConfig(**SIZES, num_classes=3))
    scale = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.layer_decay_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            scale[names[id(parameter)]] = (group["scale"], group["weight_decay"])
    assert scale.keys() == set(names.values())
    assert scale["encoder.patch_embed.weight"] == (0.125, 0.05)
    assert scale["encoder.position.spatial"] == (0.125, 0.0) and scale["encoder.class_token"] == (0.125, 0.0)
    assert {v[0] for k, v in scale.items() if k.startswith("encoder.blocks.0.")} == {0.25}
    assert {v[0] for k, v in scale.items() if k.startswith("encoder.blocks.1.")} == {0.5}
    assert scale["head.weight"] == (1.0, 0.05) and scale["head.bias"] == (1.0, 0.0)
    assert scale["encoder.norm.weight"] == (1.0, 0.0)


def test_smoothed_targets():
    targets = mixup.smooth_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_mixup_mixes_clips_and_targets_alike():
    clips = torch.stack([torch.full((2, 8, 8, 3), value, dtype=torch.uint8) for value in (0, 200)])
    torch.manual_seed(0)
    mixed, targets = mixup.mix(clips, torch.eye(2), 0.8, 0.0)
    fraction = mixed[1, 0, 0, 0, 0].item() / 200  # of clip 1 in the second place
    assert mixed.dtype == torch.uint8 and 0 < fraction < 1
    torch.testing.assert_close(targets, torch.tensor([[fraction, 1 - fraction], [1 - fraction, fraction]]), atol=0.003, rtol=0)


def test_cutmix_counts_what_was_cut():
    clips = torch.stack([torch.full((2, 20, 30, 3), value, dtype=torch.uint8) for value in (0, 1)])
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = mixup.mix(clips, torch.eye(2), 0.0, 1.0)
        fraction = mixed[0].float().mean().item()  # of clip 1 in the first place
        torch.testing.assert_close(targets[0], torch.tensor([1 - fraction, fraction]))
    assert torch.equal(clips[0], torch.zeros_like(clips[0]))  # the batch itself is untouched


@pytest.mark.parametrize("name", sorted(randaugment.OPERATIONS))
@pytest.mark.parametrize("sign", [1, -1])
def test_an_operation_keeps_shape_and_treats_frames_alike(name, sign):
    frame = torch.randint(50, 200, (1, 24, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = frame.repeat(3, 1, 1, 1)
    before = clip.clone()
    out = randaugment.OPERATIONS[name](clip, 0.7, sign)
    assert out.shape == clip.shape and out.dtype == torch.uint8 and torch.equal(clip, before)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert not torch.equal(out, clip)


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness", "rotate", "shear_x", "shear_y", "translate_x"])
def test_an_operation_of_no_strength_changes_nothing(name):
    clip = torch.randint(0, 256, (2, 24, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = randaugment.OPERATIONS[name](clip, 0.0, 1)
    assert (out.int() - clip.int()).abs().max() <= 1


def test_translation_moves_by_the_share_it_says():
    clip = torch.zeros(1, 21, 41, 3, dtype=torch.uint8)
    clip[0, 10, 20] = 255
    out = randaugment.translate_x(clip, 0.5 / 0.45 * 0.5, 1)  # a quarter of the width
    assert out[0, 10, 10].min() > 200


def test_equalizing_makes_the_histogram_even():
    clip = (torch.arange(256).reshape(1, 16, 16, 1) // 4 + 100).to(torch.uint8).expand(1, 16, 16, 3).contiguous()
    out = randaugment.equalize(clip, 0, 1)
    assert out.min() < 5 and out.max() > 250
    steps = out[0, :, :, 0].flatten().unique().int().diff()
    assert steps.min() >= 3 and steps.max() <= 5


def test_rand_augment_is_a_function_of_its_generator():
    clip = torch.randint(0, 256, (2, 24, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, two, three = (randaugment.rand_augment(np.random.default_rng(seed), clip, 2, 7, 0.5) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(randaugment.rand_augment(np.random.default_rng(3), clip, 0, 7, 0.5), clip)


# Test


def test_views_are_averaged_after_the_softmax(finished, videos, tmp_path):
    folder, _ = finished
    config = testing.Config(
        checkpoint=str(folder), data=str(videos), output=str(tmp_path / "out.json"), views=ViewConfig(temporal=2, spatial=3)
    )
    results = testing.run(config)
    assert results["top1"] == 1.0 and results["views"] == "2 x 3" and results["videos"] == 8
    assert json.loads((tmp_path / "out.json").read_text()) == results


def test_top_k_of_averaged_views():
    scores = torch.tensor([[[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]], [[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]])  # [2, 2, 3]
    labels = torch.tensor([1, 0])
    assert topk_accuracy(scores, labels, 1) == 0.5  # the views of video 0 average to class 1
    assert topk_accuracy(scores, labels, 2) == 0.5 and topk_accuracy(scores, labels, 5) == 1.0


def test_a_test_leaves_out_what_it_cannot_read_and_reports_it(finished, videos, tmp_path, capsys):
    folder, _ = finished
    lines = [f"{entry.path} {entry.label}" for entry in find_labelled_videos(videos)]
    (tmp_path / "broken.mp4").write_text("no video")
    (tmp_path / "list.txt").write_text("\n".join([*lines, "broken.mp4 0"]))
    assert cli.main(["test", "--checkpoint", str(folder), "--data", str(tmp_path / "list.txt"), "--views.temporal", "1"]) == 0
    printed = capsys.readouterr().out
    assert "left out of the test" in printed and "broken.mp4" in printed and "8 videos (1 left out)" in printed


def test_a_test_set_that_lacks_a_class_is_numbered_as_the_training_set(finished, videos, tmp_path):
    """On its own its only class would be number 0: 0 % instead of 100 %."""
    (tmp_path / "one").mkdir()
    shutil.copytree(videos / "dark", tmp_path / "one" / "dark")
    run_test = functools.partial(testing.run, testing.Config(checkpoint=str(finished[0]), data=str(tmp_path / "one")))
    assert run_test()["top1"] == 1.0
    shutil.copytree(videos / "dark", tmp_path / "one" / "green")
    with pytest.raises(ValueError, match=r"classes\.json numbers 2 classes, and .*green is none of them"):
        run_test()
    (tmp_path / "list.txt").write_text(f"{videos / 'dark' / '0.mp4'} 2\n")
    with pytest.raises(ValueError, match="expected a label below 2, as the classifier has, got 2"):
        testing.run(testing.Config(checkpoint=str(finished[0]), data=str(tmp_path / "list.txt")))
    (tmp_path / "run").mkdir()  # of a run that did not write how its classes are numbered
    shutil.copy(finished[0] / "model.safetensors", tmp_path / "run")
    shutil.rmtree(tmp_path / "one" / "green")
    with pytest.raises(
        ValueError, match="has 1 class folder and the classifier 2 classes: name their numbers with --data_labels"
    ):
        testing.run(testing.Config(checkpoint=str(tmp_path / "run"), data=str(tmp_path / "one")))


def test_an_autoencoder_cannot_be_tested(pretrained, videos, capsys):
    assert cli.main(["test", "--checkpoint", str(pretrained), "--data", str(videos)]) == 1
    assert "holds a MaskedAutoencoder, and a test needs a classifier" in capsys.readouterr().err


# Probe and features


def test_probes_find_what_is_there(pretrained, videos, tmp_path):
    options = {"checkpoint": str(pretrained), "data": str(videos), "test_data": str(videos), "workers": 0, "neighbours": 3}
    results = probe.run(probe.Config(**options, output=str(tmp_path / "probe.json")))
    assert results["linear"] == 1.0 and results["knn"] > 0.8 and results["chance"] == 0.5
    assert json.loads((tmp_path / "probe.json").read_text()) == results
    assert probe.run(probe.Config(**options, random_weights=True, tokens="all"))["videos"] == 8


def test_a_linear_probe_does_not_learn_what_is_not_there():
    generator = torch.Generator().manual_seed(0)
    x, test_x = torch.randn(60, 20, generator=generator), torch.randn(400, 20, generator=generator)
    y, test_y = torch.arange(60) % 2, torch.arange(400) % 2
    assert abs(probes.linear(x, y, test_x, test_y, 2, 0) - 0.5) < 0.1
    x[:, 7] += 6 * y
    test_x[:, 7] += 6 * test_y
    assert probes.linear(x, y, test_x, test_y, 2, 0) > 0.8


def attentive_data(videos, marked, seed):
    """Tokens [videos, 12, 16] of noise; in half of the videos, one token at any place has a strong value in one dimension."""
    generator = torch.Generator().manual_seed(seed)
    tokens, y = torch.randn(videos, 12, 16, generator=generator), torch.arange(videos) % 2
    places = torch.randint(0, 12, (videos,), generator=generator)
    tokens[torch.arange(videos), places, 3] += marked * y
    return tokens.half(), y


def test_an_attentive_probe_finds_the_token_that_matters(monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 80)
    (x, y), (test_x, test_y) = attentive_data(120, 8.0, 0), attentive_data(200, 8.0, 1)
    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    found = probes.attentive(x, y, test_x, test_y, 2, 0, cpu)
    assert found > 0.95 > probes.linear(x.float().mean(1), y, test_x.float().mean(1), test_y, 2, 0)  # the mean drowns it
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(probes, "RATES", (1e-3,))
    (x, y), (test_x, test_y) = attentive_data(120, 0.0, 0), attentive_data(400, 0.0, 1)
    assert abs(probes.attentive(x, y, test_x, test_y, 2, 0, cpu) - 0.5) < 0.1  # and learns nothing where there is nothing


def test_an_attentive_probe_is_a_function_of_its_seed():
    x, y = attentive_data(30, 3.0, 0)
    scale, numbers = (torch.zeros(16), torch.ones(16)), torch.arange(30)
    one, two, three = (
        probes.train_attentive(x, y, numbers, 2, 1e-3, scale, seed, torch.device("cpu")).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["query"], three["query"])


def test_the_attentive_classifier_is_attention_with_one_query():
    torch.manual_seed(0)
    model, tokens = probes.AttentiveClassifier(32, 5, heads=4), torch.randn(3, 7, 32)
    q = model.query.view(1, 4, 1, 8).expand(3, -1, -1, -1)
    k, v = (layer(tokens).view(3, 7, 4, 8).transpose(1, 2) for layer in (model.key, model.value))
    pooled = torch.nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)
    torch.testing.assert_close(model(tokens), model.head(model.norm(pooled)))


def test_one_pass_gives_features_and_tokens(pretrained, videos):
    entries = find_labelled_videos(videos)
    config = probe.Config(
        checkpoint=str(pretrained),
        data="unused",
        test_data="unused",
        workers=0,
        precision="float32",
        views=ViewConfig(temporal=2),
    )
    x, tokens, y, paths, _ = encoding.encode_tokens(pretrained, entries, config)
    same, same_y, same_paths, _ = encoding.encode(pretrained, entries, config)
    assert torch.equal(x, same) and torch.equal(y, same_y) and paths == same_paths
    assert tokens.shape == (8, 2 * 32, 32) and tokens.dtype == torch.float16
    torch.testing.assert_close(tokens.float().mean(2), torch.zeros(8, 64), atol=1e-3, rtol=0)


def test_probes_are_chosen_by_name(pretrained, videos, tmp_path, capsys):
    common = ["probe", "--checkpoint", str(pretrained), "--data", str(videos), "--test_data", str(videos), "--workers", "0"]
    output = tmp_path / "probe.json"
    assert cli.main([*common, "--kinds", "attentive,linear", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["attentive"] == results["linear"] == 1.0 and "knn" not in results
    assert "attentive 100.0%, linear 100.0%, always the most common class 50.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*common, "--kinds", "knn,quadratic"])
    assert "kinds: expected some of knn, linear, attentive, separated by commas, got 'knn,quadratic'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_features_are_the_models(suffix, pretrained, videos, tmp_path):
    output = tmp_path / f"features{suffix}"
    config = features.Config(
        checkpoint=str(pretrained),
        data=str(videos),
        output=str(output),
        workers=0,
        precision="float32",
        views=ViewConfig(temporal=2),
    )
    features.run(config)
    model = checkpoint.load_classifier(pretrained)
    from stmae.training.config import ClipConfig
    from stmae.training.data.dataset import ViewClips, as_video

    entries = find_labelled_videos(videos)
    clips = ViewClips(entries, ClipConfig(stride=4), frames=4, size=(32, 32), temporal=2)[5]["clips"]
    with torch.no_grad():
        expected = model.features(as_video(clips)).mean(0)
    if suffix == ".npy":
        got = torch.from_numpy(np.load(output))
        assert output.with_suffix(".txt").read_text().splitlines()[5].startswith(entries[5].path)
    else:
        got = load_file(output)["features"]
        with safe_open(output, framework="pt") as file:
            assert json.loads(file.metadata()["paths"])[5] == entries[5].path
    assert got.shape == (8, 32)
    torch.testing.assert_close(got[5], expected)


# Data


def test_class_folders_are_numbered_by_name(videos, tmp_path):
    entries = find_labelled_videos(videos)
    assert [entry.label for entry in entries] == [0] * 4 + [1] * 4 and "bright" in entries[0].path
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(ValueError, match="expected a label of 0 or more for .*a.mp4, got none"):
        find_labelled_videos(tmp_path / "list.txt")
    (tmp_path / "loose.mp4").touch()
    with pytest.raises(ValueError, match="loose.mp4 lies in no class folder"):
        find_labelled_videos(tmp_path)


@pytest.mark.parametrize("every_frame", [False, True])
def test_data_check_names_what_is_broken_and_sums_up_the_rest(every_frame, videos, tmp_path, capsys):
    lines = [f"{entry.path} {entry.label}" for entry in find_labelled_videos(videos)]
    (tmp_path / "broken.mp4").write_text("no video")
    write_video(tmp_path / "short.mp4", 5)
    (tmp_path / "list.txt").write_text("\n".join([*lines, "broken.mp4 0", "short.mp4 1"]))
    settings = {"data": str(tmp_path / "list.txt"), "frames": 4, "every_frame": every_frame, "workers": 0}
    config = data_check.Config(**settings, output=str(tmp_path / "good.txt"), short="skip")
    good, errors = data_check.run(config)
    printed = capsys.readouterr().out
    assert len(good) == 8 and len(errors) == 2
    assert "10 videos: 8 can be used, 2 cannot" in printed and "too short: 5 frames, a clip of 4 at stride 4 needs 13" in printed
    assert (
        "30 to 30, median 30" in printed and "25 to 25" in printed and "96x64 (8)" in printed and "2 classes, 5 to 5" in printed
    )
    assert "can be used with a smaller stride, or with --clips.short loop or pad" in printed
    assert find_labelled_videos(tmp_path / "good.txt") == find_labelled_videos(videos)
    assert len(data_check.run(data_check.Config(**settings))[0]) == 9
    printed = capsys.readouterr().out
    assert "1 have fewer than the 13 frames of a clip and begin again (--clips.short loop); a stride of 1 fits all" in printed


def test_data_check_on_the_command_line(videos, capsys):
    assert cli.main(["data", "check", str(videos), "--frames", "4"]) == 0
    assert "8 videos: 8 can be used, 0 cannot" in capsys.readouterr().out
