"""Videos whose every frame shows its number, made for the tests: eight blocks, black or white, are the number's bits."""

import fractions
import struct

import av
import numpy as np
from PIL import Image

BLOCK = 16  # pixels; large enough to survive any codec


def numbered_frame(number, height, width, ground=96):
    """uint8 [H, W, 3]: the bits of ``number`` in eight blocks, over a grey ground that drifts so that no frame repeats
    another."""
    frame = np.full((height, width, 3), ground, np.uint8)
    frame[2 * BLOCK :, :, 0] = 64 + number * 3 % 128
    for bit in range(8):
        row, column = divmod(bit, 4)
        frame[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = 235 if number >> bit & 1 else 20
    return frame


def read_number(frame):
    """The number in a decoded frame."""
    number = 0
    for bit in range(8):
        row, column = divmod(bit, 4)
        block = frame[row * BLOCK + 4 : (row + 1) * BLOCK - 4, column * BLOCK + 4 : (column + 1) * BLOCK - 4]
        number |= int(block.mean() > 128) << bit
    return number


def write_video(
    path,
    frames=60,
    *,
    size=(64, 96),
    codec="libx264",
    pix_fmt="yuv420p",
    gop=12,
    rate=25,
    times=None,
    container=None,
    options=None,
    audio=False,
    ground=96,
):
    """Writes ``frames`` numbered frames; ``times``: their time stamps in units of 1 / (1000) s, for a variable rate."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        sound = file.add_stream("aac", rate=16000) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size, ground), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], fractions.Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            _mux_silence(file, sound)
    return path


def write_audio(path, seconds=1):
    """A file with sound and no pictures."""
    with av.open(str(path), "w") as file:
        _mux_silence(file, file.add_stream("aac", rate=16000), seconds)
    return path


def _mux_silence(file, stream, seconds=1):
    for start in range(0, 16000 * seconds, 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def rotate_mp4(path, degrees):
    """Sets the display matrix of an mp4's track header, as a telephone held upright does. Clockwise degrees, a multiple of 90."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    return set_display_matrix(path, cosine, sine, -sine, cosine)


def set_display_matrix(path, a, b, c, d):
    """Of an mp4: a stored point (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    one = 1 << 16
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    header = data.index(b"tkhd")
    struct.pack_into(">9i", data, header + 4 + 40, *matrix)
    path.write_bytes(bytes(data))
    return path


def write_image(path, number, *, size=(64, 96)):
    """Writes the numbered frame as an image, in the format of its extension."""
    Image.fromarray(numbered_frame(number, *size)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path
