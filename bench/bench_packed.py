"""A batch of clips of other lengths, sizes and mask ratios: packed, and what else is done with such clips.

    ours      packed: nothing is padded, nothing dropped
    equal     as many tokens, as many of them visible, in clips of one size: what the same work costs without a mixture
    padded    every sequence padded to the longest, of all and of the visible tokens; the mask of the padding is taken to be free
    grouped   a batch for each length, every clip cropped to the least height and width of its group, visible tokens cut to the
              least of the group: it does less, and what it loses is printed

All are a step of one model: forward, backward, gradient clipping, AdamW. That packed predictions are those of each clip by itself
is checked first, bit for bit on a CPU.
"""

import contextlib

import torch

from bench.steps import FACTORIES, adamw, precision
from stmae.masking import Mask

# Three aspect ratios, lengths of 8 to 32, ratios of 0.75 to 0.95: 7,824 tokens, beside the 7,840 of five clips of 16x224x224.
CLIPS = [(8, 224, 224), (16, 192, 256), (16, 256, 192), (32, 160, 160), (32, 128, 192), (8, 208, 256)]
RATIOS = [0.75, 0.9, 0.85, 0.95, 0.9, 0.8]
EQUAL = 5


def tokens(clip):
    return clip[0] // 2 * (clip[1] // 16) * (clip[2] // 16)


def visible(clip, ratio):
    return int(tokens(clip) * (1 - ratio))


def frames(clip, device):
    T, H, W = clip
    return torch.randint(0, 256, (T, H, W, 3), dtype=torch.uint8).permute(3, 0, 1, 2).to(device)


class Side:
    """A training step on lists of clips and masks, one or several a step."""

    def __init__(self, size, dtype, device, batches):
        torch.manual_seed(0)
        self.model, self.dtype, self.device = FACTORIES[size]().to(device), dtype, device
        self.optimizer = adamw(self.model)
        self.batches = [
            ([frames(clip, device) for clip in clips], [self.mask(clip, count, device) for clip, count in zip(clips, counts)])
            for clips, counts in batches
        ]

    def mask(self, clip, count, device):
        order = torch.randperm(tokens(clip)).to(device)
        return Mask(order[:count].sort().values, order[count:].sort().values)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        for clips, masks in self.batches:
            with precision(self.dtype, self.device):
                loss = self.model(clips, mask=masks).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.02)
        self.optimizer.step()


class Dense(Side):
    """The same on one tensor of clips of the model's own size."""

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        (clips, masks), = self.batches  # fmt: skip
        with precision(self.dtype, self.device):
            mask = Mask(*(torch.stack(ids) for ids in zip(*masks)))
            loss = self.model(torch.stack(clips), mask=mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.02)
        self.optimizer.step()


def grouped():
    """(clips, visible tokens) of each length, and the fractions of tokens and of visible tokens that are lost."""
    batches = []
    for length in sorted({clip[0] for clip in CLIPS}):
        own = [index for index, clip in enumerate(CLIPS) if clip[0] == length]
        size = (length, *(min(CLIPS[index][axis] for index in own) for axis in (1, 2)))
        count = min(visible(size, RATIOS[index]) for index in own)
        batches.append(([size] * len(own), [count] * len(own)))
    left = sum(tokens(clip) for clips, _ in batches for clip in clips) / sum(map(tokens, CLIPS))
    seen = sum(sum(counts) for _, counts in batches) / sum(map(visible, CLIPS, RATIOS))
    return batches, 1 - left, 1 - seen


def sides(size, dtype, device):
    counts = list(map(visible, CLIPS, RATIOS))
    largest = max(CLIPS, key=tokens)
    equal = [(16, 224, 224)] * EQUAL
    batches, _, _ = grouped()
    return {
        "ours": Side(size, dtype, device, [(CLIPS, counts)]),
        "equal": Dense(size, dtype, device, [(equal, [sum(counts) // EQUAL] * EQUAL)]),
        "padded": Side(size, dtype, device, [([largest] * len(CLIPS), [max(counts)] * len(CLIPS))]),
        "grouped": Side(size, dtype, device, batches),
    }


def check(side):
    """Each clip's prediction is that of the clip by itself: bit for bit on a CPU, elsewhere within rounding."""
    (clips, masks), = side.batches  # fmt: skip
    autocast = precision(side.dtype, side.device)
    with torch.no_grad(), autocast if side.dtype == "bfloat16" else contextlib.nullcontext():
        together = side.model(clips, mask=masks).pred
        for clip, mask, pred in zip(clips, masks, together):
            alone = side.model([clip], mask=[mask]).pred[0]
            if side.device == "cpu":
                assert torch.equal(alone, pred)
            else:
                torch.testing.assert_close(alone, pred, rtol=2e-2, atol=2e-2)


def bench_packed(compare, device, full):
    all_sides = sides("base" if full else "small", "bfloat16", device)
    check(all_sides["ours"])
    _, lost, unseen = grouped()
    print(f"grouped loses {lost:.0%} of the tokens and {unseen:.0%} of the visible ones")
    compare(**all_sides, target={"equal": 1 / 1.05}, seconds=60 if full else 6)
