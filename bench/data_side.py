"""One side of bench_data's comparison in a process of its own, so that its memory can be told:
``python -m bench.data_side NAME VIDEO R``.

For each line on its input it takes R clips of the video from random places, and answers with a JSON line: the milliseconds of
processor time a clip, and the most memory it has had, in MiB. Every side takes the same frames and the same crops.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from stmae.training.data.clip_sampling import random_clip
from stmae.training.data.transforms import random_crop, resized_crop
from stmae.training.data.video import Video

FRAMES, STRIDE, SIZE = 16, 4, (224, 224)
SCALE, ASPECT = (0.5, 1.0), (0.75, 1.3333)


class Ours:
    """The data set's own path."""

    exact = True

    def __init__(self, path):
        self.path = path

    def clips(self, indices, crops, out):
        with Video(self.path, exact=self.exact) as video:
            video.clips(indices, crops, out)


class OursSwscale(Ours):
    exact = False


class Peer:
    """Whole frames of another decoder, opened for each sample as a data worker opens a video, then torch's crop and resize."""

    def __init__(self, path):
        self.path = path

    def frames(self, wanted):
        """uint8 [len(wanted), H, W, 3] of sorted frame numbers."""
        raise NotImplementedError

    def clips(self, indices, crops, out):
        wanted, place = np.unique(np.concatenate(indices), return_inverse=True)
        frames = torch.as_tensor(self.frames(wanted.tolist()))
        for clip, crop, numbers in zip(out, crops(*frames.shape[1:3]), np.split(place, len(indices))):
            cut = resized_crop(frames[numbers], crop.box, crop.size)
            torch.from_numpy(clip).copy_(cut.flip(2) if crop.flip else cut)


class Torchcodec(Peer):
    mode = "exact"

    def frames(self, wanted):
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(self.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=self.mode)
        return decoder.get_frames_at(indices=wanted).data


class TorchcodecApproximate(Torchcodec):
    mode = "approximate"


class Decord(Peer):
    def frames(self, wanted):
        import decord

        return decord.VideoReader(self.path, num_threads=1).get_batch(wanted).asnumpy()


class OpenCV(Peer):
    def frames(self, wanted):
        import cv2

        cv2.setNumThreads(1)
        capture = cv2.VideoCapture(self.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        capture.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
        found, following = [], wanted[0]
        for index in wanted:
            while following < index:  # decoded, and not converted
                capture.grab()
                following += 1
            found.append(capture.read()[1][:, :, ::-1])
            following += 1
        return np.stack(found)


SIDES = {
    "exact": Ours,
    "swscale": OursSwscale,
    "torchcodec": Torchcodec,
    "torchcodec approximate": TorchcodecApproximate,
    "decord": Decord,
    "opencv": OpenCV,
}


def sample(side, count, repeats, number):
    """uint8 [repeats, T, h, w, 3]: the clips of sample ``number`` from a video of ``count`` frames."""
    rngs = [np.random.default_rng([number, r]) for r in range(repeats)]
    indices = [random_clip(rng, count, FRAMES, STRIDE) for rng in rngs]
    out = np.empty((repeats, FRAMES, *SIZE, 3), np.uint8)
    side.clips(indices, lambda h, w: [random_crop(rng, h, w, SIZE, SCALE, ASPECT, True) for rng in rngs], out)
    return out


def peak_mebibytes():
    """Of this process. (getrusage also counts the one that it was forked from.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main(name, path, repeats):
    torch.set_num_threads(1)
    with Video(path) as video:
        count = len(video)
    side = SIDES[name](path)
    sample(side, count, repeats, 0)
    for number, _ in enumerate(sys.stdin, 1):
        before = time.process_time()
        sample(side, count, repeats, number)
        spent = time.process_time() - before
        print(json.dumps([1e3 * spent / repeats, peak_mebibytes()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
