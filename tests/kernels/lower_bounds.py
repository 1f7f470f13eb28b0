"""What no GPU can be faster than, from what the kernels must move and multiply, and what the compilers made of them.

    python tests/kernels/lower_bounds.py [--batch 32]     two tables in Markdown: lower bounds, and Triton 3.9's figures in short

A bound is the largest of three: the least bytes over the memory's peak, the operations executed over the tensor cores' peak, and
the exponentials over the peak of the unit that computes them; a measured time is above it, by how much nobody knows without
measuring. The tests hold the kernels to these counts: bytes within
10 %, operations at least 90 % useful (check_traffic.py).
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from stmae import models

FIGURES = Path(__file__).parent / "figures" / "triton-3.9.json"
# Peak bytes and dense bfloat16 operations a second. Sources: NVIDIA's data sheets of the A100 80GB SXM, of the H100 SXM and of
# HGX B200 (both: half of the rates given with sparsity), AMD's data sheet of the MI300X. And exponentials: every multiprocessor
# has 16 a clock (CUDA programming guide, throughput of arithmetic instructions; CDNA 3 ISA guide), and this many bfloat16
# operations in that time.
OPERATIONS_A_CLOCK = {"A100": 2048, "H100": 4096, "B200": 8192, "MI300X": 2048}
PEAKS = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12), "B200": (8.0e12, 2250e12), "MI300X": (5.3e12, 1307e12)}
PEAKS = {gpu: (*peaks, peaks[1] * 16 / OPERATIONS_A_CLOCK[gpu]) for gpu, peaks in PEAKS.items()}
MODELS = {"ViT-B": models.mae_vit_base_patch16, "ViT-L": models.mae_vit_large_patch16}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHOWN = {  # kernel, case, tiles by default
    "masked_patchify": ("masked_patchify", "channels-last bf16"),
    "its weight's gradient": ("grad_weight", "channels-last bf16"),
    "attention, head dim 32": ("attention", "head 32 bf16"),
    "its grad_q": ("grad_q", "head 32 bf16"),
    "its grad_k and grad_v": ("grad_kv", "head 32 bf16"),
    "attention, head dim 64": ("attention", "head 64 bf16"),
    "its grad_q ": ("grad_q", "head 64 bf16"),
    "its grad_k and grad_v ": ("grad_kv", "head 64 bf16"),
    "random_masking": ("random_masking", "1568 tokens"),
    "gather_tokens": ("gather_rows", "512 bf16"),
    "restore_tokens": ("restore_tokens", "512 bf16"),
    "its backward": ("restore_tokens_backward", "512 bf16"),
    "patch_loss": ("patch_loss", "loss channels-last bf16"),
    "its backward ": ("patch_loss_backward", "loss channels-last bf16"),
}


def attention_work(B, N, H, D, *, backward=False):
    """(bytes, operations) of one call on a packed bfloat16 projection. The backward makes the scores in each of its two
    kernels, so that no sums need atomics: seven products, where five would do."""
    packed, one, lse = 6 * B * N * H * D, 2 * B * N * H * D, 4 * B * H * N
    if backward:
        return packed + 2 * one + lse + packed, 14 * B * H * N * N * D
    return packed + one + lse, 4 * B * H * N * N * D


def attention_exponentials(B, N, H, *, backward=False):
    """One for a score in the forward, and in each of the backward's two kernels."""
    return (2 if backward else 1) * B * H * N * N


def patchify_work(B, N, K, Q, D, *, backward=False):
    """(bytes, operations): bytes of video, bfloat16 weight and bias, float32 positions and output (or their gradient)."""
    return B * K * (Q + 8) + 2 * D * (Q + 1) + 4 * N * D + 4 * B * K * D, 2 * B * K * Q * D


def norms_work(elements, *, backward=False):
    """(calls, bytes of one on average) of `add_layer_norm`s on a float32 stream with bfloat16 branches: ``elements`` of the
    stream at each. The first has no branch, and no gradient of its sum; the sum of the last has no gradient either."""
    first, *middle, last = elements
    moved = 10 * first + 16 * sum(middle) + 12 * last if backward else 6 * first + 12 * (sum(middle) + last)
    return len(elements), moved / len(elements)


def gelus_work(elements, *, backward=False):
    """(calls, bytes of one on average) of `mlp`s' GELUs in bfloat16: ``elements`` of the hidden layer at each."""
    return len(elements), (6 if backward else 4) * sum(elements) / len(elements)


def step_work(model, B):
    """{op: (calls in a training step, bytes, operations, exponentials of one)}, bfloat16 autocast, 90 % of uint8 clips masked."""
    c = model.config
    N, D, W, P = c.num_tokens, c.width, c.decoder_width, c.patch_values
    K = model.sample_mask(B, noise=torch.rand(B, N))[0].shape[1]
    M, n, all_tokens = N - K, K + c.class_token, N + c.class_token
    Q = c.in_channels * c.tubelet_size * c.patch_size[0] * c.patch_size[1]
    encoder = (B, n, c.num_heads, D // c.num_heads)
    decoder = (B, all_tokens, c.decoder_num_heads, W // c.decoder_num_heads)
    restored = 2 * B * n * W + 4 * all_tokens * W + 4 * B * all_tokens * W
    parameters = sum(x.numel() for x in model.parameters())
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    stream, every, some = B * n * D, B * all_tokens * W, B * M * W
    norms = {"encoder's": [stream] * (2 * c.depth + 1), "decoder's": [every] * (2 * c.decoder_depth - 1) + [some] * 2}
    ratio = model.encoder.blocks[0].fc1.out_features // D
    gelus = {"encoder's": [ratio * stream] * c.depth, "decoder's": [ratio * every] * (c.decoder_depth - 1) + [ratio * some]}
    # What fc1's bias gets comes out of GELU's backward; of the last block only qkv sees every token.
    summed = 5 * stream * c.depth + B * n * W + 5 * every * (c.decoder_depth - 1) + 3 * every + 2 * some + B * M * P
    block = 24  # operations per token and width squared: qkv 6, projection 2, MLP 16
    linear = B * n * (c.depth * block * D * D + 2 * D * W)
    linear += B * all_tokens * ((c.decoder_depth - 1) * block + 6) * W * W  # of the last block only qkv sees every token
    linear += B * M * ((block - 6) * W * W + 2 * W * P)
    return {
        "`random_masking`": (1, 12 * B * N, 0, 0),
        "`masked_patchify`": (1, *patchify_work(B, N, K, Q, D), 0),
        "`masked_patchify`, backward": (1, *patchify_work(B, N, K, Q, D, backward=True), 0),
        "encoder's `attention`": (c.depth, *_attention(*encoder)),
        "encoder's `attention`, backward": (c.depth, *_attention(*encoder, backward=True)),
        "`restore_tokens`": (1, restored, 0, 0),
        "`restore_tokens`, backward": (1, restored, 0, 0),
        "decoder's `attention`": (c.decoder_depth, *_attention(*decoder)),
        "decoder's `attention`, backward": (c.decoder_depth, *_attention(*decoder, backward=True)),
        "`gather_tokens`, float32 stream and bfloat16 branch": (1, 12 * B * M * W, 0, 0),
        "`gather_tokens`, backward": (1, 6 * B * (M + all_tokens) * W, 0, 0),
        **{f"{part} `add_layer_norm`": (*norms_work(sizes), 0, 0) for part, sizes in norms.items()},
        **{f"{part} `add_layer_norm`, backward": (*norms_work(sizes, backward=True), 0, 0) for part, sizes in norms.items()},
        **{f"GELU in the {part} `mlp`": (*gelus_work(sizes), 0, 0) for part, sizes in gelus.items()},
        **{f"GELU in the {part} `mlp`, backward": (*gelus_work(sizes, backward=True), 0, 0) for part, sizes in gelus.items()},
        "weights of `linear` and `mlp` to bfloat16": (len(layers), 6 * _parameters(layers) / len(layers), 0, 0),
        "bias gradients of `linear` and `mlp` (torch's)": (1, 2 * summed, 0, 0),
        "`patch_loss`": (1, B * M * (3 * P + 20), 0, 0),
        "`patch_loss`, backward": (1, B * M * (5 * P + 20), 0, 0),
        "linear layers, forward and backward (torch's)": (1, 0, 3 * linear, 0),
        "AdamW (torch's)": (1, 28 * parameters, 0, 0),
    }


def _parameters(layers):
    return sum(x.numel() for layer in layers for x in layer.parameters())


def _attention(B, N, H, D, *, backward=False):
    return *attention_work(B, N, H, D, backward=backward), attention_exponentials(B, N, H, backward=backward)


def bound(work, peak):
    """(seconds, what bounds it), of bytes, operations and exponentials."""
    return max((amount / rate, unit) for amount, rate, unit in zip(work, peak, ("bytes", "products", "exponentials")))


def _number(x):
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def bounds_table(batch):
    """Rows are ops, columns GPUs; a cell has ViT-B's and ViT-L's, or the one that both have."""
    works = []
    for build in MODELS.values():
        with torch.device("meta"):
            works.append(step_work(build(), batch))

    def cell(values):
        return " / ".join(dict.fromkeys(values))

    header = [f"µs, {batch} clips", "calls", "MB", "GFLOP", "G exp", *PEAKS, "bound by (H100)"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for op in works[0]:
        calls, *amounts = zip(*(work[op] for work in works))
        columns = [[str(x) for x in calls]]
        columns += [[_number(x / unit) for x in amount] for amount, unit in zip(amounts, (1e6, 1e9, 1e9))]
        for peak in PEAKS.values():
            columns.append([_number(bound(work[op][1:], peak)[0] * 1e6) for work in works])
        columns.append([bound(work[op][1:], PEAKS["H100"])[1] for work in works])
        lines.append(f"| {' | '.join([op, *map(cell, columns)])} |")
    total = [cell(_number(step_seconds(work, peak) * 1e6) for work in works) for peak in PEAKS.values()]
    return [*lines, f"| {' | '.join(['**the step**', '', '', '', '', *total, ''])} |"]


def step_seconds(work, peak):
    return sum(calls * bound(amounts, peak)[0] for calls, *amounts in work.values())


def figures_table():
    kernels = json.loads(FIGURES.read_text())["kernels"]
    lines = ["| kernel | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, (kernel, case) in SHOWN.items():
        row = [name.strip()]
        for target in TARGETS:
            (x,) = (
                value
                for key, value in kernels.items()
                if key.split(" | ")[::3] == [kernel, target] and key.split(" | ")[1] == case and value["default"]
            )
            row.append(f"{x['registers']}, {x['spilled']}, {x['shared'] / 1024:.0f}, {x['blocks_per_sm']} x {x['warps']}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="clips in a step")
    arguments = parser.parse_args()
    print("Lower bounds in time, not measured; ViT-B / ViT-L:\n", *bounds_table(arguments.batch), sep="\n")
    print("\nRegisters a thread, spills, KiB shared, programs on a multiprocessor x warps:\n", *figures_table(), sep="\n")
