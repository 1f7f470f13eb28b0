"""What calling an op costs the host, whatever the device then has to do: CPU time a call, beside a plain torch.library.custom_op.

The plain op has the same schema and the same body, ours: it is what a user would register around a kernel, without our checks
and with PyTorch's own wrapper. On a GPU the calls are queued and not waited for; on a CPU the tensors are so small that the
body takes a few microseconds on both sides. Target: at most 15 us above the plain op.

`bench_launcher` is the part of it that the Triton launchers have in Python, from tensors to the arguments of Triton's own
launch, which is left out: it runs on tensors without memory, so on any machine with Triton installed.
"""

import time

import pytest
import torch

from stmae import ops

CALLS = 200
ROUNDS = 21
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def arguments(device):
    """{op: (our public call, the schema's arguments)}"""
    noise = torch.rand(1, 8, device=device)
    keep, masked = ops.random_masking(noise, 4)
    video = torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    weight, position = torch.randn(16, 3, 1, 4, 4, device=device), torch.randn(8, 16, device=device)
    pred, qkv = torch.randn(1, 4, 48, device=device), torch.randn(1, 4, 3, 1, 16, device=device)
    q, k, v = qkv.unbind(2)
    tokens, mask_token = torch.randn(1, 4, 16, device=device), torch.randn(16, device=device)
    return {
        "random_masking": (lambda: ops.random_masking(noise, 4), (noise, 4)),
        "gather_tokens": (lambda: ops.gather_tokens(position[None], keep), (position[None], keep)),
        "restore_tokens": (
            lambda: ops.restore_tokens(tokens, keep, mask_token, position),
            (tokens, keep, mask_token, position),
        ),
        "masked_patchify": (
            lambda: ops.masked_patchify(video, keep, weight, None, position, mean=MEAN, std=STD),
            (video, keep, weight, None, position, list(MEAN), list(STD)),
        ),
        "patch_loss": (
            lambda: ops.patch_loss(
                pred, video, masked, patch_size=(1, 4, 4), frames=[0, 1], mean=MEAN, std=STD, reduction="none"
            ),
            (pred, video, masked, [1, 4, 4], [0, 1], True, list(MEAN), list(STD)),
        ),
        "attention": (lambda: ops.attention(q, k, v), (q, k, v, 0.25)),
        "attention_qkvpacked": (lambda: ops.attention_qkvpacked(qkv), (qkv, 0.25)),
    }


def plain(op):
    """A torch.library.custom_op with the schema of stmae::op and its kernel as the body."""
    overload = getattr(torch.ops.stmae, op).default
    schema = str(overload._schema).removeprefix(f"stmae::{op}")

    def body(*args):
        return overload(*args)

    return torch.library.custom_op(f"bench_overhead::{op}", body, mutates_args=(), schema=schema)


def host_time(sides, device):
    """{name: [CPU seconds a call, ...]} of this thread, sides alternating."""
    seconds = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        for name, side in sides.items():
            start = time.thread_time()
            for _ in range(CALLS):
                side()
            seconds[name].append((time.thread_time() - start) / CALLS)
            if device == "cuda":
                torch.cuda.synchronize()  # the queue must not fill up: its length is limited
    return {name: sorted(times[1:]) for name, times in seconds.items()}


def report(benchmark, seconds, **extra):
    medians = {name: times[len(times) // 2] for name, times in seconds.items()}
    benchmark.extra_info.update(extra, microseconds={name: median * 1e6 for name, median in medians.items()})
    print(f"\n  {benchmark.name}: " + ", ".join(f"{name} {median * 1e6:.1f} us" for name, median in medians.items()), end="")
    return medians


@pytest.mark.parametrize("op", list(arguments("cpu")))
def bench_overhead(op, benchmark, device):
    ours, schema_arguments = arguments(device)[op]
    custom = plain(op)
    with torch.no_grad():
        for a, b in zip(_tuple(ours()), _tuple(custom(*schema_arguments))):
            assert torch.equal(a, b)
        seconds = host_time({"ours": ours, "custom_op": lambda: custom(*schema_arguments)}, device)
        medians = report(benchmark, seconds, device=device, target="at most 15 us above custom_op")
        print(f", {(medians['ours'] - medians['custom_op']) * 1e6:+.1f} us")
        benchmark.pedantic(ours, rounds=3)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launchers():
    """{launcher: its call, at the shapes of a ViT-L's step}"""
    from stmae.kernels import attention, masked_patchify, patch_loss

    qkv = meta(32, 157, 3, 16, 64)
    out, lse = meta(32, 157, 16, 64), meta(32, 16, 157, dtype=torch.float32)
    video, keep = meta(32, 16, 224, 224, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3), meta(32, 156, dtype=torch.int64)
    weight, pred, masked = meta(1024, 3, 2, 16, 16), meta(32, 1412, 768), meta(32, 1412, dtype=torch.int64)
    frames = list(range(0, 16, 2))
    return {
        "attention_qkvpacked": lambda: attention.attention_qkvpacked(qkv, 0.125),
        "attention_qkvpacked_backward": lambda: attention.attention_qkvpacked_backward(out, qkv, out, lse, 0.125),
        "masked_patchify": lambda: masked_patchify.masked_patchify(video, keep, weight, None, None, MEAN, STD),
        "patch_loss": lambda: patch_loss.patch_loss(pred, video, masked, [1, 16, 16], frames, True, MEAN, STD),
    }


@pytest.mark.parametrize("launcher", ["attention_qkvpacked", "attention_qkvpacked_backward", "masked_patchify", "patch_loss"])
def bench_launcher(launcher, benchmark, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: None)
    call = launchers()[launcher]
    report(benchmark, host_time({"launcher, without Triton's launch": call}, "cpu"), device="none")
    benchmark.pedantic(call, rounds=3)
