"""Two ops in a plain Vision Transformer of video: the patch embedding of visible patches, and attention.

    python examples/ops_in_a_plain_vit.py

The model is thirty lines of PyTorch and has nothing else of stmae. Both ways of it are run with the same weights and the same
masks: outputs and gradients are compared, then a step's time is printed.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import stmae

MEAN, STD = 0.45, 0.225  # of a pixel between 0 and 1


class Block(nn.Module):
    """Attention and an MLP, each on the normalised residual stream [B, K, D]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, use_ops):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, K, H, D / H]
        if use_ops:
            y = stmae.ops.attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        x = x + self.proj(y.flatten(2))
        return x + self.mlp(self.norm2(x))


class VideoViT(nn.Module):
    """The encoder of a masked autoencoder: uint8 video [B, 3, T, H, W] and ids of tokens [B, K] -> latents [B, K, D]."""

    def __init__(self, frames, size, patch=(2, 16, 16), width=384, depth=6, heads=6):
        super().__init__()
        tokens = frames // patch[0] * (size // patch[1]) * (size // patch[2])
        self.embed = nn.Conv3d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, video, keep, use_ops=True):
        if use_ops:  # reads the bytes of the visible patches, and nothing else
            weight, bias = self.embed.weight, self.embed.bias
            x = stmae.ops.masked_patchify(video, keep, weight, bias, self.position[0], mean=MEAN, std=STD)
        else:  # normalises and embeds every patch, then takes the visible ones
            x = self.embed((video / 255 - MEAN) / STD).flatten(2).transpose(1, 2) + self.position
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x, use_ops)
        return x


def step(model, video, keep, use_ops):
    """(latents, gradient of the patch embedding, seconds) of a forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    out = model(video, keep, use_ops)
    out.square().mean().backward()
    return out.detach(), model.embed.weight.grad, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = VideoViT(arguments.frames, arguments.size)
    video = torch.randint(0, 256, (arguments.batch, 3, arguments.frames, arguments.size, arguments.size), dtype=torch.uint8)
    tokens = model.position.shape[1]
    keep, _ = stmae.ops.random_masking(torch.rand(arguments.batch, tokens), num_keep=tokens // 10)

    (plain, plain_grad, _), (ours, our_grad, _) = step(model, video, keep, False), step(model, video, keep, True)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_grad, plain_grad, atol=1e-4 * plain_grad.abs().max().item(), rtol=1e-3)
    print(f"outputs agree to {(ours - plain).abs().max():.1e}, gradients to {(our_grad - plain_grad).abs().max():.1e}")

    seconds = {True: [], False: []}
    for _ in range(arguments.rounds):  # alternating, so that both meet the same machine
        for use_ops, times in seconds.items():
            times.append(step(model, video, keep, use_ops)[2])
    ours, plain = (sorted(seconds[use_ops])[arguments.rounds // 2] for use_ops in (True, False))
    print(f"a step of {len(keep)} clips, {keep.shape[1]} of {tokens} tokens visible: {ours:.3f} s, plain PyTorch {plain:.3f} s")


if __name__ == "__main__":
    main()
