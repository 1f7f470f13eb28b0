"""Whose weights a file or folder holds, what is inferred and assumed, and that nothing is loaded in part or silently."""

import argparse
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from stmae.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    from_mae_st,
    from_slowfast,
    from_videomae,
    load,
    load_classifier,
    save,
    to_huggingface,
    to_mae_st,
)
from stmae.checkpoint.reading import Weights
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig, VideoClassifier
from tests.support.golden import GOLDEN, read_golden

FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
BRIDGES = {"mae_st": from_mae_st, "slowfast": from_slowfast, "videomae": from_videomae}
# What these weights do not determine: their models are smaller than any factory's.
STATED = {
    "mae_st_default": {"num_heads": 3, "decoder_num_heads": 2},
    "mae_st_head_dim_32_full_prediction": {"num_heads": 2, "decoder_num_heads": 1, "mask_ratio": 0.8},
    "mae_st_joint_pos_no_cls": {"num_heads": 3, "decoder_num_heads": 2, "num_frames": 8},
    "mae_st_pixels_75": {"num_heads": 3, "decoder_num_heads": 2, "target": "pixels", "mask_ratio": 0.75},
    "mae_st_vit_classify": {"num_heads": 3},
    "slowfast_classify": {"num_heads": 3, "num_frames": 8},
    "slowfast_default": {"num_heads": 3, "mask_ratio": 0.7, "num_frames": 8},
    "slowfast_two_decoder_heads_pixels": {"num_heads": 2, "mask_ratio": 0.7, "num_frames": 8, "target": "pixels"},
    "videomae_classify": {"num_heads": 3, "num_frames": 4, "image_size": 32},
    "videomae_default": {"num_heads": 2, "decoder_num_heads": 2, "num_frames": 4, "image_size": 32, "mask_ratio": 0.75},
    "videomae_pixels_no_bias": {
        "num_heads": 2,
        "decoder_num_heads": 1,
        "num_frames": 6,
        "image_size": 32,
        "mask_ratio": 0.6,
        "target": "pixels",
        "qkv_bias": False,
    },
    "videomae_v2_classify": {"num_heads": 3, "num_frames": 4, "image_size": 32},
    "videomae_v2_dual_masking": {
        "num_heads": 2,
        "decoder_num_heads": 2,
        "num_frames": 4,
        "image_size": 32,
        "mask_ratio": 0.75,
        "decoder_mask_ratio": 0.5,
    },
}


def golden(name):
    config, _, weights, _ = read_golden(name)
    return weights, config


def expected_model(name):
    weights, config = golden(name)
    bridge = next(bridge for start, bridge in BRIDGES.items() if name.startswith(start))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridge(weights, config)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_golden_file_is_covered():
    assert sorted(STATED) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("wrap", ["plain", "nested"])
def test_official_checkpoints_are_recognised(name, wrap, tmp_path):
    weights, _ = golden(name)
    nest = {"plain": weights, "nested": {"model": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}}
    path = tmp_path / "checkpoint.pth"
    torch.save(nest[wrap], path)
    model = load(path, **STATED[name])
    expected = expected_model(name)
    assert_same_weights(model, expected)
    assert name.startswith(model.load_report.format)
    for field, value in expected.config.to_dict().items():
        if field in ("dropout", "drop_path"):  # of training, in no file
            continue
        got = getattr(model.config, field)
        if field == "mlp_ratio":  # of which only the width of the hidden layer can be seen
            got, value = int(model.config.width * got), int(model.config.width * value)
        elif field == "decoder_mlp_ratio":
            value = got
        elif isinstance(value, list):
            value = tuple(value)
        assert got == value, field


@pytest.mark.parametrize(
    "name, format", [("mae_st_default", "mae_st"), ("slowfast_default", "slowfast"), ("videomae_default", "videomae")]
)
def test_the_report_says_what_was_inferred_and_assumed(name, format, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(golden(name)[0], path)
    report = load(path, **{**STATED[name], "num_heads": STATED[name]["num_heads"]}).load_report
    assert report.format == format and report.path == str(path)
    assert "as stated" in report.inferred["num_heads"]
    assert "patch_embed" in report.inferred["width"]
    assert "target" in report.assumed
    assert "assumed target" in str(report)


def test_the_files_own_arguments_are_used(tmp_path):
    weights, _ = golden("mae_st_pixels_75")
    arguments = argparse.Namespace(norm_pix_loss=False, decoder_num_heads=2, mask_ratio=0.75, model="other")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "args": arguments, "epoch": 1, "scaler": {}}, path)
    model = load(path, num_heads=3)
    assert (model.config.target, model.config.decoder_num_heads, model.config.mask_ratio) == ("pixels", 2, 0.75)
    assert not model.load_report.assumed
    assert {"args", "epoch", "scaler"} <= set(model.load_report.unused) | {"args", "epoch", "scaler"}


def test_head_counts_are_never_guessed(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(golden("mae_st_default")[0], path)
    with pytest.raises(CheckpointError, match=r"num_heads cannot be determined .* state it: load\(path, num_heads=...\)"):
        load(path)


def test_the_average_of_the_weights_is_taken_on_request(tmp_path):
    weights, _ = golden("videomae_classify")
    average = {key: value * 2 for key, value in weights.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "model_ema": average}, path)
    stated = STATED["videomae_classify"]
    with pytest.warns(UserWarning, match="running average"):
        plain = load(path, **stated)
    assert torch.equal(plain.head.weight, weights["head.weight"])
    assert torch.equal(load(path, ema=True, **stated).head.weight, average["head.weight"])
    torch.save({"model": weights}, path)
    with pytest.raises(CheckpointError, match="expected a running average"):
        load(path, ema=True, **stated)


# --- every tensor counts ---


def still_autoencoder():
    """An autoencoder without temporal positions."""
    torch.manual_seed(0)
    config = MaskedAutoencoderConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        width=32,
        depth=2,
        num_heads=2,
        decoder_width=32,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    model = MaskedAutoencoder(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as of a trained model, none of it zero
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.encoder.position.temporal.zero_()
    return model


def image_weights(model):
    """The weights of an image MAE that sees, in each frame of a still clip, what ``model``, a video MAE, sees in the clip."""
    weights = {}
    for name, value in to_mae_st(model).items():
        if name == "patch_embed.proj.weight":
            value = value.sum(2)
        if name.endswith("_temporal") or name == "decoder_cls_token":  # the image MAE's decoder gets the encoder's
            continue
        weights[name] = value
    for start in ("", "decoder_"):
        if f"{start}pos_embed_spatial" in weights:
            first = weights.pop(f"{start}pos_embed_class")
            weights[f"{start}pos_embed"] = torch.cat([first, weights.pop(f"{start}pos_embed_spatial")], dim=1)
    result = {}
    for name, value in weights.items():
        if ".attn.q." in name:
            parts = [weights[name.replace(".q.", f".{key}.")] for key in "qkv"]
            result[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            result[name] = value
    return result


def mutations(weights):
    """(what, tensor, weights) with one tensor missing, renamed, transposed or zeroed, for every tensor where that can be seen."""
    for key, value in weights.items():
        others = {name: tensor for name, tensor in weights.items() if name != key}
        yield "missing", key, others
        if "blocks.1." in key or "layer.1." in key:  # where blocks are alike, one shows the rest
            continue
        yield "renamed", key, {**others, f"{key}_": value}
        matrix = value.flatten(1) if value.dim() > 1 else value
        if matrix.dim() == 2 and matrix.shape[0] != matrix.shape[1] and 1 not in matrix.shape:
            yield "transposed", key, {**others, key: value.transpose(0, 1).contiguous()}
        if value.any():
            yield "zeroed", key, {**others, key: torch.zeros_like(value)}


def every_format():
    """{name: (weights, what else was found with them, what they cannot tell)}."""
    again = ("mae_st_head_dim_32", "mae_st_pixels", "slowfast_two", "videomae_v2_dual")  # the names of others
    files = [name for name in FILES if not name.startswith(again)]
    formats = {name: (lambda name=name: golden(name)[0], {}, STATED[name]) for name in files}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("videomae_default", "videomae_classify"):
            weights, config = to_huggingface(expected_model(name))
            formats[f"huggingface {name}"] = (lambda weights=weights: weights, {"hub_config": config}, {})
    still = {"num_heads": 2, "decoder_num_heads": 2, "num_frames": 4}
    formats["image-mae"] = (lambda: image_weights(still_autoencoder()), {}, still)
    own = expected_model("mae_st_default")
    formats["stmae"] = (own.state_dict, {"config": ("MaskedAutoencoder", own.config.to_dict())}, {})
    return formats


EVERY_FORMAT = every_format()


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_tensor_counts(name, monkeypatch):
    """One that is missing, renamed or transposed is refused, or said by its name; one that is zeroed is said."""
    weights, beside, stated = EVERY_FORMAT[name]
    weights = weights()

    def load_(changed):
        monkeypatch.setattr("stmae.checkpoint.files.read", lambda path: Weights("file", changed, **beside))
        return load("file", **stated)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_(weights)
    for what, key, changed in mutations(weights):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                load_(changed)
            except (CheckpointError, CheckpointMismatch) as error:
                assert str(error) and what != "zeroed", (what, key)
            else:
                # Biases and tokens of a new model are zero, so that ours are not said.
                new = name == "stmae" and what == "zeroed" and (weights[key].dim() == 1 or weights[key].shape[0] == 1)
                assert new or any(key in str(warning.message) for warning in said), (what, key)


def test_biases_of_q_k_and_v_that_are_absent_are_said(tmp_path):
    weights, _ = golden("videomae_pixels_no_bias")
    stated = {name: value for name, value in STATED["videomae_pixels_no_bias"].items() if name != "qkv_bias"}
    path = tmp_path / "checkpoint.pth"
    torch.save(weights, path)
    with pytest.warns(UserWarning, match=r"encoder\.blocks\.0\.attn\.q_bias is missing, .* qkv_bias=False"):
        assert not load(path, **stated).config.qkv_bias
    with pytest.raises(CheckpointMismatch, match=r"missing: encoder\.blocks\.0\.attn\.q_bias"):
        load(path, **stated, qkv_bias=True)


def test_values_that_are_not_finite_are_said(tmp_path):
    weights, _ = golden("videomae_classify")
    weights["head.weight"][0, 0] = torch.nan
    path = tmp_path / "checkpoint.pth"
    torch.save(weights, path)
    with pytest.warns(UserWarning, match=r"head\.weight holds values that are not finite"):
        load(path, **STATED["videomae_classify"])


# --- Hugging Face folders ---


def hub_folder(tmp_path, **changes):
    weights, config = to_huggingface(from_videomae(*golden("videomae_classify")))
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder, weights


@pytest.mark.filterwarnings("ignore:to_huggingface")
def test_a_tensor_of_a_hugging_face_folder_missing_is_refused(tmp_path):
    folder, weights = hub_folder(tmp_path)
    assert isinstance(load(folder), VideoClassifier)
    for key in weights:
        save_file({name: value for name, value in weights.items() if name != key}, folder / "model.safetensors")
        with pytest.raises((CheckpointError, CheckpointMismatch)):
            load(folder)


@pytest.mark.filterwarnings("ignore:to_huggingface")
def test_shards_are_put_together(tmp_path):
    folder, weights = hub_folder(tmp_path)
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    index = {"weight_map": {key: f"part-{i % 2}.safetensors" for i, key in enumerate(names)}}
    for part in range(2):
        save_file({key: weights[key] for key in names[part::2]}, folder / f"part-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(load(folder), expected)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors, which it names, is missing"):
        load(folder)
    index["weight_map"][names[0]] = "../part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected the names of files beside it"):
        load(folder)


@pytest.mark.filterwarnings("ignore:to_huggingface")
@pytest.mark.parametrize("model_type, name", [("hiera", "Hiera"), ("vjepa2", "V-JEPA 2"), ("bert", "'bert'")])
def test_other_architectures_are_refused_by_name(model_type, name, tmp_path):
    folder, _ = hub_folder(tmp_path, model_type=model_type)
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "names, architecture",
    [
        (["blocks.0.attn.qkv.weight", "blocks.2.proj.weight", "pos_embed"], "Hiera"),
        (["predictor_embed.weight", "predictor_blocks.0.attn.qkv.weight"], "V-JEPA"),
        (["clip_projector.norm1_q.weight", "blocks.0.attn.qkv.weight"], "InternVideo"),
        (["blocks.0.attn.pool_q.weight", "patch_embed.proj.weight"], "MViT"),
        (["layer1.0.conv1.weight"], "layer1.0.conv1.weight"),
    ],
)
def test_other_weights_are_refused_by_name(names, architecture, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(CheckpointError, match=architecture):
        load(path)


# --- files that are none ---


class RunsCode:
    def __reduce__(self):
        return (print, ("this must not run",))


def write_pickle(path):
    torch.save({"model": {"a": torch.ones(2)}, "extra": RunsCode()}, path)


def write_truncated(path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (write_pickle, "needs more than tensors"),
        (write_truncated, "cut short|cannot read"),
        (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "needs more than tensors"),
        (lambda path: path.write_text("no checkpoint at all"), "cannot read"),
        (lambda path: torch.save([torch.ones(2)], path), "expected a dictionary"),
        (lambda path: torch.save({"epoch": 3}, path), "expected tensors"),
        (lambda path: torch.save({}, path), "expected tensors"),
        (lambda path: path.mkdir(), "expected a run's folder or a Hugging Face folder"),
        (lambda path: None, "no such file"),
    ],
    ids=["empty", "code", "truncated", "plain-pickle", "text", "list", "no-tensors", "nothing", "folder", "missing"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(write, message, suffix, tmp_path, capsys):
    path = tmp_path / f"model{suffix}"
    write(path)
    with pytest.raises(CheckpointError, match=message) as refused:
        load(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert "must not run" not in capsys.readouterr().out


def replaced(**tensors):
    weights, _ = golden("videomae_default")
    return {**weights, **{name.replace("__", "."): value for name, value in tensors.items()}}


def nested_in_itself():
    state = {}
    state["model"] = state
    return state


@pytest.mark.parametrize(
    "state, says",
    [
        (
            lambda: {name: value.to(torch.int8) for name, value in replaced().items()},
            "expected floating-point weights .* torch.int8",
        ),
        (lambda: replaced(mask_token=torch.zeros(1, 1, 32, dtype=torch.complex64)), "mask_token torch.complex64"),
        (lambda: replaced(mask_token=torch.zeros(1, 1, 32).to(torch.float8_e4m3fn)), "mask_token torch.float8_e4m3fn"),
        (lambda: replaced(mask_token=torch.zeros(1).expand(1, 1, 10**12)), "every value in the file, got mask_token"),
        (lambda: replaced(mask_token=torch.zeros(1, 1, 32).to_sparse()), "dense tensors .* mask_token"),
        (lambda: replaced(mask_token=torch.zeros(1, 1, 32, device="meta")), "mask_token .* on meta"),
        (lambda: replaced(mask_token=torch.tensor(1.0)), r"mask_token expected \[1, 32\], got \[\]"),
        (lambda: replaced(encoder__patch_embed__proj__weight=torch.zeros(48, 3, 2, 0, 8)), r"proj\.weight \[D, C"),
        (lambda: replaced(encoder__patch_embed__proj__weight=torch.tensor(1.0)), r"proj\.weight \[D, C"),
        (
            lambda: replaced(encoder__blocks__1000000000__norm1__weight=torch.zeros(2)),
            r"numbered from 0, got encoder\.blocks\.1000",
        ),
        (lambda: {1: torch.zeros(2)}, "tensors with other names"),
        (nested_in_itself, "8 dictionaries deep"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(state, says, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(state(), path)
    with pytest.raises((CheckpointError, CheckpointMismatch), match=says), warnings.catch_warnings():
        load(path, **STATED["videomae_default"])


@pytest.mark.filterwarnings("ignore:to_huggingface")
@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_hidden_layers": 10**9}, "depth to be at most"),
        ({"num_frames": 10**9}, "num_frames to be at most"),
        ({"intermediate_size": 10**15}, "mlp_ratio times width"),
        ({"use_mean_pooling": "no"}, "use_mean_pooling true or false, got 'no'"),
    ],
)
def test_a_configuration_that_no_weights_can_have_is_refused_at_once(change, says, tmp_path):
    folder, _ = hub_folder(tmp_path, **change)
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    model = still_autoencoder()
    save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a running average"):
        load(tmp_path / "model.safetensors", ema=True)


def test_a_folder_without_config_is_refused(tmp_path):
    save_file(golden("videomae_classify")[0], tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_our_own_files_and_folders(tmp_path):
    model = expected_model("mae_st_default")
    save(model, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        again = load(path)
        assert again.config == model.config and again.load_report.format == "stmae"
        assert_same_weights(again, model)
    assert load(tmp_path, num_frames=16).config.num_frames == 16
    assert load_classifier(tmp_path, num_classes=3).config.num_classes == 3


# --- image MAE ---


def test_an_image_mae_is_inflated(tmp_path):
    model = still_autoencoder()
    path = tmp_path / "mae_pretrain_vit.pth"
    encoder = {name: value for name, value in image_weights(model).items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, path)
    inflated = load(path, num_heads=2, num_frames=4)
    assert inflated.load_report.format == "image-mae" and inflated.config.num_classes == 0
    still = torch.randn(2, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        ours, theirs = inflated.encoder(still), model.encoder(still)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
