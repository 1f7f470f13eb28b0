"""Pre-trains an autoencoder on a folder of videos, from Python, and takes features of a video with it.

    python examples/pretrain_on_a_folder.py videos/ runs/first

It is what ``stmae pretrain`` does: the same command again continues the run, whose folder has log, curves and pictures.
"""

import argparse
from pathlib import Path

import stmae
from stmae.training import PretrainConfig, ViewClips, as_video, find_videos, from_preset, pretrain


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", help="a folder, searched recursively, or a list of videos")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--preset", default="cpu-small", help="a recipe of training/presets; on a GPU: one-gpu-base")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that differ, as optimizer.epochs=20")
    arguments = parser.parse_args()

    settings = dict(setting.split("=", 1) for setting in arguments.set)
    config = from_preset(PretrainConfig, arguments.preset, data=arguments.videos, output=arguments.output, **settings)
    if not pretrain(config).done:
        return  # stopped by a signal, and saved

    model = stmae.checkpoint.load(Path(config.output) / "model.safetensors")
    views = ViewClips(find_videos(config.data), config.clips, frames=model.config.num_frames, size=model.config.image_size)
    tokens = model.encode(as_video(views[0]["clips"]))  # the middle clip of the first video: [1, 1 + N, D], class token first
    print(f"{views.entries[0].path}: tokens {list(tokens.shape)}, their mean {tokens[0, 1:].mean(0)[:3].tolist()} ...")


if __name__ == "__main__":
    main()
