"""Pre-trains on videos as they are: every clip has its own height, width and length; nothing is cropped square or padded.

    python examples/native_sizes.py videos/

A batch is a list of clips. Their visible tokens lie one after another in one packed sequence: docs/packed.md. With checkpoints,
several processes and batches that fill a budget of tokens it is ``stmae pretrain --clips.size native``.
"""

import argparse
import random

import torch
import torch.nn.functional as F

from stmae.models import MaskedAutoencoder, MaskedAutoencoderConfig
from stmae.training import VideoError, find_videos
from stmae.training.data.decoders import open_entry


def read_clip(entry, frames, longest, patch):
    """A clip from the middle of a video, or a still picture: uint8 [3, T, H, W], a view.

    Frames with a side over ``longest`` are scaled down, their shape kept; each side is then cut to a multiple of its patch.
    """
    with open_entry(entry) as video:
        length = 1 if video.still else len(video)
        start = max(0, length - frames) // 2
        clip = torch.tensor(video.frames(range(start, min(start + frames, length)))).permute(0, 3, 1, 2)
    if max(clip.shape[2:]) > longest:
        clip = F.interpolate(clip, scale_factor=longest / max(clip.shape[2:]), mode="bilinear", antialias=True)
    if video.still:  # a clip of one tubelet
        clip = clip.repeat(patch[0], 1, 1, 1)
    T, H, W = (side // p * p for side, p in zip((len(clip), *clip.shape[2:]), patch))
    return clip[:T, :, :H, :W].transpose(0, 1)


def read_batch(entries, draw, count, *reading):
    """Clips of ``count`` videos, drawn from ``entries``, from which those that cannot be read are taken out."""
    batch = []
    while entries and len(batch) < count:
        entry = draw.choice(entries)
        try:
            batch.append(read_clip(entry, *reading))
        except VideoError as error:
            print(f"skipped video {error}")
            entries.remove(entry)
    return batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", help="a folder, searched recursively, or a list of videos")
    parser.add_argument("--frames", type=int, default=16, help="longest clip; a shorter video is a shorter clip")
    parser.add_argument("--longest", type=int, default=224, help="longest side in pixels")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", help="folder of the weights; none: they are not kept")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = MaskedAutoencoderConfig(
        image_size=arguments.longest // 16 * 16,  # the grid of learned positions, interpolated for every other
        num_frames=arguments.frames,
        width=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.width // 32,
        decoder_width=arguments.width // 2,
        decoder_depth=2,
        decoder_num_heads=arguments.width // 64,
    )
    model = MaskedAutoencoder(config).train()
    patch = (config.tubelet_size, *config.patch_size)
    entries = find_videos(arguments.videos)

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.05)
    draw = random.Random(0)
    for step in range(arguments.steps):
        batch = read_batch(entries, draw, arguments.batch, arguments.frames, arguments.longest, patch)
        if not batch:
            raise SystemExit(f"no video in {arguments.videos} can be used")
        out = model(batch, mask_ratio=(0.75, 0.9))  # a ratio for each clip, drawn from this range
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 0 or (step + 1) % 20 == 0 or step + 1 == arguments.steps:
            sizes = ", ".join("{}x{}x{}".format(*clip.shape[1:]) for clip in batch)
            print(f"step {step + 1}: loss {out.loss.item():.3f}, {sum(map(len, out.keep))} visible tokens of clips {sizes}")
    if arguments.output:
        model.eval().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
