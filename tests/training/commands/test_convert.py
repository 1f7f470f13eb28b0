"""stmae convert: between code bases and back."""

import pytest
import torch
from safetensors.torch import load_file

from stmae.checkpoint import from_mae_st, from_videomae, load
from stmae.masking import Mask
from stmae.models import MaskedAutoencoder
from stmae.training.cli import main
from tests.support.golden import read_golden
from tests.support.small_models import clip, error, random_noise


def checkpoint(tmp_path, name="videomae_default"):
    config, _, weights, _ = read_golden(name)
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", from_videomae(weights, config), weights


STATED = '["num_heads=2", "decoder_num_heads=2", "num_frames=4", "image_size=32", "mask_ratio=0.75"]'


def test_to_a_folder_and_back(tmp_path, capsys):
    path, expected, weights = checkpoint(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "ours"), "--set", STATED]) == 0
    printed = capsys.readouterr().out
    assert "recognised as videomae" in printed and "assumed target" in printed
    model = MaskedAutoencoder.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"), "--to", "videomae"]) == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--to", "videomae"]) == 0
    assert load(tmp_path / "back.pth", **model.config.replace().to_dict() | {"image_size": 32}).config.width == 48


@pytest.mark.filterwarnings("ignore:to_huggingface")
def test_to_hugging_face(tmp_path):
    path, expected, _ = checkpoint(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "hub"), "--to", "hf-videomae", "--set", STATED]) == 0
    again = load(tmp_path / "hub")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in expected.state_dict().items())
    transformers = pytest.importorskip("transformers")
    loaded = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "hub")
    keep, masked = again.sample_mask(2, noise=random_noise(again.config))
    video = clip(again.config).float() / 255
    hidden = torch.ones(2, again.config.num_tokens, dtype=torch.bool).scatter_(1, keep, False)
    out = loaded(video.transpose(1, 2), hidden)
    ours = again(video, mask=Mask(keep, masked))
    assert error(ours.pred, out.logits) < 1e-5 and error(ours.loss, out.loss) < 1e-5
    theirs = loaded.state_dict()
    assert torch.equal(theirs["encoder_to_decoder.weight"], expected.decoder.embed.weight)
    assert torch.equal(theirs["videomae.encoder.layer.1.attention.attention.value.bias"], expected.encoder.blocks[1].qkv.v_bias)


@pytest.mark.filterwarnings("ignore:to_huggingface")
def test_a_classifier_to_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    path, expected, _ = checkpoint(tmp_path, "videomae_classify")
    stated = '["num_heads=3", "num_frames=4", "image_size=32"]'
    assert main(["convert", str(path), str(tmp_path / "hub"), "--to", "hf-videomae", "--set", stated]) == 0
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hub").eval()
    video = clip(expected.config).float() / 255
    assert error(load(tmp_path / "hub")(video), theirs(video.transpose(1, 2)).logits) < 1e-5


@pytest.mark.parametrize("name", ["mae_st_default", "mae_st_joint_pos_no_cls", "mae_st_vit_classify", "videomae_v2_dual_masking"])
def test_each_code_base_gets_its_own_tensors_back(name, tmp_path):
    """So that its golden file's numbers are those of the converted file, too; and another code base's are refused."""
    to, other = ("mae_st", "videomae") if name.startswith("mae_st") else ("videomae", "mae_st")
    config, _, weights, _ = read_golden(name)
    (from_mae_st if to == "mae_st" else from_videomae)(weights, config).save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--to", to]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "other.pth"), "--to", other]) == 1
    assert not (tmp_path / "other.pth").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "num_heads cannot be determined"),
        (["--set", '["num_heads=2", "wdith=3"]'], "wdith"),
    ],
)
def test_what_cannot_be_converted_is_reported_in_one_line(options, message, tmp_path, capsys):
    path, _, _ = checkpoint(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "out"), *options]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--to", "mae_st"], "output: expected a name in .safetensors or .pth"),
        (["--set", '["num_heads"]'], "set: expected FIELD=VALUE"),
    ],
)
def test_settings_of_a_conversion_are_checked_first(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "absent"), str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err.splitlines()[-1]
