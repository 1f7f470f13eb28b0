"""Videos in every container and codec that the tests read, by name."""

from pathlib import Path

import av
import pytest

from tests.support.synthetic_video import write_video

# Small files that were once read wrongly. NAME.expected.npz: the first, middle and last frame as FFmpeg 5.1's command shows them.
MEDIA = Path(__file__).parents[1] / "training" / "data" / "media"

FRAMES = 60
UNEVEN = [40 * i + i * i % 17 for i in range(FRAMES)]  # milliseconds

FILES = {
    "h264.mp4": {},
    "reordered.mp4": {"options": {"bf": "3", "x264-params": "open-gop=1"}},
    "one_key_frame.mp4": {"gop": 250},
    "odd_size.mp4": {"size": (67, 101), "pix_fmt": "yuv444p"},
    "odd_size.webm": {"size": (67, 101), "codec": "libvpx-vp9"},
    "odd_width.webm": {"size": (64, 101), "codec": "libvpx-vp9"},
    "interlaced.mp4": {"options": {"x264-params": "interlaced=1"}},
    "nv12.mkv": {"codec": "rawvideo", "pix_fmt": "nv12"},
    "hevc_10bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "variable_rate.mp4": {"times": UNEVEN},
    "variable_rate.mkv": {"times": UNEVEN},
    "with_sound.mov": {"audio": True},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "stream.ts": {},
    "program_stream.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "program_stream.vob": {"codec": "mpeg2video", "options": {"bf": "2"}, "container": "vob"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "reordered_mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "reordered_h264.avi": {"options": {"bf": "2"}},
    "h264_10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "12bit.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p12le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "grey.avi": {"codec": "ffv1", "pix_fmt": "gray"},
    "grey_16bit.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "full_range.mp4": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "pictures.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "no_time_stamps.h264": {"container": "h264"},
}


def write(path, frames=FRAMES, **options):
    try:
        return write_video(path, frames, **options)
    except av.codec.codec.UnknownCodecError as error:
        pytest.skip(f"this FFmpeg has no encoder: {error}")
