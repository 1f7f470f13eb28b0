"""The pictures of the method: drawn from any weights, all on the page, and what the page says of the mask."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from stmae import checkpoint
from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training import PretrainConfig, from_preset
from studies import method

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {"image_size": 32, "patch_size": (8, 16), "num_frames": 4, "width": 32, "depth": 1, "num_heads": 2}
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.75}


def weights(folder, **changes):
    model = MaskedAutoencoder(MaskedAutoencoderConfig(**SMALL, **DECODER, **changes))
    checkpoint.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_the_pictures_and_their_page(tmp_path):
    names, said = method.draw(weights(tmp_path), tmp_path / "out")
    page = (DOCS / "method.md").read_text()
    assert set(names) == {path.stem for path in (tmp_path / "out").iterdir()} == set(re.findall(r"\((method-\w+)\.png\)", page))
    assert said["tokens"] == 2 * 4 * 2 and said["visible"] == 4 and said["masked"] == 12 and said["loss"] > 0
    for name in names:
        with Image.open(tmp_path / "out" / f"{name}.png") as drawn, Image.open(DOCS / f"{name}.png") as shown:
            assert drawn.width > 100 and shown.width <= 820  # the site's column
    model = from_preset(PretrainConfig, "demo", data="x", output="y").model
    counts = model.token_counts()
    assert f"{counts.masked} of {counts.tokens}" in page and f"the {counts.visible} visible patches" in page
    assert "{} slices of {} x {} patches".format(*model.grid) in page and f"`D` = {model.width}" in page


def test_colours_tell_like_from_unlike():
    vectors = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0.1], [5, 0, 0, 0], [0, 4, 0, 0], [0, 0, 3, 0]])
    distance = torch.cdist(method.colours(vectors).float(), method.colours(vectors).float())
    assert distance[0, 1] < 0.2 * distance[0, 2:].min()


def test_other_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected weights of a model that predicts normalised patches, got target 'pixels'"):
        method.draw(weights(tmp_path, target="pixels"), tmp_path)
