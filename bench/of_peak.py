"""What part of this machine's peak each CPU kernel reaches: its operations over a large product's, or its bytes over a copy's.

    python -m bench.of_peak

One thread, CPU time: an op and its ceiling alternate in one process, and the ratio is the median over rounds, so that it holds on
a machine that is shared. The product is the faster of torch's and this library's, 2048 x 2048 in the op's dtype; the copy is of
256 MB.
"""

import argparse
import statistics
import time

import torch

from stmae import ops
from stmae.ops.linear import product

BACKWARD = ", backward"


def ceilings(dtype, size, copied):
    """{"flops": (rate's unit, ways), "bytes": ...}: what is done, and functions that do it."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    source = torch.randn(copied)
    target = torch.empty_like(source)
    return {
        "flops": (2 * size**3, [lambda: a @ b, lambda: product(a, b)]),
        "bytes": (8 * copied, [lambda: target.copy_(source)]),
    }


def with_backward(function, *inputs):
    """(forward, backward) of a function of tensors that need gradients; the backward pass alone."""
    out = function(*inputs)
    grad = torch.randn_like(out)
    return lambda: function(*[x.detach() for x in inputs]), lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def cases(dtype, scale=1):
    """(name, "flops" or "bytes", how many, function). scale: divides the shapes, for a test."""

    def randn(*shape, grad=True):
        return torch.randn(*shape).to(dtype).requires_grad_(grad)

    def ids(keep):
        return torch.rand(B, N).argsort(1)[:, :keep].sort(1).values

    B, item = 4, torch.finfo(dtype).bits // 8
    N, W, D = 1568 // scale, 768 // scale, 512 // scale
    K, P = N // 10, 1536
    found = []

    def add(name, kind, forward_amount, backward_amount, function, *inputs):
        forward, backward = with_backward(function, *inputs)
        found.append((name, kind, forward_amount, forward))
        found.append((name + BACKWARD, kind, backward_amount, backward))

    for tokens, heads, dim in ((N + 1, D // 32, 32), (K + 1, W // 64, 64)):
        amount = 2 * B * heads * tokens**2 * dim
        qkv = [randn(B, tokens, heads, dim) for _ in range(3)]
        add(f"attention, {B} x {tokens} tokens, head dim {dim}", "flops", 2 * amount, 5 * amount, ops.attention, *qkv)

    side = 16 * int((N // 8) ** 0.5)
    video = torch.randint(0, 256, (B, 16, side, side, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    N = 8 * (side // 16) ** 2
    keep, masked = ids(K), ids(N - K)
    weight, bias = randn(W, 3, 2, 16, 16), randn(W)

    def patchify(weight, bias):
        return ops.masked_patchify(video, keep, weight, bias, None)

    add(f"masked_patchify, {B} x {K} patches to {W}", "flops", 2 * B * K * P * W, 2 * B * K * P * W, patchify, weight, bias)

    M, Q = masked.shape[1], 768
    frames = list(range(0, 16, 2))

    def loss(pred):
        return ops.patch_loss(pred, video, masked, patch_size=(1, 16, 16), frames=frames)

    read = B * M * Q * (item + 1)
    add(f"patch_loss, {B} x {M} patches", "bytes", read, read + B * M * Q * item, loss, randn(B, M, Q))

    moved = item * B * D * (N + K) + item * N * D
    position = randn(N, D, grad=False)

    def restore(tokens, mask_token):
        return ops.restore_tokens(tokens, keep, mask_token, position)

    add(f"restore_tokens, {B} x {N} x {D}", "bytes", moved, item * B * D * (N + K), restore, randn(B, K, D), randn(D))

    taken = 2 * item * B * M * D
    gathered = item * B * D * (M + N)
    add(f"gather_tokens, {B} x {M} x {D}", "bytes", taken, gathered, lambda x: ops.gather_tokens(x, masked), randn(B, N, D))

    rows = B * (K + 1)
    x, w, b = randn(rows, W), randn(3 * W, W), randn(3 * W)
    add(f"linear, {rows} x {W} to {3 * W}", "flops", 6 * rows * W * W, 12 * rows * W * W, ops.linear, x, w, b)
    w1, b1, w2, b2 = randn(4 * W, W), randn(4 * W), randn(W, 4 * W), randn(W)
    add(f"mlp, {rows} x {W}", "flops", 16 * rows * W * W, 32 * rows * W * W, ops.mlp, x, w1, b1, w2, b2)

    def norm(x, branch, weight, bias):
        return ops.add_layer_norm(x, branch, weight, bias)[1]

    streams = [randn(B, N, D) for _ in range(2)]
    stream = item * B * N * D
    add(f"add_layer_norm, {B} x {N} x {D}", "bytes", 4 * stream, 3 * stream, norm, *streams, randn(D), randn(D))
    return found


def measure(dtype, *, rounds=9, seconds=0.2, scale=1, size=2048, copied=2**26, only=""):
    """Yields (name, kind, median part of the ceiling, rate in 1e9 a second). seconds: an op is repeated for about this long."""
    ceiling = ceilings(dtype, size, copied)

    def spent(function, times=1):
        start = time.process_time()
        for _ in range(times):
            function()
        return (time.process_time() - start) / times

    for name, kind, amount, function in cases(dtype, scale):
        if only not in name:
            continue
        unit, ways = ceiling[kind]
        for way in (function, *ways):
            way()
        times = max(1, round(seconds / max(spent(function), 1e-5)))
        parts, rates = [], []
        for _ in range(rounds):
            rate = amount / spent(function, times)
            parts.append(rate / max(unit / spent(way) for way in ways))
            rates.append(rate / 1e9)
        yield name, kind, statistics.median(parts), statistics.median(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="ops whose name has this in it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for name, kind, part, rate in measure(dtype, rounds=arguments.rounds, only=arguments.only):
                of = "GFLOP/s, of a product" if kind == "flops" else "GB/s, of a copy"
                print(f"{str(dtype).removeprefix('torch.')}  {name}: {part:.0%} ({rate:.0f} {of})", flush=True)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
