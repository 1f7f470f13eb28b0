"""Hugging Face's VideoMAE on these kernels: one call, the same weights, outputs and gradients.

    python examples/accelerate_transformers.py

Needs transformers, and for the default model a connection to the hub. ``--model`` also takes a folder.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import VideoMAEForPreTraining

import stmae.training
from stmae.integrations.transformers import accelerate
from stmae.training import ClipConfig, ViewClips, find_videos

CLIP = Path(stmae.training.__file__).parent / "assets/bunny_1.mp4"


def read_clip(path, config):
    """The middle of a video as transformers' image processor gives it: float32 [1, T, C, H, W], ImageNet's normalisation."""
    size = (config.image_size, config.image_size)
    views = ViewClips(find_videos(path), ClipConfig(stride=4), frames=config.num_frames, size=size)
    clip = views[0]["clips"].permute(0, 1, 4, 2, 3) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (clip - mean) / std


def tube_mask(config, ratio, seed=0):
    """bool [1, N], true where a patch is masked: the same patches in every frame, as VideoMAE does."""
    slices = config.num_frames // config.tubelet_size
    noise = torch.rand((config.image_size // config.patch_size) ** 2, generator=torch.Generator().manual_seed(seed))
    return (noise.argsort().argsort() < round(ratio * len(noise))).repeat(slices)[None]


def step(model, clip, mask):
    """(loss, gradient of the patch embedding, seconds) of a forward and backward pass, the second of two."""
    for _ in range(2):
        model.zero_grad()
        start = time.perf_counter()
        loss = model(clip, bool_masked_pos=mask).loss
        loss.backward()
        seconds = time.perf_counter() - start
    return loss.item(), model.videomae.embeddings.patch_embeddings.projection.weight.grad.clone(), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="MCG-NJU/videomae-base", help="a folder, or owner/name on the hub")
    parser.add_argument("--video", default=str(CLIP))
    parser.add_argument("--mask_ratio", type=float, default=0.9)
    arguments = parser.parse_args()

    model = VideoMAEForPreTraining.from_pretrained(arguments.model)
    clip, mask = read_clip(arguments.video, model.config), tube_mask(model.config, arguments.mask_ratio)
    loss, grad, seconds = step(model, clip, mask)
    accelerate(model)  # in place
    fast_loss, fast_grad, fast_seconds = step(model, clip, mask)
    error = ((fast_grad - grad).abs().max() / grad.abs().max()).item()
    if abs(fast_loss - loss) > 1e-4 * abs(loss) or error > 1e-3:
        raise RuntimeError(f"expected the same numbers, got losses {loss} and {fast_loss}, gradients {error:.1e} apart")
    print(f"loss {loss:.5f}, then {fast_loss:.5f}; gradients {error:.0e} apart")
    print(f"a step: {seconds:.3f} s, then {fast_seconds:.3f} s")


if __name__ == "__main__":
    main()
