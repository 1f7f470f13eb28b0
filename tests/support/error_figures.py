"""How far each op is from float64, beside plain PyTorch at the same precision: the table of docs/robustness.md.

    python -m tests.support.error_figures

The reference is computed in float64, from the pixels' bytes on, and, as PyTorch would, in the op's own dtype. An error is divided
by the largest value of the exact result; the figures are percentiles over all elements of all draws.
"""

import torch

from stmae import ops, reference
from tests.support import exact

DRAWS = 10


def draw(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(seed, batch, count, tokens):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)])


def attention(seed, dtype):
    return {name: draw(seed + i, 2, 392, 4, 64, dtype=dtype) for i, name in enumerate("qkv")}


def linear(seed, dtype):
    return {
        "x": draw(seed, 600, 384, dtype=dtype),
        "weight": draw(seed + 1, 192, 384, dtype=dtype),
        "bias": draw(seed + 2, 192, dtype=dtype),
    }


def mlp(seed, dtype):
    return {
        "x": draw(seed, 600, 192, dtype=dtype),
        "fc1_weight": 0.07 * draw(seed + 1, 768, 192, dtype=dtype),
        "fc1_bias": draw(seed + 2, 768, dtype=dtype),
        "fc2_weight": 0.04 * draw(seed + 3, 192, 768, dtype=dtype),
        "fc2_bias": draw(seed + 4, 192, dtype=dtype),
    }


def add_layer_norm(seed, dtype):
    return {
        "x": draw(seed, 300, 768, dtype=dtype),
        "branch": draw(seed + 1, 300, 768, dtype=dtype),
        "weight": draw(seed + 2, 768, dtype=torch.float32),
        "bias": draw(seed + 3, 768, dtype=torch.float32),
    }


def masked_patchify(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return {
        "video": torch.randint(0, 256, (2, 3, 8, 64, 64), dtype=torch.uint8, generator=generator),
        "keep": ids(seed, 2, 16, 64),
        "weight": 0.03 * draw(seed, 192, 3, 2, 16, 16, dtype=dtype),
        "bias": draw(seed + 1, 192, dtype=dtype),
        "position": draw(seed + 2, 64, 192, dtype=dtype),
    }


def patch_loss(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred": draw(seed, 2, 48, 1536, dtype=dtype),
        "video": torch.randint(0, 256, (2, 3, 8, 64, 64), dtype=torch.uint8, generator=generator),
        "masked": ids(seed, 2, 48, 64),
    }


def restore_tokens(seed, dtype):
    return {
        "tokens": draw(seed, 2, 40, 192, dtype=dtype),
        "keep": ids(seed, 2, 40, 392),
        "mask_token": draw(seed + 1, 192, dtype=dtype),
        "position": draw(seed + 2, 392, 192, dtype=dtype),
    }


INPUTS = (attention, linear, mlp, add_layer_norm, masked_patchify, patch_loss, restore_tokens)
OPTIONS = {"patch_loss": {"patch_size": (2, 16, 16), "reduction": "none"}}


def results(module, make, seed, dtype, wide=False):
    tensors = make(seed, dtype)
    if wide:
        tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point() and name != "video"}
    op = getattr(exact if wide else module, make.__name__, None) or getattr(module, make.__name__)
    out = op(**tensors, **OPTIONS.get(make.__name__, {}))
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [draw(seed + 50, *x.shape, dtype=torch.float32).to(x.dtype) for x in out])
    return {"out": out[-1].detach(), **{f"grad_{name}": x.grad for name, x in leaves.items()}}


def figures(make, dtype):
    errors = {}
    for seed in range(0, 100 * DRAWS, 100):
        truth = results(reference, make, seed, dtype, wide=True)
        for side, module in (("stmae", ops), ("torch", reference)):
            for name, x in results(module, make, seed, dtype).items():
                error = (x.double() - truth[name]).abs().flatten() / truth[name].abs().max()
                errors.setdefault(name, {}).setdefault(side, []).append(error)
    for name, sides in errors.items():
        yield name, {side: torch.cat(parts).sort().values for side, parts in sides.items()}


def percentile(ordered, fraction):
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))].item()


if __name__ == "__main__":
    print("| op | dtype | result | p99 | largest | PyTorch: p99 | largest | p99 ratio |")
    print("|---" * 8 + "|")
    for make in INPUTS:
        for dtype in (torch.float32, torch.bfloat16):
            for name, sides in figures(make, dtype):
                cells = [[percentile(sides[side], fraction) for fraction in (0.99, 1.0)] for side in ("stmae", "torch")]
                numbers = " | ".join(f"{value:.1e}" for row in cells for value in row)
                ratio = cells[0][0] / cells[1][0] if cells[1][0] else 1.0 if not cells[0][0] else float("inf")
                print(f"| `{make.__name__}` | {str(dtype)[6:]} | {name} | {numbers} | {ratio:.2f} |", flush=True)
