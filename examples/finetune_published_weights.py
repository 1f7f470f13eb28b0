"""Fine-tunes published weights on labelled videos.

    python examples/finetune_published_weights.py --data train.csv --test_data test.csv --output runs/classifier

``--weights`` takes what ``stmae.checkpoint.load`` reads: a repository of the Hugging Face hub, a folder, or a downloaded file of
MAE-ST, SlowFast, VideoMAE or VideoMAE V2. The data are lists with a line ``path label`` each, or folders with a folder for each
class.
"""

import argparse

from stmae.models import VideoClassifier
from stmae.training import FinetuneConfig, find_labelled_videos, finetune, from_preset


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labelled videos")
    parser.add_argument("--test_data", required=True, help="labelled videos to test on, before and after")
    parser.add_argument("--output", required=True, help="folder of the run; the same command again continues it")
    parser.add_argument("--weights", default="MCG-NJU/videomae-base", help="needs the extra 'hub', unless it is a file or folder")
    parser.add_argument("--preset", default="one-gpu-base-finetune", help="a recipe of training/presets")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that differ, as optimizer.epochs=20")
    arguments = parser.parse_args()

    classes = 1 + max(entry.label for entry in find_labelled_videos(arguments.data))
    print(VideoClassifier.from_pretrained(arguments.weights, num_classes=classes).load_report)  # what was recognised and assumed

    paths = {name: getattr(arguments, name) for name in ("data", "test_data", "output")}
    settings = dict(setting.split("=", 1) for setting in arguments.set)
    finetune(from_preset(FinetuneConfig, arguments.preset, checkpoint=arguments.weights, **paths, **settings))


if __name__ == "__main__":
    main()
