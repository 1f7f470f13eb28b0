"""The method in pictures: what a trained autoencoder makes of one held-out clip, from patches to reconstruction.

    stmae demo --output demo-output
    python -m studies.method --checkpoint demo-output --out docs

Every picture of docs/method.md is drawn from that run: its weights, its clip, one mask.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import stmae.training
from stmae import ops
from stmae.masking import make_mask
from stmae.training import ViewClips, as_video, find_videos
from stmae.training.evaluation.pictures import load_autoencoder

HELD_OUT = Path(stmae.training.__file__).parent / "assets/held_out.txt"
SCALE, GAP, LABEL, MARGIN = 2, 8, 24, 4  # pixels: of a frame's pixel; between frames; of a line of text; around everything
GREY, PLACE = (128, 128, 128), (214, 214, 214)  # a masked patch; the place of a mask token
STRATEGIES = ("random", "tube", "frame", "block")


def slices(pictures, config):
    """Pictures uint8 [F, H, W, 3] -> the first of each time slice, [t, H, W, 3]."""
    return pictures[:: len(pictures) // config.grid[0]]


def spread(values, config):
    """A value for each patch, uint8 [N, 3], as pictures [t, H, W, 3]."""
    return values.view(*config.grid, 3).repeat_interleave(config.patch_size[0], 1).repeat_interleave(config.patch_size[1], 2)


def as_bytes(frames):
    """[3, F, H, W] float in [0, 1] -> uint8 [F, H, W, 3]."""
    return (frames * 255).round().byte().permute(1, 2, 3, 0)


def enlarged(picture):
    """uint8 [H, W, 3] -> an Image, each pixel SCALE x SCALE."""
    return Image.fromarray(picture.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1).contiguous().numpy())


def with_grid(picture, config):
    """uint8 [H, W, 3] -> an Image with the lines between patches."""
    image = enlarged(picture)
    draw = ImageDraw.Draw(image)
    for step, length, horizontal in ((config.patch_size[0], image.height, True), (config.patch_size[1], image.width, False)):
        for place in range(step * SCALE, length, step * SCALE):
            draw.line([(0, place), (image.width, place)] if horizontal else [(place, 0), (place, image.height)], fill="white")
    return image


def sheet(rows):
    """One picture: below each label its Images, in a row."""
    font = ImageFont.load_default(15)
    width = 2 * MARGIN + max(
        max(sum(image.width + GAP for image in images) - GAP, round(font.getlength(label))) for label, images in rows
    )
    height = sum(LABEL + images[0].height + GAP for _, images in rows) - GAP + 2 * MARGIN
    picture, top = Image.new("RGB", (width, height), "white"), MARGIN
    for label, images in rows:
        ImageDraw.Draw(picture).text((MARGIN, top + 2), label, fill="black", font=font)
        left, top = MARGIN, top + LABEL
        for image in images:
            picture.paste(image, (left, top))
            left += image.width + GAP
        top += images[0].height + GAP
    return picture


def colours(vectors):
    """Vectors [n, D] -> uint8 [n, 3]: their first three principal components, each from its least to its greatest."""
    centred = vectors - vectors.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    directions = directions * directions.sum(1, keepdim=True).sign()  # a direction's sign is arbitrary
    parts = centred @ directions.T
    low, high = parts.min(0).values, parts.max(0).values
    return ((parts - low) / (high - low) * 200 + 40).round().byte()


def strip(images):
    """Images of one size in a line, as one."""
    step = images[0].width + 4
    picture = Image.new("RGB", (len(images) * step - 4, images[0].height), "white")
    for number, image in enumerate(images):
        picture.paste(image, (number * step, 0))
    return picture


def patch_images(pictures, ids, config):
    """The patches ``ids`` [n] of pictures [t, H, W, 3], as Images."""
    (_, h, w), (p, q) = config.grid, config.patch_size
    cells = pictures.view(-1, h, p, w, q, 3).transpose(2, 3).reshape(-1, p, q, 3)
    return [enlarged(cells[index]) for index in ids.tolist()]


@torch.no_grad()
def draw(checkpoint, out, *, number=0, seed=0):
    """Writes method-*.png to the folder ``out``; returns their names and what the page says of the run."""
    model, clips = load_autoencoder(checkpoint, None)
    config = model.config
    if config.target != "normalized_pixels":
        raise ValueError(f"method: expected weights of a model that predicts normalised patches, got target {config.target!r}")
    entries = find_videos(HELD_OUT)
    views = ViewClips(entries, clips, frames=config.num_frames, size=config.image_size)
    video = as_video(views[number]["clips"])
    keep, masked = model.sample_mask(1, generator=torch.Generator().manual_seed(seed))
    out_of = model(video, mask=(keep, masked))
    latent = model.encode(video, keep)[0, 1:] if config.class_token else model.encode(video, keep)[0]
    pictures = model.reconstruct(video, out_of)

    frames = slices(video[0].permute(1, 2, 3, 0), config)
    visible = torch.zeros(config.num_tokens, dtype=torch.bool).index_fill(0, keep[0], True)
    is_visible = spread(visible[:, None].expand(-1, 3), config)
    hidden = torch.where(is_visible, frames, torch.tensor(GREY, dtype=torch.uint8))
    seen, count, total = keep.shape[1], masked.shape[1], config.num_tokens

    tinted = torch.tensor(PLACE, dtype=torch.uint8).expand(total, 3).clone()
    tinted[keep[0]] = colours(latent)
    tokens = spread(tinted, config)
    before, after = patch_images(frames, keep[0], config), patch_images(tokens, keep[0], config)

    own = {}  # of each strategy one mask
    for name in STRATEGIES:
        kept, _ = make_mask(name, 1, config.grid, config.mask_ratio, generator=torch.Generator().manual_seed(seed))
        shown = torch.zeros(total, dtype=torch.bool).index_fill(0, kept[0], True)
        own[name] = torch.where(spread(shown[:, None].expand(-1, 3), config), frames, torch.tensor(GREY, dtype=torch.uint8))

    original, _, rebuilt = (slices(as_bytes(x[0]), config) for x in pictures[:3])
    # What the model predicts, without the mean and contrast of the original: 0 is grey, 3 deviations are black and white.
    predicted = torch.zeros(1, total, config.patch_values).index_copy_(1, masked[0], out_of.pred)
    p, q = config.patch_size
    per_frame = predicted.view(*config.grid, -1, p, q, 3)[:, :, :, 0]  # the first frame of each patch
    raw = per_frame.permute(0, 1, 3, 2, 4, 5).reshape(frames.shape)
    raw = ((raw / 6 + 0.5).clamp(0, 1) * 255).round().byte()
    raw = torch.where(is_visible, frames, raw)

    kind = {"frames": config.frames, "normalize": True, "mean": config.mean, "std": config.std}
    each = ops.patch_loss(out_of.pred, video, masked, patch_size=config.target_patch_size, reduction="none", **kind)[0]
    heat = torch.zeros(total).index_copy(0, masked[0], (each / 2).clamp(0, 1))
    tint = torch.stack([55 + 200 * heat, 55 + 90 * heat, 95 - 60 * heat], dim=1).round().byte()
    errors = torch.where(is_visible, frames, spread(tint, config))

    t, h, w = config.grid
    grids = {
        "method-patches": [(f"a clip of {config.num_frames} frames, in {t} x {h} x {w} patches", frames, with_grid)],
        "method-mask": [(f"masked: {count} of {total} patches", hidden, with_grid)],
        "method-strategies": [(name, own[name], None) for name in STRATEGIES],
        "method-decoder": [(f"{seen} latents in their places, {count} times the mask token", tokens, with_grid)],
        "method-reconstruction": [
            ("predicted: patches without mean and contrast", raw, None),
            ("mean and contrast of each patch from the original", rebuilt, None),
            ("original", original, None),
        ],
        "method-loss": [("squared error of each masked patch, from 0 (dark) to 2 (bright)", errors, None)],
    }
    drawn = {
        name: sheet([(label, [make(x, config) if make else enlarged(x) for x in row]) for label, row, make in rows])
        for name, rows in grids.items()
    }
    drawn["method-encoder"] = sheet(
        [
            (f"what the encoder is given: {seen} patches", [strip(before)]),
            ("what it returns: a latent for each", [strip(after)]),
        ]
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        picture.quantize(256).save(out / f"{name}.png", optimize=True)
    said = {"loss": out_of.loss.item(), "visible": seen, "masked": count, "tokens": total, "grid": config.grid}
    return sorted(drawn), said


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder of 'stmae demo', or other weights")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args()
    names, said = draw(arguments.checkpoint, arguments.out)
    print(", ".join(f"{name}.png" for name in names))
    print("; ".join(f"{name} {value}" for name, value in said.items()))


if __name__ == "__main__":
    main()
