"""Compiles every shipped configuration of every kernel for every target; prints, or checks in, what the compilers made of them.

    python tests/kernels/compile_report.py            compare with the figures checked in for this Triton, print what differs
    python tests/kernels/compile_report.py --update   write them: figures/triton-<version>.json, of the Triton that it runs under

No GPU is needed. Triton's cache makes the second run quick. Each Triton makes other code of a kernel: a version
whose figures are not kept is checked for spills, atomics and tensor-core instructions alone.
"""

import argparse
import collections
import json
import multiprocessing
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton

from stmae.kernels import (
    add_layer_norm,
    attention,
    gather_tokens,
    linear,
    masked_patchify,
    masked_patchify_varlen,
    mlp,
    patch_loss,
    random_masking,
    restore_tokens,
)
from tests.support import compiler

FIGURES = Path(__file__).parent / "figures"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MEAN, STD = [0.45] * 3, [0.225] * 3


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _random_masking(N):
    random_masking.random_masking(meta(4, N, dtype=F32), N // 10)


def _tokens(dtype, D):
    ids = meta(4, 157, dtype=torch.int64)
    x, tokens, position, mask_token = (meta(*s, dtype=dtype) for s in ((4, 1569, D), (4, 157, D), (1569, D), (D,)))
    gather_tokens.gather_tokens(x, ids)
    gather_tokens.gather_tokens_backward(tokens, ids, 1569)
    restore_tokens.restore_tokens(tokens, ids, mask_token, position)
    restore_tokens.restore_tokens_backward(x, ids, dtype)


def _video(channels_last):
    if channels_last:
        return meta(4, 16, 224, 224, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    return meta(4, 3, 16, 224, 224, dtype=torch.uint8)


def _patchify(dtype, channels_last, patch, D, rest=False):
    N = 16 // patch[0] * (224 // patch[1]) * (224 // patch[2])
    video, keep, weight = _video(channels_last), meta(4, N // 10, dtype=torch.int64), meta(D, 3, *patch, dtype=dtype)
    bias, position = (meta(D, dtype=dtype), meta(N, D, dtype=F32)) if rest else (None, None)
    out = masked_patchify.masked_patchify(video, keep, weight, bias, position, MEAN, STD)
    masked_patchify.masked_patchify_backward(out, video, keep, weight, bias, position, MEAN, STD)


def _videos(channels_last):
    videos = [
        meta(T, H, W, 3, dtype=torch.uint8).permute(3, 0, 1, 2) for T, H, W in ((16, 224, 224), (8, 192, 256), (32, 128, 96))
    ]
    return videos if channels_last else [video.contiguous() for video in videos]


def _patchify_varlen(dtype, channels_last, D):
    keep, cu_seqlens, weight = meta(400, dtype=torch.int64), meta(4, dtype=torch.int32), meta(D, 3, 2, 16, 16, dtype=dtype)
    videos = _videos(channels_last)
    parameters = weight, meta(D, dtype=dtype), meta(3104, D, dtype=F32)
    out = masked_patchify_varlen.masked_patchify_varlen(videos, keep, cu_seqlens, *parameters, MEAN, STD)
    masked_patchify_varlen.masked_patchify_varlen_backward(out, videos, keep, cu_seqlens, *parameters, MEAN, STD)


def _patch_loss_varlen(dtype, channels_last):
    masked, cu_seqlens, videos = meta(2000, dtype=torch.int64), meta(4, dtype=torch.int32), _videos(channels_last)
    pred, frames = meta(2000, 768, dtype=dtype), ([1, 16, 16], [*range(0, 16, 2), *range(0, 8, 2), *range(0, 32, 2)], [8, 4, 16])
    loss, mean, rstd = patch_loss.patch_loss_varlen(pred, videos, masked, cu_seqlens, *frames, 1, MEAN, STD)
    patch_loss.patch_loss_varlen_backward(loss, pred, videos, masked, cu_seqlens, mean, rstd, *frames, MEAN, STD)


def _random_masking_varlen():
    offsets = meta(5, dtype=torch.int64)
    random_masking.random_masking_varlen(meta(5000, dtype=F32), offsets, offsets, 500)


def _patch_loss(dtype, channels_last, patch, normalize=1):
    frames = list(range(0, 16, 2))
    N = 8 // patch[0] * (224 // patch[1]) * (224 // patch[2])
    masked = meta(4, N - N // 10, dtype=torch.int64)
    pred, video = meta(*masked.shape, 3 * patch[0] * patch[1] * patch[2], dtype=dtype), _video(channels_last)
    loss, mean, rstd = patch_loss.patch_loss(pred, video, masked, list(patch), frames, 1, MEAN, STD)
    patch_loss.patch_loss_backward(loss, pred, video, masked, mean, rstd, list(patch), frames, MEAN, STD)


def _norm(dtype, D, stream=F32):
    x, branch, weight = meta(4, 1569, D, dtype=stream), meta(4, 1569, D, dtype=dtype), meta(D, dtype=stream)
    sum, out, mean, rstd = add_layer_norm.add_layer_norm(x, branch, weight, weight, 1e-6, dtype)
    add_layer_norm.add_layer_norm_backward(sum, out, sum, mean, rstd, weight, dtype)


def _mlp(dtype, F):
    linear.cast(meta(F, F // 4, dtype=F32), meta(F, dtype=F32), F16 if dtype == F16 else BF16)
    hidden = meta(4 * 1569, F, dtype=dtype)
    mlp.gelu(hidden)
    mlp.gelu_backward(hidden, hidden, F32)


def _attention(dtype, D):
    # A length that every tile divides well enough, so that all of them are offered.
    qkv = meta(4, 1569, 3, 8, D, dtype=dtype)
    out, lse = attention.attention_qkvpacked(qkv, D**-0.5)
    attention.attention_qkvpacked_backward(out, qkv, out, lse, D**-0.5)


def _varlen(dtype, D):
    qkv, cu_seqlens = meta(4 * 1569, 3, 8, D, dtype=dtype), meta(5, dtype=torch.int32)
    out, lse = attention.attention_varlen_qkvpacked(qkv, cu_seqlens, D**-0.5)
    attention.attention_varlen_qkvpacked_backward(out, qkv, out, lse, cu_seqlens, D**-0.5)


def _varlen_short(dtype, D):
    qkv, cu_seqlens = meta(4 * 157, 3, 8, D, dtype=dtype), meta(5, dtype=torch.int32)
    out, lse = attention.attention_varlen_qkvpacked(qkv, cu_seqlens, D**-0.5)
    attention.attention_varlen_qkvpacked_backward(out, qkv, out, lse, cu_seqlens, D**-0.5)


# case -> launches. The shapes are the published models'; ViT-H is the one with patches of 14. "tf32" in a name allows it.
CASES = {
    "784 tokens": lambda: _random_masking(784),
    "1568 tokens": lambda: _random_masking(1568),
    "5000 tokens": lambda: _random_masking(5000),
    "512 bf16": lambda: _tokens(BF16, 512),
    "768 f32": lambda: _tokens(F32, 768),
    "384 bf16": lambda: _tokens(BF16, 384),
    "channels-last bf16": lambda: _patchify(BF16, True, (2, 16, 16), 768, rest=True),
    "planar bf16": lambda: _patchify(BF16, False, (2, 16, 16), 768),
    "patch 14 bf16": lambda: _patchify(BF16, True, (2, 14, 14), 1280),
    "channels-last f32": lambda: _patchify(F32, True, (2, 16, 16), 768),
    "channels-last f16": lambda: _patchify(F16, True, (2, 16, 16), 768),
    "channels-last tf32": lambda: _patchify(F32, True, (2, 16, 16), 768),
    "loss channels-last bf16": lambda: _patch_loss(BF16, True, (1, 16, 16)),
    "loss planar bf16": lambda: _patch_loss(BF16, False, (1, 16, 16)),
    "loss two frames f32": lambda: _patch_loss(F32, True, (2, 16, 16)),
    "loss by channel bf16": lambda: _patch_loss(BF16, True, (1, 16, 16), 2),
    "loss patch 14 bf16": lambda: _patch_loss(BF16, True, (1, 14, 14)),
    **{f"norm {D} bf16": lambda D=D: _norm(BF16, D) for D in (192, 384, 512, 768, 1024, 1280, 1408)},
    "norm 768 f32": lambda: _norm(F32, 768),
    "norm 1280 f32": lambda: _norm(F32, 1280),
    "norm 768 all bf16": lambda: _norm(BF16, 768, BF16),
    "norm 512 f16": lambda: _norm(F16, 512),
    "mlp 2048 bf16": lambda: _mlp(BF16, 2048),
    "mlp 3072 f32": lambda: _mlp(F32, 3072),
    "mlp 4096 f16": lambda: _mlp(F16, 4096),
    **{f"head {D} bf16": lambda D=D: _attention(BF16, D) for D in (32, 64, 80, 96, 128)},
    **{f"head {D} f32": lambda D=D: _attention(F32, D) for D in (64, 80, 128)},
    "head 64 f16": lambda: _attention(F16, 64),
    "head 64 tf32": lambda: _attention(F32, 64),
    **{f"varlen head {D} bf16": lambda D=D: _varlen(BF16, D) for D in (32, 64, 80, 128)},
    "varlen short head 64 bf16": lambda: _varlen_short(BF16, 64),
    "varlen head 64 f32": lambda: _varlen(F32, 64),
    "varlen channels-last bf16": lambda: _patchify_varlen(BF16, True, 768),
    "varlen planar bf16": lambda: _patchify_varlen(BF16, False, 768),
    "varlen channels-last f32": lambda: _patchify_varlen(F32, True, 768),
    "varlen loss channels-last bf16": lambda: _patch_loss_varlen(BF16, True),
    "varlen loss planar bf16": lambda: _patch_loss_varlen(BF16, False),
    "varlen tokens": _random_masking_varlen,
}
# Where not every target, as nothing but the type of the operands is new: float16 compiles to what bfloat16 does, tf32 to
# float32's with fewer products, head dim 80 in float32 to what 128 does, and patches of 14 to the loss of patches of 16.
BOTH = ("sm_80", "gfx942")
ONLY = {
    "channels-last f16": ("sm_90",),
    "channels-last tf32": ("sm_80",),
    "loss by channel bf16": ("sm_90", "gfx942"),
    "loss patch 14 bf16": BOTH,
    "head 80 f32": BOTH,
    "norm 384 bf16": BOTH,
    "norm 1408 bf16": BOTH,
    "norm 1280 f32": BOTH,
    "norm 512 f16": ("sm_90",),
    "mlp 4096 f16": ("sm_90",),
    "head 64 f16": ("sm_90",),
    "head 64 tf32": ("sm_80",),
    "varlen head 80 bf16": BOTH,
    "varlen head 64 f32": BOTH,
    "varlen planar bf16": BOTH,
    "varlen channels-last f32": BOTH,
    "varlen loss planar bf16": BOTH,
    "varlen tokens": BOTH,
}


def compile_case(job):
    """One case for one target: the target, and {"kernel | case | tiles | target": (machine code, whether the default)}."""
    case, target = job
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if "tf32" in case else "ieee"
    result, seen = {}, collections.Counter()
    try:
        with compiler.compiling(target) as compiled:
            CASES[case]()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, kernel, tiles, grid in compiled:
        if not (0 < grid[0] < 2**31 and all(0 < x < 2**16 for x in grid[1:])):
            raise AssertionError(f"{name}, {case}: a grid of {grid} cannot be launched")
        key = f"{name} | {case} | {' '.join(f'{k}={v}' for k, v in tiles.items())} | {target}"
        if key not in result:
            seen[name] += 1
            result[key] = compiler.machine_code(kernel), seen[name] == 1  # the first of a kernel's configurations
    return target, result


def compile_all(cases=None, targets=tuple(compiler.TARGETS)):
    """{"kernel | case | tiles | target": figures}, in as many processes as there are cores."""
    jobs = [(case, target) for case in cases or CASES for target in targets if target in ONLY.get(case, targets)]
    jobs.sort(key=lambda job: not job[0].startswith("head"))  # those that take long first, so that no process ends alone
    compiled = collections.defaultdict(dict)
    with multiprocessing.get_context("fork").Pool(min(len(jobs), len(os.sched_getaffinity(0)))) as pool:
        for target, kernels in pool.imap_unordered(compile_case, jobs):
            compiled[target] |= kernels
    table = {}
    for target, kernels in compiled.items():
        found = compiler.figures([code for code, _ in kernels.values()], target)
        table |= {key: x | {"default": default} for x, (key, (_, default)) in zip(found, kernels.items())}
    return dict(sorted(table.items()))


def difference(old, new):
    """What changed, kernel by kernel, as lines for people."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            lines.append(f"- {key}: no longer compiled")
        elif key not in old:
            lines.append(f"+ {key}: {new[key]}")
        else:
            changed = [f"{k} {old[key].get(k)} -> {v}" for k, v in new[key].items() if old[key].get(k) != v]
            if changed:
                lines.append(f"  {key}: {', '.join(changed)}")
    return lines


def figures_of(version=triton.__version__):
    """Where the figures of a Triton are kept, if they are: one file for all patch releases of a minor one."""
    return FIGURES / f"triton-{'.'.join(version.split('.')[:2])}.json"


def write(table, path):
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    path.write_text(f'{{\n"triton": {json.dumps(triton.__version__)},\n"kernels": {{\n{lines}\n}}\n}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the figures of this Triton")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    parser.add_argument("--case", action="append", choices=CASES, help="this case only, or several")
    parser.add_argument("--target", action="append", choices=compiler.TARGETS, help="this target only, or several")
    arguments = parser.parse_args()
    new = compile_all(arguments.case, arguments.target or compiler.TARGETS)
    if arguments.out:
        write(new, arguments.out)
    if arguments.update:
        if arguments.case or arguments.target:
            parser.error("--update takes all cases and targets")
        figures_of().parent.mkdir(exist_ok=True)
        write(new, figures_of())
    elif not figures_of().exists():
        print(f"no figures are kept for triton {triton.__version__}: nothing to compare with")
    else:
        old = json.loads(figures_of().read_text())["kernels"]
        if arguments.case:
            old = {key: value for key, value in old.items() if key.split(" | ")[1] in arguments.case}
        if arguments.target:
            old = {key: value for key, value in old.items() if key.split(" | ")[3] in arguments.target}
        lines = difference(old, new)
        print("\n".join(lines) or f"all {len(new)} kernels as in {figures_of().name}")
        sys.exit(bool(lines))
