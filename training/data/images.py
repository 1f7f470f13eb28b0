"""Images as videos: a photo is a still clip, every frame the same; a folder of numbered images is a video taken apart.

Both have the interface of ``Video``. Images are read by Pillow and turned as their EXIF says.
"""

import os
import re

import numpy as np
from PIL import Image, ImageOps

from .video import VideoError, match_size, reason_of

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
IMAGE_EXTENSIONS = frozenset((*_JPEG, ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"))


class Still:
    """An image: a video of one frame that a clip of any length can be taken from (``still`` is true)."""

    still = True

    def __init__(self, path):
        self.path = os.fspath(path)
        self._pixels = read_image(self.path)
        self.size = self._pixels.shape[:2]
        self.times, self.rate = np.zeros(1), float("nan")

    def __len__(self):
        return 1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self, indices):
        """uint8 [len(indices), H, W, 3], whatever the indices: the image over and over, a view with stride 0."""
        return np.broadcast_to(self._pixels, (len(indices), *self._pixels.shape))


class FrameFolder:
    """The first ``count`` of a folder's numbered images (img_00001.jpg, ...), in the order of their numbers, whatever they
    start at.

    Raises VideoError where there are fewer, or where the folder holds several series of them (but for optical flow, which is
    passed over).
    """

    still = False

    def __init__(self, path, count):
        self.path = os.fspath(path)
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise VideoError(self.path, f"cannot be opened ({error.strerror})") from error
        series = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            numbered = re.fullmatch(r"(.*?)(\d+)", stem)
            if numbered and suffix.lower() in IMAGE_EXTENSIONS and not numbered[1].startswith(("flow", ".")):
                series.setdefault(numbered[1] + "*" + suffix, []).append((int(numbered[2]), name))
        if len(series) > 1:
            raise VideoError(self.path, f"several series of frames: {', '.join(sorted(series))}")
        found = sorted(*series.values()) if series else []
        if len(found) < count:
            raise VideoError(self.path, f"the list says {count} frames, and the folder has {len(found)} numbered images")
        self._files = [os.path.join(self.path, name) for _, name in found[:count]]
        self.times, self.rate = np.arange(count, dtype=np.float64), float("nan")  # unknown
        self.size = read_image(self._files[0]).shape[:2]

    def __len__(self):
        return len(self._files)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self, indices):
        """uint8 [len(indices), H, W, 3]; every image wanted is read once."""
        found = {index: read_image(self._files[index]) for index in sorted({int(i) for i in indices})}
        first = found[min(found)]
        return np.stack([match_size(found[int(index)], first) for index in indices])


def read_image(path):
    """The image as uint8 [H, W, 3], RGB; grey, palette and 16-bit ones too, transparency left out. Raises VideoError."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)  # as a telephone was held
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip to 255 instead of scaling
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over, SyntaxError too
        raise VideoError(path, f"cannot be read as an image ({reason_of(error)})") from error
