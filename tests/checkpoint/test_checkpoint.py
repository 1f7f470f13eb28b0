"""Writing and reading weights, and the bridges' refusals; that they compute the right thing is in test_models.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stmae
from stmae.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    atomic_write,
    classifier_from_autoencoder,
    from_mae_st,
    from_slowfast,
    load,
    load_classifier,
    resize,
    save,
    to_mae_st,
)
from stmae.checkpoint.resize import resample_patch_kernel
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier, VideoClassifierConfig
from stmae.models.position import interpolate_position, sincos_position

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"image_size": (16, 24), "patch_size": 8, "num_frames": 4, "width": 16, "depth": 2, "num_heads": 2}
SMALL_MAE = {**SMALL, "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.5}


def autoencoder(seed=0, **changes):
    torch.manual_seed(seed)
    return MaskedAutoencoder(MaskedAutoencoderConfig(**{**SMALL_MAE, **changes}))


def classifier(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoClassifier(VideoClassifierConfig(**{**SMALL, "num_classes": 3, **changes}))


def assert_same(a, b):
    assert type(a) is type(b) and a.config == b.config
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        names = [key for key in file.keys() if key.startswith("weight.")]  # noqa: SIM118
        return {key.removeprefix("weight."): file.get_tensor(key) for key in names}, config


# --- our own files ---


@pytest.mark.parametrize(
    "model",
    [
        autoencoder(),
        autoencoder(decoder_class_token="encoder", decoder_separable_position=False, frame_choice="stride"),
        autoencoder(separable_position=False, class_token=False, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3)),
        autoencoder().bfloat16(),
        classifier(),
        classifier(drop_path=0.1, dropout=0.5),
    ],
    ids=["autoencoder", "slowfast", "joint", "bfloat16", "classifier", "dropout"],
)
def test_what_is_saved_is_loaded(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save(model, path)
    again = load(path)
    assert_same(model, again)
    assert not again.training
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with torch.no_grad():  # the loaded model owns its weights: a later write to the file does not reach it
        before = next(again.parameters()).clone()
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(next(again.parameters()), before)


def test_the_file_is_plain_safetensors_with_its_configuration(tmp_path):
    model = autoencoder()
    save(model, tmp_path / "model.safetensors", extra={"step": "7"})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["stmae"])
    assert metadata["step"] == "7"
    assert about["kind"] == "MaskedAutoencoder"
    assert MaskedAutoencoderConfig.from_dict(about["config"]) == model.config
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    mode = (tmp_path / "model.safetensors").stat().st_mode & 0o777
    (tmp_path / "other").touch()
    assert mode == (tmp_path / "other").stat().st_mode & 0o777


def test_a_compiled_model_is_saved_by_its_own_names(tmp_path):
    model = autoencoder()
    save(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors"), model)


def test_only_the_library_s_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="expected a model of MaskedAutoencoder, VideoClassifier, ActionDetector, got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")
    assert not os.listdir(tmp_path)


def test_weights_that_do_not_fit_are_refused_with_everything_that_differs(tmp_path):
    model = autoencoder()
    path = tmp_path / "model.safetensors"
    save(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    del state["decoder.mask_token"], state["encoder.norm.bias"]
    state["encoder.blocks.7.fc1.bias"] = torch.zeros(3)
    state["decoder.head.bias"] = torch.zeros(5)
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointMismatch) as caught:
        load(path)
    assert caught.value.missing == ["decoder.mask_token", "encoder.norm.bias"]
    assert caught.value.unexpected == ["encoder.blocks.7.fc1.bias"]
    assert caught.value.shapes == {"decoder.head.bias": ((192,), (5,))}
    assert str(caught.value).splitlines() == [
        f"{path} does not fit the model:",
        "  missing: decoder.mask_token",
        "  missing: encoder.norm.bias",
        "  unexpected: encoder.blocks.7.fc1.bias",
        "  shape: decoder.head.bias expected [192], got [5]",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(path)
    save(autoencoder(), path)
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(CheckpointError, match="cannot read .*model.safetensors"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read .*model.safetensors"):
        load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="expected weights of mae_st, SlowFast, VideoMAE.*got 1 tensors with other names"):
        load(path)
    about = {"format": 2, "kind": "MaskedAutoencoder", "config": {}}
    save_file({"x": torch.zeros(1)}, path, metadata={"stmae": json.dumps(about)})
    with pytest.raises(CheckpointError, match="install a newer stmae"):
        load(path)


# --- all or nothing ---


def test_an_interrupted_write_leaves_the_previous_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("previous")
    (tmp_path / "neighbour.safetensors").write_text("neighbour")
    for failure in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(failure), atomic_write(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise failure
    assert path.read_text() == "previous"
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "neighbour.safetensors"]
    with atomic_write(path) as temporary:
        temporary.write_text("next")
        assert path.read_text() == "previous"
    assert path.read_text() == "next"
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "neighbour.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    save(autoencoder(), path)
    before = path.read_bytes()
    code = f"""
import resource, sys
import torch
from stmae.checkpoint import CheckpointError, save
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
model = MaskedAutoencoder(MaskedAutoencoderConfig(**{SMALL_MAE!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(model, {str(path)!r})
except CheckpointError as error:
    sys.exit(str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(stmae.__file__).parents[1])
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"cannot write {path}: ") and message.endswith("; the previous file is untouched")
    assert "large" in message  # the system's own reason
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(CheckpointError, match=f"cannot write .*{folder}.*model.safetensors: (No such|Not a) "):
            save(autoencoder(), tmp_path / folder / "model.safetensors")


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace"])
def test_a_refusal_at_any_step_leaves_the_previous_file_whole(call, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(autoencoder(), path)
    before = path.read_bytes()

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(call, refuse)  # not by the folder's mode, which does not bind the superuser
    with pytest.raises(CheckpointError, match="cannot write .*: Permission denied; the previous file is untouched"):
        save(autoencoder(seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_safetensors_is_asked_for_only_when_needed(tmp_path):
    code = f"""
import sys
sys.modules["safetensors"] = None  # as if it were not installed
import stmae, stmae.checkpoint, stmae.models
model = stmae.models.mae_vit_small_patch16(width=8, num_heads=1, depth=1, decoder_width=8, decoder_num_heads=1, decoder_depth=1)
stmae.checkpoint.from_mae_st
open({str(tmp_path / "y")!r}, "wb").write(b"12345678{{")
path = {str(tmp_path)!r}
for function in (lambda: stmae.checkpoint.save(model, path + "/x"), lambda: stmae.checkpoint.load(path + "/y")):
    try:
        function()
    except ImportError as error:
        assert "pip install 'stmae[train]'" in str(error), error
    else:
        sys.exit("no error")
"""
    root = Path(stmae.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["y"]


# --- another size, another task ---


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_resize_interpolates_positions_in_space_and_time(separable, class_token, tmp_path):
    model = autoencoder(separable_position=separable, class_token=class_token)
    save(model, tmp_path / "model.safetensors")
    changes = {"num_frames": 8, "image_size": (32, 40)}
    larger = load(tmp_path / "model.safetensors", **changes)
    assert larger.config == model.config.replace(**changes)
    assert_same(larger, resize(model, **changes).eval())
    for old, new in ((model.encoder, larger.encoder), (model.decoder, larger.decoder)):
        if class_token:
            assert torch.equal(old.position.of_class_token(), new.position.of_class_token())
        t, h, w = model.config.grid
        old, new = old.position.of_patches(), new.position.of_patches()
        assert new.shape == (4 * 4 * 5, 16)
        # Linear interpolation in time: ends held, a quarter of the way in between.
        time_old, time_new = (x.view(*grid, 16).mean(dim=(1, 2)) for x, grid in ((old, (t, h, w)), (new, (4, 4, 5))))
        offset = (time_new - time_new[0]).norm(dim=1) / (time_new[3] - time_new[0]).norm()
        torch.testing.assert_close(offset, torch.tensor([0, 0.25, 0.75, 1]))
        assert torch.cosine_similarity(time_new[3] - time_new[0], time_old[1] - time_old[0], dim=0) > 0.99
    rest = {name for name in model.state_dict() if "position" not in name}
    assert all(torch.equal(model.state_dict()[name], larger.state_dict()[name]) for name in rest)
    video = torch.randint(0, 256, (1, *larger.config.video_shape), dtype=torch.uint8)
    larger.backend = "reference"
    assert larger(video).loss.isfinite()
    assert_same(resize(larger, num_frames=8), larger)


def test_resize_keeps_mode_back_end_and_refuses_what_does_not_fit():
    model = autoencoder().train()
    model.backend = "reference"
    other = resize(model, num_frames=8)
    assert other.training and other.backend == "reference"
    assert resize(model.eval(), mask_ratio=0.75).config.mask_ratio == 0.75
    with pytest.raises(CheckpointMismatch, match=r"shape: decoder.head.bias expected \[384\], got \[192\]"):
        resize(model, predicted_frames=4)
    with pytest.raises(CheckpointMismatch, match="missing: encoder.blocks.2.fc1.bias"):
        resize(model, depth=3)
    with pytest.raises(ValueError, match="unknown fields lenght"):
        resize(model, lenght=3)


def test_a_classifier_takes_the_autoencoder_s_encoder(tmp_path):
    model = autoencoder()
    path = tmp_path / "model.safetensors"
    save(model, path)
    torch.manual_seed(1)
    made = load_classifier(path, num_classes=7, drop_path=0.2, dropout=0.3)
    torch.manual_seed(1)
    assert_same(made, classifier_from_autoencoder(model, num_classes=7, drop_path=0.2, dropout=0.3))
    shared = {name: getattr(model.config, name) for name in SMALL}
    assert made.config == VideoClassifierConfig(**shared, num_classes=7, drop_path=0.2, dropout=0.3)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], value), name
    assert made.head.weight.shape == (7, 16) and 0.01 < made.head.weight.std() < 0.03
    assert (made.head.bias == 0).all()
    assert [block.drop_path for block in made.encoder.blocks] == [0, 0.2]
    longer = load_classifier(path, num_classes=7, num_frames=8)
    assert longer.encoder.position.temporal.shape == (4, 16)
    video = torch.randint(0, 256, (2, *model.config.video_shape), dtype=torch.uint8)
    everything = torch.arange(model.config.num_tokens).expand(2, -1)
    made.backend = model.backend = "reference"
    made.eval()
    features = made.encoder.norm(made.features(video, pooled=False))
    torch.testing.assert_close(features, model.encode(video, everything)[:, 1:])
    with pytest.raises(ValueError, match="expected a MaskedAutoencoder, got VideoClassifier"):
        classifier_from_autoencoder(made)


def test_a_classifier_s_head_starts_anew_for_other_classes(tmp_path):
    model = classifier()
    save(model, tmp_path / "model.safetensors")
    assert_same(load_classifier(tmp_path / "model.safetensors"), model)
    other = load_classifier(tmp_path / "model.safetensors", num_classes=4)
    assert other.head.weight.shape == (4, 16) and other.config.num_classes == 4
    assert torch.equal(other.encoder.norm.weight, model.encoder.norm.weight)
    kept = load_classifier(tmp_path / "model.safetensors", drop_path=0.3)
    assert torch.equal(kept.head.weight, model.head.weight) and kept.config.drop_path == 0.3


# --- mae_st and SlowFast ---

NAMES = ["mae_st_default", "mae_st_joint_pos_no_cls", "mae_st_head_dim_32_full_prediction", "mae_st_vit_classify"]


@pytest.mark.parametrize("name", NAMES)
def test_mae_st_and_back_is_the_same_dictionary(name):
    weights, config = golden(name)
    back = to_mae_st(from_mae_st(weights, config))
    assert back.keys() == weights.keys()
    for key in weights:
        assert torch.equal(back[key], weights[key]), key  # exact, shapes included


def test_ours_to_mae_st_and_back():
    model = autoencoder(qkv_bias=False, image_size=16).eval()
    config = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_frames": 4, "t_patch_size": 2}
    config |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "pred_t_dim": 2, "norm_pix_loss": True}
    config |= {"sep_pos_embed": True, "cls_embed": True, "no_qkv_bias": True, "mask_ratio": 0.5, "trunc_init": False}
    weights = to_mae_st(model)
    assert not [name for name in weights if name.endswith((".q.bias", ".k.bias", ".v.bias"))]
    assert_same(from_mae_st(weights, config), model.cpu())


def wrap_ddp(weights):
    return {f"module.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "epoch": 3, "args": object()},
        lambda weights: {"model_state": weights, "optimizer_state": {}},
        wrap_ddp,
        lambda weights: {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}},
        lambda weights: {"model": {f"_orig_mod.module.{name}": value for name, value in weights.items()}},
        lambda weights: wrap_ddp({f"_orig_mod.{name}": value for name, value in weights.items()}),
    ],
    ids=["model", "model_state", "ddp", "compiled", "compiled ddp", "ddp of compiled"],
)
@pytest.mark.parametrize("name", ["mae_st_default", "slowfast_default"])
def test_nesting_and_prefixes_are_taken_off(name, wrap):
    weights, config = golden(name)
    bridge = from_mae_st if name.startswith("mae_st") else from_slowfast
    assert_same(bridge(wrap(weights), config), bridge(weights, config))


def test_the_kind_is_told_by_the_weights():
    for name, bridge, kind in (
        ("mae_st_default", from_mae_st, MaskedAutoencoder),
        ("mae_st_vit_classify", from_mae_st, VideoClassifier),
        ("slowfast_default", from_slowfast, MaskedAutoencoder),
        ("slowfast_classify", from_slowfast, VideoClassifier),
    ):
        weights, config = golden(name)
        del config["kind"]
        assert type(bridge(weights, config)) is kind
        with pytest.raises(ValueError, match="expected kind .*, got 'other'"):
            bridge(weights, config | {"kind": "other"})


def test_mae_st_s_semantics_and_defaults():
    weights, config = golden("mae_st_default")
    ours = from_mae_st(weights, config).config
    assert ours.decoder_class_token == "own" and ours.frame_choice == "linspace" and ours.predicted_frames is None
    assert ours.decoder_separable_position is None
    weights, config = golden("mae_st_head_dim_32_full_prediction")
    assert from_mae_st(weights, config).config.predicted_frames == 8
    # Absent arguments have mae_st's defaults, not ours: a patch of 4 frames, 8 decoder blocks, joint positions, plain pixels.
    with pytest.raises(CheckpointMismatch) as caught:
        from_mae_st(weights, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_frames": 8})
    assert caught.value.shapes["patch_embed.proj.weight"] == ((64, 3, 4, 8, 8), (64, 3, 2, 8, 8))
    assert "decoder_blocks.7.attn.qkv.weight" in caught.value.missing
    assert "pos_embed" in caught.value.missing and "pos_embed_spatial" in caught.value.unexpected


def test_slowfast_s_semantics_and_defaults():
    weights, config = golden("slowfast_default")
    model = from_slowfast(weights, config)
    assert model.config.decoder_class_token == "encoder" and model.config.frame_choice == "stride"
    assert model.config.separable_position and model.config.decoder_separable_position is False
    assert model.config.target == "normalized_pixels"
    del config["decoder_num_heads"]
    assert from_slowfast(weights, config).config.decoder_num_heads == 64 // 64
    # Separable decoder positions, which SlowFast names yet differently.
    joint = weights.pop("decoder_pos_embed")
    weights |= {"dec_pos_embed_spatial": joint[:, 1:5], "dec_pos_embed_temporal": joint[:, 5:9]}
    weights["dec_pos_embed_class"] = joint[:, :1]
    separable = from_slowfast(weights, config)
    assert separable.config.decoder_separable_position
    assert torch.equal(separable.decoder.position.spatial, joint[0, 1:5])
    with pytest.raises(ValueError, match="expected config to name embed_dim, num_heads"):
        from_slowfast(weights, {"depth": 1})


@pytest.mark.parametrize(
    "name, missing, unexpected, reshaped",
    [
        (
            "mae_st_default",
            ["decoder_cls_token", "patch_embed.proj.bias"],
            "head.weight",
            {"blocks.0.mlp.fc1.weight": (8, 48)},
        ),
        (
            "slowfast_default",
            ["pred_head.transforms.0.0.mlp.fc2.bias", "pred_head.transforms.0.1.weight"],
            "pred_head.transforms.0.2.weight",
            {"cls_token": (1, 1, 47)},
        ),
    ],
)
def test_foreign_weights_that_do_not_fit_are_listed_by_their_names(name, missing, unexpected, reshaped):
    weights, config = golden(name)
    bridge = from_mae_st if name.startswith("mae_st") else from_slowfast
    for key in missing:
        del weights[key]
    weights[unexpected] = torch.zeros(3)
    weights |= {key: torch.zeros(shape) for key, shape in reshaped.items()}
    with pytest.raises(CheckpointMismatch) as caught:
        bridge(weights, config)
    assert caught.value.missing == missing
    assert caught.value.unexpected == [unexpected]
    assert caught.value.shapes.keys() == reshaped.keys()


def test_a_projection_without_the_other_two_is_listed():
    weights, config = golden("mae_st_default")
    del weights["blocks.1.attn.k.weight"]
    with pytest.raises(CheckpointMismatch, match="missing: blocks.1.attn.k.weight"):
        from_mae_st(weights, config)


def test_misunderstandings_are_explained():
    weights, config = golden("mae_st_default")
    with pytest.raises(ValueError, match="from_mae_st: unknown arguments decoder_heads; known are .*decoder_num_heads"):
        from_mae_st(weights, config | {"decoder_heads": 16})
    slowfast, slowfast_config = golden("slowfast_default")
    with pytest.raises(ValueError, match="SlowFast's names .* use stmae.checkpoint.from_slowfast"):
        from_mae_st({"model_state": slowfast}, slowfast_config)
    with pytest.raises(ValueError, match="dictionary of tensors, .* got int at 'epoch'"):
        from_mae_st({"epoch": 3, "state": weights}, config)
    classify, classify_config = golden("mae_st_vit_classify")
    with pytest.raises(ValueError, match="expected config to name num_frames, t_patch_size"):
        from_mae_st(classify, {"img_size": 32})
    for name in ("cls_token", "pos_embed_class"):
        del classify[name]
    with pytest.warns(UserWarning, match="leaves the first patch out of its mean"):
        from_mae_st(classify, classify_config | {"cls_embed": False})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_class_token": "encoder"}, "decoder_class_token='encoder'"),
        ({"decoder_separable_position": False}, "decoder_separable_position=False"),
        ({"frame_choice": "stride"}, "frame_choice='stride'"),
        ({"separable_position": False, "position": "sincos"}, "position='sincos'"),
        ({"key_bias": False}, "key_bias=False"),
        ({"layer_scale": 0.1}, "layer_scale=0.1"),
        ({"target_range": "unit"}, "target_range='unit'"),
        ({"target": "channel_normalized_pixels"}, "target='channel_normalized_pixels'"),
        ({"decoder_embed_bias": False}, "decoder_embed_bias=False"),
        ({"decoder_mlp_ratio": 2.0}, "decoder_mlp_ratio=2.0"),
        ({"encoder_norm": False}, "encoder_norm=False"),
        ({"norm_eps": 1e-3, "decoder_norm_eps": 1e-3}, "norm_eps=0.001, decoder_norm_eps=0.001"),
    ],
)
def test_what_mae_st_cannot_express_is_not_exported(changes, message):
    with pytest.raises(ValueError, match=message):
        to_mae_st(autoencoder(**changes))


def test_mae_st_s_classifier_is_not_said_to_be_another():
    with pytest.raises(ValueError, match="pooling='first'"):
        to_mae_st(classifier(pooling="first"))
    with pytest.warns(UserWarning, match="leaves the first patch out of its mean"):
        to_mae_st(classifier(class_token=False))


@pytest.mark.parametrize(
    "about", ["{", "[]", "{}", '{"format": "x", "kind": "y"}', '{"format": 1, "kind": "MaskedAutoencoder", "config": null}']
)
def test_a_damaged_configuration_is_a_checkpoint_error(tmp_path, about):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"stmae": about})
    with pytest.raises(stmae.checkpoint.CheckpointError, match="model.safetensors"):
        stmae.checkpoint.load(tmp_path / "model.safetensors")


def smooth_clip(config, batch=2):
    """A clip that bilinear resampling by integer factors reproduces: constant in 4x4 blocks and time."""
    torch.manual_seed(3)
    c, t, h, w = config.video_shape
    blocks = torch.randn(batch, c, 1, h // 8, w // 8)
    return blocks.repeat_interleave(8, 3).repeat_interleave(8, 4).expand(-1, -1, t, -1, -1)


def test_an_image_model_is_the_kernel_summed_over_time():
    model = classifier()
    image = resize(model, num_frames=1, tubelet_size=1)
    kernel = model.encoder.patch_embed.weight.sum(2, keepdim=True)
    assert torch.allclose(image.encoder.patch_embed.weight, kernel, atol=1e-6)
    assert image.config.grid == (1, *model.config.grid[1:])
    still = smooth_clip(model.config)
    keep = torch.arange(image.config.num_tokens).expand(2, -1)
    a, b = model.encoder.patch_embed(still, keep), image.encoder.patch_embed(still[:, :, :1], keep)
    assert torch.allclose(a, b, atol=1e-5)


def test_an_image_kernel_is_inflated_and_summed_back():
    weight = torch.randn(5, 3, 1, 4, 4)
    inflated = resample_patch_kernel(weight, (2, 4, 4))
    assert torch.allclose(inflated, weight.expand(-1, -1, 2, -1, -1) / 2, atol=1e-6)
    assert torch.allclose(resample_patch_kernel(inflated, (1, 4, 4)), weight, atol=1e-6)


@pytest.mark.parametrize("patch", [(1, 4, 4), (1, 6, 10), (3, 8, 8)], ids=str)
def test_a_resampled_kernel_gives_for_a_resampled_patch_what_it_gave(patch):
    weight = torch.randn(5, 3, 1, 4, 4, dtype=torch.float64)
    patches = torch.randn(7, 3, 1, 4, 4, dtype=torch.float64)
    larger = torch.nn.functional.interpolate(patches, patch, mode="trilinear", align_corners=False)
    before = torch.einsum("dcthw,ncthw->nd", weight, patches)
    after = torch.einsum("dcthw,ncthw->nd", resample_patch_kernel(weight, patch), larger)
    assert torch.allclose(before, after, atol=1e-10)


@pytest.mark.parametrize("strategy", ["separable", "joint"])
def test_another_patch_resamples_kernel_positions_and_prediction(strategy):
    model = autoencoder(separable_position=strategy == "separable")
    other = resize(model, patch_size=4)
    assert other.config.grid == (2, 4, 6)
    assert other.decoder.head.weight.shape == (4 * 4 * 3, 16)
    assert torch.isfinite(other(torch.randn(2, *other.config.video_shape)).loss)
    same = resize(model, patch_size=8, tubelet_size=2)
    assert_same(model, same)


def test_fixed_positions_are_interpolated_or_made_anew():
    model = autoencoder(position="sincos", separable_position=False, class_token=False, predicted_frames=4)
    table = sincos_position(model.config.num_tokens, 16)
    assert torch.equal(model.encoder.position(), table)
    assert not any("position" in name for name in model.state_dict())
    longer = resize(model, num_frames=8)
    assert longer.config.position_grid == (2, 2, 3) and longer.config.predicted_frames == 8
    expected = interpolate_position(table, (2, 2, 3), (4, 2, 3))
    assert torch.equal(longer.encoder.position(), expected)
    anew = resize(model, num_frames=8, position_grid=None)
    assert torch.equal(anew.encoder.position(), sincos_position(anew.config.num_tokens, 16))
    assert torch.equal(resize(longer, num_frames=4).encoder.position(), table)
