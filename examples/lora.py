"""LoRA with peft: trains a few per cent of a classifier's weights, then merges them into an ordinary model.

    python examples/lora.py --data train.csv --test_data test.csv --output classifier/

Needs peft. The data are lists with a line ``path label`` each, or folders with a folder for each class.
"""

import argparse

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from stmae.models import VideoClassifier
from stmae.training import (
    AugmentationConfig,
    ClipConfig,
    LabelledClips,
    ViewClips,
    as_video,
    find_labelled_videos,
)


@torch.no_grad()
def accuracy(model, entries, clips):
    """Fraction of the videos whose middle clip is classified right."""
    model.eval()
    config = model.get_base_model().config
    views = ViewClips(entries, clips, frames=config.num_frames, size=config.image_size)
    right = [model(as_video(view["clips"])).argmax(-1).item() == view["label"] for view in (views[i] for i in range(len(views)))]
    return sum(right) / len(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labelled videos")
    parser.add_argument("--test_data", required=True, help="labelled videos to test on")
    parser.add_argument("--output", required=True, help="folder of the merged classifier")
    parser.add_argument("--weights", default="MCG-NJU/videomae-base", help="a run's folder, a file, or owner/name on the hub")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--stride", type=int, default=4, help="every stride-th frame")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode videos")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train, test = find_labelled_videos(arguments.data), find_labelled_videos(arguments.test_data)
    classifier = VideoClassifier.from_pretrained(arguments.weights, num_classes=1 + max(entry.label for entry in train))
    layers = ["qkv", "proj", "fc1", "fc2"]  # of every block; the new head is trained in full
    model = get_peft_model(
        classifier, LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=layers, modules_to_save=["head"])
    )
    model.print_trainable_parameters()

    clips, shape = ClipConfig(stride=arguments.stride, repeats=1), classifier.config
    plain = AugmentationConfig(operations=0, erasing=0.0)  # crops and mirroring alone
    dataset = LabelledClips(train, clips, frames=shape.num_frames, size=shape.image_size, seed=0, augmentation=plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.lr)
    print(f"accuracy {accuracy(model, test, clips):.1%} before")
    for epoch in range(arguments.epochs):
        keys = [(epoch, int(number)) for number in torch.randperm(len(train))]  # an item is asked for by (epoch, video number)
        loader = torch.utils.data.DataLoader(
            dataset, arguments.batch, sampler=keys, collate_fn=collate, num_workers=arguments.workers
        )
        model.train()
        for video, labels in loader:
            loss = F.cross_entropy(model(video), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    print(f"accuracy {accuracy(model, test, clips):.1%} after")
    model.merge_and_unload().save_pretrained(arguments.output)


def collate(items):
    """Items of LabelledClips -> video uint8 [B, C, T, H, W] and labels [B]."""
    return as_video(torch.cat([item["clips"] for item in items])), torch.cat([item["label"] for item in items])


if __name__ == "__main__":
    main()
