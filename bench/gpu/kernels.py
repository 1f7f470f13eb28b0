"""Each kernel at the sizes of one ViT-L step, beside SDPA's back ends; or each kernel twice, for a profiler.

    python -m bench.gpu.kernels OUT.json [--device cpu] [--clips 32]
    ncu ... python -m bench.gpu.kernels --once

Times are medians of alternating calls, each after the caches were emptied. The file is rewritten after each kernel.
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.compare import alternate, duration, quantiles
from stmae import ops

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FULL = {"T": 16, "S": 224, "D": 1024, "decoder": 512, "heads": 16, "head_dims": (64, 32)}
TINY = {"T": 4, "S": 64, "D": 64, "decoder": 32, "heads": 2, "head_dims": (32, 16)}
STATISTICS = [0.45] * 3, [0.225] * 3


def calls(clips, size, device):
    """name -> (sides by name, FLOPs, bytes); ours is the first side."""
    T, S, D, W = size["T"], size["S"], size["D"], size["decoder"]
    dtype = torch.bfloat16
    N = T // 2 * (S // 16) ** 2
    K = N // 10
    M = N - K
    op = torch.ops.stmae

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, dtype=dtype)

    torch.manual_seed(0)
    video = torch.randint(0, 256, (clips, T, S, S, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    noise = torch.rand(clips, N, device=device)
    keep, masked = ops.random_masking(noise, K)
    frames = list(range(0, T, 2))
    found = {"random_masking": ({"ours": lambda: op.random_masking(noise, K)}, 0, noise.nbytes + keep.nbytes + masked.nbytes)}

    weight, bias = random(D, 3, 2, 16, 16) * 0.02, random(D)
    position = random(N, D, dtype=torch.float32)
    embedded = op.masked_patchify(video, keep, weight, bias, position, *STATISTICS)
    flops = 2 * clips * K * D * 1536
    patchify = (video, keep, weight, bias, position, *STATISTICS)
    found["masked_patchify"] = {"ours": lambda: op.masked_patchify(*patchify)}, flops, 0
    found["masked_patchify backward"] = {"ours": lambda: op.masked_patchify_backward(embedded, *patchify)}, flops, 0

    for part, length, d in zip(("encoder", "decoder"), (K + 1, N + 1), size["head_dims"]):
        found.update(attention(part, random(clips, length, 3, size["heads"], d)))

    tokens, ids = random(clips, K + 1, W), torch.cat([keep.new_zeros(clips, 1), keep + 1], 1)
    mask_token, places = random(W, dtype=torch.float32), random(N + 1, W, dtype=torch.float32)
    restored = op.restore_tokens(tokens, ids, mask_token, places)
    moved = restored.nbytes + places.nbytes + tokens.nbytes
    found["restore_tokens"] = {"ours": lambda: op.restore_tokens(tokens, ids, mask_token, places)}, 0, moved
    found["restore_tokens backward"] = {"ours": lambda: op.restore_tokens_backward(restored, ids, dtype)}, 0, moved
    moved = 2 * clips * M * W * restored.element_size()
    found["gather_tokens"] = {"ours": lambda: op.gather_tokens(restored, masked)}, 0, moved

    pred = random(clips, M, 768)
    patch = (video, masked), ([1, 16, 16], frames)
    loss, mean, rstd = op.patch_loss(pred, *patch[0], *patch[1], True, *STATISTICS)
    pixels = clips * M * 768
    found["patch_loss"] = {"ours": lambda: op.patch_loss(pred, *patch[0], *patch[1], True, *STATISTICS)}, 0, 3 * pixels
    backward = (loss, pred, *patch[0], mean, rstd, *patch[1], *STATISTICS)
    found["patch_loss backward"] = {"ours": lambda: op.patch_loss_backward(*backward)}, 0, 5 * pixels
    return found


def attention(part, qkv):
    """Forward and backward of packed attention on ``qkv`` [B, N, 3, H, D], and of SDPA on views of it where it can serve."""
    op = torch.ops.stmae
    B, N, _, H, D = qkv.shape
    scale = D**-0.5
    out, lse = op.attention_qkvpacked(qkv, scale)
    forward = {"ours": lambda: op.attention_qkvpacked(qkv, scale)}
    backward = {"ours": lambda: op.attention_qkvpacked_backward(out, qkv, out, lse, scale)}
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))
    for name, backend in SDPA.items():

        def attend(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            theirs = attend()
            torch.autograd.grad(theirs, (q, k, v), theirs.detach(), retain_graph=True)
        except RuntimeError as error:  # this back end cannot serve here
            print(f"{part} attention: SDPA's {name}: {str(error).splitlines()[0]}")
            continue
        ours = out.view(B, N, H, D).transpose(1, 2)
        torch.testing.assert_close(theirs, ours, rtol=3e-2, atol=3e-2)
        forward[name] = torch.no_grad()(attend)
        backward[name] = lambda o=theirs: torch.autograd.grad(o, (q, k, v), o.detach(), retain_graph=True)
    products = 2 * B * H * N * N * D
    return {f"{part} attention": (forward, 2 * products, 0), f"{part} attention backward": (backward, 5 * products, 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", help="JSON")
    parser.add_argument("--once", action="store_true", help="each kernel of ours twice and no clock, for a profiler")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not options.once and not options.output:
        parser.error("expected a file for the results, or --once")
    device = options.device
    found = calls(options.clips, FULL if device == "cuda" else TINY, device)
    if options.once:
        for sides, _, _ in found.values():
            sides["ours"]()
            sides["ours"]()
        if device == "cuda":
            torch.cuda.synchronize()
        return
    results = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "clips": options.clips, "kernels": {}}
    for name, (sides, flops, moved) in found.items():
        try:
            seconds = {side: quantiles(times) for side, times in alternate(sides, rounds=options.rounds, device=device).items()}
            results["kernels"][name] = {"seconds": seconds, "flops": flops, "bytes": moved}
            print(f"{name}: " + ", ".join(f"{duration(times['p50'])} {side}" for side, times in seconds.items()), flush=True)
        except Exception as error:  # the next one is still timed
            results["kernels"][name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            print(f"{name}: {error}", flush=True)
        with open(f"{options.output}.tmp", "w") as file:
            json.dump(results, file, indent=1)
        os.replace(f"{options.output}.tmp", options.output)


if __name__ == "__main__":
    main()
