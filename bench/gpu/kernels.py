"""Each kernel at the sizes of one ViT-L step, beside SDPA's back ends; or each kernel twice, for a profiler.

    python -m bench.gpu.kernels OUT.json [--device cpu] [--clips 32]
    ncu ... python -m bench.gpu.kernels --once

Times are medians of alternating calls, each after the caches were emptied. The file is rewritten after each kernel.
"""

import argparse
import json
import os
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import stmae.ops  # noqa: F401  (defines torch.ops.stmae)
from bench.compare import alternate, duration, quantiles

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FULL = {"T": 16, "S": 224, "D": 1024, "decoder": 512, "heads": 16, "head_dims": (64, 32)}
TINY = {"T": 4, "S": 64, "D": 64, "decoder": 32, "heads": 2, "head_dims": (32, 16)}
STATISTICS = [0.45] * 3, [0.225] * 3


def groups(clips, size, device, *, others):
    """Functions, each of which prepares some kernels: name -> (sides by name, FLOPs, bytes); ours is the first side.

    others: whether there are to be other sides than ours.
    """
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
    order = noise.argsort(1)
    keep, masked = order[:, :K].sort(1).values, order[:, K:].sort(1).values
    frames = list(range(0, T, 2))
    stream = random(clips, N + 1, W, dtype=torch.float32)  # the decoder's, as it is under autocast

    def copying():
        new = torch.empty_like(stream)
        return {"copy (torch's)": ({"ours": lambda: new.copy_(stream)}, 0, 2 * stream.nbytes)}

    def masking():
        moved = noise.nbytes + keep.nbytes + masked.nbytes
        return {"random_masking": ({"ours": lambda: op.random_masking(noise, K)}, 0, moved)}

    def patchify():
        weight, bias = random(D, 3, 2, 16, 16) * 0.02, random(D)
        arguments = (video, keep, weight, bias, random(N, D, dtype=torch.float32), *STATISTICS)
        embedded = op.masked_patchify(*arguments)
        flops = 2 * clips * K * D * 1536
        return {
            "masked_patchify": ({"ours": lambda: op.masked_patchify(*arguments)}, flops, 0),
            "masked_patchify backward": ({"ours": lambda: op.masked_patchify_backward(embedded, *arguments)}, flops, 0),
        }

    def tokens():
        visible, ids = random(clips, K + 1, W), torch.cat([keep.new_zeros(clips, 1), keep + 1], 1)
        mask_token, places = random(W, dtype=torch.float32), random(N + 1, W, dtype=torch.float32)
        moved = stream.nbytes + places.nbytes + visible.nbytes
        return {
            "restore_tokens": ({"ours": lambda: op.restore_tokens(visible, ids, mask_token, places)}, 0, moved),
            "restore_tokens backward": ({"ours": lambda: op.restore_tokens_backward(stream, ids, dtype)}, 0, moved),
            "gather_tokens": ({"ours": lambda: op.gather_tokens(stream, masked)}, 0, 2 * clips * M * W * stream.element_size()),
        }

    def norms():
        branch, weight = random(clips, N + 1, W), torch.ones(W, device=device)
        forward = (stream, branch, weight, weight, 1e-6, dtype)
        sum, out, mean, rstd = op.add_layer_norm(*forward)
        backward = (sum, out, sum, mean, rstd, weight, dtype)
        elements = stream.numel()
        return {
            "add_layer_norm": ({"ours": lambda: op.add_layer_norm(*forward)}, 0, 12 * elements),
            "add_layer_norm backward": ({"ours": lambda: op.add_layer_norm_backward(*backward)}, 0, 16 * elements),
        }

    def gelus():
        if device == "cuda":
            from stmae.kernels import mlp

            gelu, gelu_backward = mlp.gelu, lambda hidden, grad: mlp.gelu_backward(hidden, grad, torch.float32)
        else:
            gelu, gelu_backward = op.gelu, op.gelu_backward
        hidden, grad = random(clips * (N + 1), 4 * W), random(clips * (N + 1), 4 * W)
        return {
            "GELU": ({"ours": lambda: gelu(hidden)}, 0, 4 * hidden.numel()),
            "GELU backward": ({"ours": lambda: gelu_backward(hidden, grad)}, 0, 6 * hidden.numel()),
        }

    def loss():
        pred, patch = random(clips, M, 768), ([1, 16, 16], frames)
        forward = (pred, video, masked, *patch, True, *STATISTICS)
        value, mean, rstd = op.patch_loss(*forward)
        backward = (value, pred, video, masked, mean, rstd, *patch, *STATISTICS)
        return {
            "patch_loss": ({"ours": lambda: op.patch_loss(*forward)}, 0, 3 * pred.numel()),
            "patch_loss backward": ({"ours": lambda: op.patch_loss_backward(*backward)}, 0, 5 * pred.numel()),
        }

    def attentions(part, length, head_dim):
        return lambda: attention(part, random(clips, length, 3, size["heads"], head_dim), others=others)

    encoder, decoder = size["head_dims"]
    return [attentions("decoder", N + 1, decoder), attentions("encoder", K + 1, encoder), patchify, loss, tokens, norms, gelus,
            masking, copying]  # fmt: skip


def attention(part, qkv, *, others):
    """Forward and backward of packed attention on ``qkv`` [B, N, 3, H, D], and of SDPA on views of it where it can serve."""
    op = torch.ops.stmae
    B, N, _, H, D = qkv.shape
    scale = D**-0.5
    out, lse = op.attention_qkvpacked(qkv, scale)
    forward = {"ours": lambda: op.attention_qkvpacked(qkv, scale)}
    backward = {"ours": lambda: op.attention_qkvpacked_backward(out, qkv, out, lse, scale)}
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))
    wrong = {}
    for name, backend in SDPA.items() if others else ():

        def attend(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            theirs = attend()
            torch.autograd.grad(theirs, (q, k, v), theirs.detach(), retain_graph=True)
        except RuntimeError as error:  # this back end cannot serve here
            print(f"{part} attention: SDPA's {name}: {str(error).splitlines()[0]}")
            continue
        try:
            torch.testing.assert_close(theirs.transpose(1, 2), out, rtol=3e-2, atol=3e-2)
        except AssertionError as error:  # one of the two is wrong: no time of theirs means anything
            wrong[f"{part} attention, SDPA's {name}"] = error
            continue
        forward[name] = torch.no_grad()(attend)
        backward[name] = lambda o=theirs: torch.autograd.grad(o, (q, k, v), o.detach(), retain_graph=True)
    products = 2 * B * H * N * N * D
    return {
        f"{part} attention": (forward, 2 * products, 0),
        f"{part} attention backward": (backward, 5 * products, 0),
        **wrong,
    }


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
    results = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "clips": options.clips, "kernels": {}}
    failed = 0
    for prepare in groups(options.clips, FULL if device == "cuda" else TINY, device, others=not options.once):
        try:
            kernels = prepare()
        except Exception as error:  # the next ones are still timed
            kernels = {prepare.__qualname__.rpartition(".")[2]: error}
        for name, kernel in kernels.items():
            try:
                if isinstance(kernel, Exception):
                    raise kernel
                results["kernels"][name] = call_twice(kernel, device) if options.once else timed(kernel, options.rounds, device)
                print(f"{name}: {shown(results['kernels'][name])}", flush=True)
            except Exception as error:
                failed = 1
                results["kernels"][name] = {"error": f"{type(error).__name__}: {error}"[:400]}
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            if not options.once:
                write(results, options.output)
        kernels = kernel = None  # the next group's memory
    return failed


def call_twice(kernel, device):
    for _ in range(2):
        kernel[0]["ours"]()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": {}}


def timed(kernel, rounds, device):
    sides, flops, moved = kernel
    seconds = {side: quantiles(times) for side, times in alternate(sides, rounds=rounds, device=device).items()}
    return {"seconds": seconds, "flops": flops, "bytes": moved}


def shown(result):
    return ", ".join(f"{duration(times['p50'])} {side}" for side, times in result["seconds"].items()) or "called"


def write(results, path):
    with open(f"{path}.tmp", "w") as file:
        json.dump(results, file, indent=1)
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    sys.exit(main())
