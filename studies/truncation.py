"""What truncation to the shortest clip of a batch costs V-JEPA's masks: a simulation with its published settings, and a picture.

    python -m studies.truncation --out docs/truncation.png

V-JEPA (Bardes et al. 2024) masks the union of blocks that span all time slices, so that every clip has its own number of visible
tokens. To stack them, its collator sorts a clip's visible ids and cuts them to the shortest of the batch: what is cut is what
comes last, the end of the clip. Blocks of one batch have one size, drawn from the aspect ratios 0.75 to 1.5, and lie anywhere in
the frame. Here nothing is cut (docs/packed.md).
"""

import argparse
import math
from pathlib import Path

import torch

GRID = (8, 14, 14)  # 16 frames of 224x224, patches of 2x16x16
BATCH = 24
SETTINGS = {"8 blocks of 0.15": (8, 0.15), "2 blocks of 0.7": (2, 0.7)}
ASPECT = (0.75, 1.5)


def visible_tokens(number, scale, batch, generator):
    """[batch, t, h * w] bool: V-JEPA's context masks of one batch."""
    t, h, w = GRID
    aspect = ASPECT[0] + torch.rand(1, generator=generator).item() * (ASPECT[1] - ASPECT[0])
    height = min(round(math.sqrt(scale * h * w * aspect)), h)
    width = min(round(math.sqrt(scale * h * w / aspect)), w)
    rows = []
    while len(rows) < batch:
        frame = torch.ones(h, w, dtype=torch.bool)
        for _ in range(number):
            top = torch.randint(0, h - height + 1, (1,), generator=generator).item()
            left = torch.randint(0, w - width + 1, (1,), generator=generator).item()
            frame[top : top + height, left : left + width] = False
        if frame.any():  # an empty context is drawn anew
            rows.append(frame.flatten().expand(t, -1))
    return torch.stack(rows)


def truncated(visible):
    """Which of the visible tokens are cut when every clip is cut to the fewest of the batch."""
    flat = visible.flatten(1)
    return (flat & (flat.cumsum(1) > flat.sum(1).min())).view_as(visible)


def simulate(number, scale, *, batch=BATCH, batches=200, seed=0):
    """(fraction of the visible tokens that is cut, that fraction in each time slice)."""
    generator = torch.Generator().manual_seed(seed)
    cut, seen = torch.zeros(GRID[0]), torch.zeros(GRID[0])
    for _ in range(batches):
        visible = visible_tokens(number, scale, batch, generator)
        cut += truncated(visible).sum(dim=(0, 2))
        seen += visible.sum(dim=(0, 2))
    return (cut.sum() / seen.sum()).item(), (cut / seen).tolist()


def picture(results, path):
    """Bars: of each time slice the fraction of the visible tokens that is cut, for each setting, and packed beside: none."""
    from PIL import Image, ImageDraw

    width, height, left, bottom = 720, 300, 50, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    scale = height - bottom - 40
    for percent in (0, 25, 50, 75, 100):
        y = height - bottom - scale * percent / 100
        draw.line([(left, y), (width - 10, y)], fill="#dddddd")
        draw.text((10, y - 6), f"{percent} %", fill="black")
    group = (width - left - 20) / GRID[0]
    colours = ["#4477aa", "#cc6677", "#228833"]
    names = [*(f"V-JEPA, {name}: {total:.0%} cut" for name, (total, _) in results.items()), "packed: none cut"]
    every = [*(slices for _, slices in results.values()), [0.0] * GRID[0]]
    for index in range(GRID[0]):
        for number, (slices, colour) in enumerate(zip(every, colours)):
            x = left + 10 + index * group + number * group / 4
            y = height - bottom - max(1, scale * slices[index])
            draw.rectangle([(x, y), (x + group / 4 - 3, height - bottom)], fill=colour)
        draw.text((left + 10 + index * group, height - bottom + 6), f"slice {index + 1}", fill="black")
    for number, (name, colour) in enumerate(zip(names, colours)):
        draw.rectangle([(left + number * 220, 10), (left + number * 220 + 10, 20)], fill=colour)
        draw.text((left + number * 220 + 16, 9), name, fill="black")
    image.quantize(16).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the picture here")
    arguments = parser.parse_args()
    results = {name: simulate(*setting) for name, setting in SETTINGS.items()}
    for name, (total, slices) in results.items():
        print(f"{name}: {total:.1%} of the visible tokens are cut, of the last time slice {slices[-1]:.1%}")
    if arguments.out:
        picture(results, arguments.out)


if __name__ == "__main__":
    main()
