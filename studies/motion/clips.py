"""A labelled set in which only motion separates the classes: a camera over a canvas of real pictures.

The eight classes are four motions, each forwards and backwards in time, so that a model which does not see the order of the
frames cannot pass one half, and a single frame carries no information.
"""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = ("pan right", "pan left", "pan down", "pan up", "zoom out", "zoom in", "turn clockwise", "turn anticlockwise")
FRAMES = 8
SIZE = 32  # of a frame, pixels
SIDE = 5  # pictures along a side of the canvas
ITEM = 28  # of a picture, pixels
DARK, LIGHT = torch.tensor([0.0, 0.25]), torch.tensor([0.35, 1.0])  # colours that a picture's black and white become lie between
DEBIAN = "/usr/share/datasets/fashion-mnist"

# What the camera does from one frame to the next (right, down in frame pixels, log of the scale, clockwise angle in radians):
# the class's motion lies between SLOW and FAST, the other three drift by up to DRIFT either way, and every frame is off by up to
# SHAKE.
SLOW = torch.tensor([1.2, 1.2, 0.05, 0.08])
FAST = torch.tensor([2.8, 2.8, 0.09, 0.18])
DRIFT = torch.tensor([0.4, 0.4, 0.015, 0.025])
SHAKE = torch.tensor([0.4, 0.4, 0.01, 0.02])
# Where it is half-way through the clip: anywhere relative to the canvas's raster of pictures, at any angle, nearer or farther.
# At scale 0 in the logarithm, a frame pixel is a canvas pixel.
MIDDLE = torch.tensor([ITEM / 2, ITEM / 2, 0.15, math.pi])


class Clips(NamedTuple):
    """clips: uint8 [n, T, H, W, C] as a decoder gives them; labels: int64 [n], indices of CLASSES, 0 to 7 over and over."""

    clips: torch.Tensor
    labels: torch.Tensor

    def take(self, count):
        return Clips(self.clips[:count], self.labels[:count])

    def video(self, rows=slice(None)):
        """The model's view of some of the clips: [B, C, T, H, W]."""
        return self.clips[rows].permute(0, 4, 1, 2, 3)


def load_pictures(folder=DEBIAN):
    """(training, test) pictures, uint8 [60000, 28, 28] and [10000, 28, 28], of Fashion-MNIST (Xiao et al., 2017, MIT licence).

    folder: with ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, gzipped or not.

    Raises FileNotFoundError, with what to install, where they are missing; ValueError for a file that is something else.
    """
    return tuple(_read_idx(_find(Path(folder), f"{part}-images-idx3-ubyte"), (ITEM, ITEM)) for part in ("train", "t10k"))


def load_labels(folder=DEBIAN):
    """(training, test) labels of the pictures, int64 [60000] and [10000], 0 to 9, from ``train-labels-idx1-ubyte`` and
    ``t10k-labels-idx1-ubyte``. Raises as ``load_pictures``."""
    return tuple(_read_idx(_find(Path(folder), f"{part}-labels-idx1-ubyte"), ()).long() for part in ("train", "t10k"))


def _find(folder, name):
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no {name} or {name}.gz in {folder}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist; elsewhere "
        "take the four files from https://github.com/zalandoresearch/fashion-mnist and give their folder with --images"
    )


def _read_idx(path, shape):
    """uint8 [n, *shape] of an idx file."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    start, values = 8 + 4 * len(shape), math.prod(shape)  # the header: type and dimensions, the count, each dimension
    header = np.frombuffer(data[:start].ljust(start, b"\0"), ">u4").tolist()
    count = (len(data) - start) // values
    if header != [0x801 + len(shape), count, *shape] or not count or len(data) != start + count * values:
        expected = f"an idx file of {'x'.join(map(str, shape))} byte images" if shape else "an idx file of bytes"
        raise ValueError(f"{path}: expected {expected}, got the header {header} and {len(data)} bytes")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(count, *shape)


def make_part(train_pictures, test_pictures, name, count, seed, **shape):
    """``count`` clips of a seed's "unlabelled", "train" or "test" part. Pictures: uint8 [n, 28, 28]; shape: as of ``draw``.

    Test clips show test pictures only, the others training pictures. The unlabelled have labels: they are known, and never used.
    """
    pictures = test_pictures if name == "test" else train_pictures
    return draw(pictures, count, seed, ("unlabelled", "train", "test").index(name), **shape)


def draw(pictures, count, *seeds, frames=FRAMES, size=(SIZE, SIZE), chunk=256):
    """``count`` clips of ``frames`` frames of ``size`` (height, width), a pure function of the pictures, the seeds and these.

    A larger frame sees more of the canvas, a longer clip more of the way.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
    labels = torch.arange(count) % len(CLASSES)
    poses = camera_paths(labels, generator, frames)
    chosen = torch.randint(len(pictures), (count, SIDE**2), generator=generator)
    colours = torch.rand(2, count, SIDE**2, 3, generator=generator)
    colours = DARK[:, None, None, None] + (LIGHT - DARK)[:, None, None, None] * colours
    clips = torch.empty(count, frames, *size, 3, dtype=torch.uint8)
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        clips[rows] = render(pictures[chosen[rows]], colours[:, rows], poses[rows], size)
    return Clips(clips, labels)


def camera_paths(labels, generator, frames=FRAMES):
    """Poses float32 [n, T, 4]: centre x, y on the canvas in pixels from its middle, log scale, angle. The paths of an odd label
    are those of its even partner, backwards."""
    count = len(labels)

    def uniform(*shape):
        return 2 * torch.rand(shape, generator=generator) - 1

    rates = DRIFT * uniform(count, 4)
    own = torch.arange(count), labels // 2
    rates[own] = (SLOW + (FAST - SLOW) * torch.rand(count, 4, generator=generator))[own]
    time = torch.arange(frames) - (frames - 1) / 2  # half-way, the pose has the same distribution in every class
    moved = time[None, :, None] * rates[:, None] + SHAKE * uniform(count, frames, 4)
    middle = MIDDLE * uniform(count, 1, 4)
    # Right and down are the camera's own, whatever its angle and scale.
    turned = torch.stack(_to_canvas(*moved[..., :2].unbind(-1), *middle[..., 2:].unbind(-1)), dim=-1)
    paths = middle + torch.cat([turned, moved[..., 2:]], dim=-1)
    return torch.where((labels % 2 == 1)[:, None, None], paths.flip(1), paths)


def render(pictures, colours, poses, size=(SIZE, SIZE)):
    """What cameras see.

    pictures: uint8 [n, 25, 28, 28], a canvas each; colours: [2, n, 25, 3] in [0, 1], of a picture's black and of its white;
    poses: [n, T, 4] -> uint8 [n, T, *size, 3].
    """
    count, frames = poses.shape[:2]
    black, white = 255 * colours[:, :, :, None, None]
    canvas = torch.lerp(black, white, pictures[..., None] / 255).view(count, SIDE, SIDE, ITEM, ITEM, 3)
    canvas = canvas.permute(0, 5, 1, 3, 2, 4).reshape(count, 3, SIDE * ITEM, SIDE * ITEM)
    x, y, log_scale, angle = poses[:, :, None, None].unbind(-1)
    down, right = torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in size), indexing="ij")
    right, down = _to_canvas(right, down, log_scale, angle)
    grid = torch.stack([x + right, y + down], dim=-1) / (SIDE * ITEM / 2)
    seen = F.grid_sample(canvas, grid.view(count, frames * size[0], size[1], 2), padding_mode="reflection", align_corners=False)
    return seen.view(count, 3, frames, *size).permute(0, 2, 3, 4, 1).round().to(torch.uint8)


def _to_canvas(right, down, log_scale, angle):
    """A step in frame pixels as a step (x, y) in canvas pixels."""
    cosine, sine = log_scale.exp() * angle.cos(), log_scale.exp() * angle.sin()
    return cosine * right - sine * down, sine * right + cosine * down
