"""Pictures of what a masked autoencoder makes of a video: original | masked | reconstruction."""

import collections
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from stmae import checkpoint
from stmae.models import MaskedAutoencoder
from stmae.models.packing import grid_of

from ..config.checks import check_types, require, require_device, require_fraction, require_positive, require_seed, require_text
from ..data.dataset import as_video
from ..data.packed_clips import evaluation_views
from ..data.video import VideoError, printable
from ..data.video_list import find_videos
from ..engine.device import choose_device
from ..engine.outputs import SOFTWARE, is_picture, require_own
from ..engine.run_folder import clips_of, weights_file

GAP, LABEL = 4, 20  # pixels between pictures, and of the line of text above them
ROWS = ("original", "masked", "reconstruction")


@dataclass(kw_only=True)
class ReconstructionConfig:
    """The pictures: of what, by which model, where to."""

    checkpoint: str
    """weights of a masked autoencoder: a run's folder, or a model.safetensors"""
    video: str
    """a video; or a folder or list, for pictures of each"""
    output: str
    """folder for NAME.png (all frames) and NAME.gif (moving)"""
    clip: float = 0.5
    """where in the video the clip lies: 0 its start, 1 its end"""
    stride: int | None = None
    """every stride-th frame; null: as the run was trained, else 4"""
    mask_ratio: float | None = None
    """masked fraction; null: the model's own"""
    seed: int = 0
    """of the mask"""
    device: str = "auto"
    """'auto': cuda where there is one, else cpu"""

    def __post_init__(self):
        check_types(self)
        require_text(self, "checkpoint", "video", "output")
        require_fraction(self, "clip", one=True)
        require_positive(self, "stride")
        require(self, "mask_ratio", lambda value: 0 < value < 1, "more than 0, less than 1")
        require_seed(self)
        require_device(self)


def write_reconstructions(checkpoint, video, output, *, clip=0.5, stride=None, mask_ratio=None, seed=0, device="auto"):
    """Writes NAME.png and NAME.gif of what the autoencoder at ``checkpoint`` makes of ``video``; returns their paths.

    checkpoint: a run's folder, or a model.safetensors.
    video: a video; or a folder or list, for pictures of each.
    output: the folder for the pictures.
    clip: where in the video the clip lies, from 0 (its start) to 1 (its end).
    stride: every stride-th frame; None: as the run was trained, else 4.
    mask_ratio: masked fraction of the tokens; None: the model's own.
    seed: of the mask.

    Raises ValueError for arguments out of range, or where none of the videos can be used.
    """
    checkpoint, source, output = str(checkpoint), str(video), str(output)
    settings = {"clip": clip, "stride": stride, "mask_ratio": mask_ratio, "seed": seed, "device": str(device)}
    ReconstructionConfig(checkpoint=checkpoint, video=source, output=output, **settings)  # checks them
    model, clip_settings = load_autoencoder(checkpoint, stride)
    device = choose_device(str(device))
    model.to(device)
    ratio = model.config.mask_ratio if mask_ratio is None else mask_ratio
    generator = torch.Generator().manual_seed(seed)
    packed = clip_settings.size == "native" or model.config.mask_strategy == "multi_block"
    options = {"mask_ratio": ratio, "decoder_mask_ratio": 0, "generator": generator}
    mask = None if packed else model.sample_mask(1, **options).to(device)
    entries = find_videos(source)
    views = evaluation_views(entries, clip_settings, model.config, start=clip)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)

    names = collections.Counter(printable(Path(entry.path).stem) for entry in entries)
    written, explained = [], False
    for number, entry in enumerate(entries):
        try:
            clips = views[number]["clips"]
        except VideoError as error:
            print(f"skipped video {error}")
            continue
        video = as_video(clips.to(device))
        if packed:
            generator.manual_seed(seed)  # whatever the videos before it
            video, mask = list(video), model.sample_masks([grid_of(model.config, video[0])], **options)
            mask = [own.to(device) for own in mask]
        with torch.no_grad():
            out = model(video, mask=mask)
        pictures = model.reconstruct(video, out)
        if packed:
            (pictures,) = pictures
            ratio = len(out.masked[0]) / (len(out.masked[0]) + len(out.keep[0]))
        if not explained:
            print(
                "In masked patches, "
                + (
                    "mean and contrast of each patch are taken from the original: the model predicts what is left "
                    "when these are removed."
                    if pictures.patch_statistics == "original"
                    else "everything shown is predicted."
                )
            )
            explained = True
        note = "patch mean and contrast from the original" if pictures.patch_statistics == "original" else "all of it predicted"
        rows = [to_uint8(getattr(pictures, name)[0]) for name in ROWS]
        labels = ("original", f"{ratio:.0%} masked", f"reconstruction ({note})")
        name = printable(Path(entry.path).stem)
        if names[name] > 1:  # videos of one name in several folders
            name = f"{name}-{number}"
        png, gif = output / f"{name}.png", output / f"{name}.gif"
        for path in (png, gif):
            require_own(path, is_picture)
        about = PngInfo()
        about.add_text("Software", SOFTWARE)
        grid(rows, labels).save(png, pnginfo=about)
        animate(rows, labels, gif)
        print(f"loss {out.loss.item():.3f} on {printable(entry.path)}: {png}, {gif}")
        written += [png, gif]
    if not written:
        raise ValueError(f"no pictures: none of the videos in {source} could be used, {len(entries)} in all")
    return written


def load_autoencoder(path, stride):
    """The autoencoder at ``path`` (a run's folder or a file), and the clips it was trained on, with another ``stride`` if
    one is given."""
    file = weights_file(path)
    model = checkpoint.load(file)
    if not isinstance(model, MaskedAutoencoder):
        raise ValueError(f"{file} holds a {type(model).__name__}, and only a masked autoencoder reconstructs")
    return model.eval(), clips_of(path, stride)


def to_uint8(frames):
    """[C, F, H, W] float in [0, 1] -> [F, H, W, C] uint8."""
    return (frames * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def enlarge(frames):
    """Frames [F, H, W, C] enlarged by an integer factor to at least 96 pixels, so that those of small models can be seen."""
    factor = max(1, -(-96 // min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(rows, labels):
    """One picture: a row for each of original, masked, reconstruction; a column for each frame."""
    rows = [enlarge(row) for row in rows]
    count, height, width = rows[0].shape[:3]
    font = ImageFont.load_default(12)
    widest = max(count * (width + GAP), *(math.ceil(font.getlength(label)) + GAP for label in labels))  # of a few small frames
    sheet = Image.new("RGB", (widest + GAP, len(rows) * (height + LABEL + GAP)), "white")
    for number, (row, label) in enumerate(zip(rows, labels)):
        top = number * (height + LABEL + GAP)
        ImageDraw.Draw(sheet).text((GAP, top + 3), label, fill="black", font=font)
        for column, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (GAP + column * (width + GAP), top + LABEL))
    return sheet


def animate(rows, labels, path):
    """An endless GIF: original | masked | reconstruction side by side, eight frames a second."""
    rows = [enlarge(enlarge(row)) for row in rows]
    height, width = rows[0].shape[1:3]
    frames = []
    for pictures in zip(*rows):
        sheet = Image.new("RGB", (len(rows) * (width + GAP) + GAP, height + LABEL + GAP), "white")
        for column, (picture, label) in enumerate(zip(pictures, labels)):
            left = GAP + column * (width + GAP)
            ImageDraw.Draw(sheet).text((left, 3), label.split(" (")[0], fill="black", font=ImageFont.load_default(12))
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, LABEL))
        frames.append(sheet)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0, comment=SOFTWARE.encode())
