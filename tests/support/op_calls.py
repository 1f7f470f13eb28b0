"""A good call of each registered op, torch.ops.stmae.*, by argument name."""

import torch

import stmae.ops  # noqa: F401  (defines torch.ops.stmae)

OPS = torch.ops.stmae
BF16 = torch.bfloat16


def ids(batch, count, of):
    return torch.stack([torch.randperm(of, generator=torch.Generator().manual_seed(row))[:count] for row in range(batch)])


def floats(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def video():
    return torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LOSS = {"patch_size": [2, 4, 4], "frames": [0, 1, 2, 3]}
LOSS_OF_TWO = {"patch_size": [2, 4, 4], "frames": [0, 1, 2, 3, 0, 1, 2, 3, 4, 5], "frame_counts": [4, 6]}
COLOUR = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def attention_saved(dtype=torch.float32):
    q, k, v = floats(2, 5, 2, 16, dtype=dtype), floats(2, 7, 2, 16, dtype=dtype), floats(2, 7, 2, 16, dtype=dtype)
    out, lse = OPS.attention(q, k, v, 0.25)
    return {"grad_out": floats(2, 5, 2, 16, dtype=dtype), "q": q, "k": k, "v": v, "out": out, "lse": lse, "scale": 0.25}


def packed_saved():
    qkv = floats(2, 5, 3, 2, 16)
    out, lse = OPS.attention_qkvpacked(qkv, 0.25)
    return {"grad_out": floats(2, 5, 2, 16), "qkv": qkv, "out": out, "lse": lse, "scale": 0.25}


def varlen_saved():
    q, k, v, cu_q, cu_k = (
        floats(7, 2, 16),
        floats(8, 2, 16),
        floats(8, 2, 16),
        torch.tensor([0, 3, 3, 7]),
        torch.tensor([0, 2, 3, 8]),
    )
    out, lse = OPS.attention_varlen(q, k, v, cu_q, cu_k, 0.25)
    saved = {"grad_out": floats(7, 2, 16), "q": q, "k": k, "v": v, "out": out, "lse": lse}
    return {**saved, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "scale": 0.25}


def varlen_packed_saved():
    qkv, cu_seqlens = floats(7, 3, 2, 16), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    out, lse = OPS.attention_varlen_qkvpacked(qkv, cu_seqlens, 0.25)
    return {"grad_out": floats(7, 2, 16), "qkv": qkv, "out": out, "lse": lse, "cu_seqlens": cu_seqlens, "scale": 0.25}


def videos():  # of 8 and 12 tokens
    return [video()[0].clone(), torch.cat([video()[1], video()[1, :, :2]], 1)]


# A good call of each op, by argument name.
CALLS = {
    "_check_matrix": lambda: {"x": floats(3, 4), "op": "linear", "name": "x"},
    "add_layer_norm": lambda: {
        "x": floats(2, 5, 8), "branch": floats(2, 5, 8), "weight": floats(8), "bias": floats(8), "eps": 1e-6, "dtype": BF16,
    },
    "add_layer_norm_backward": lambda: {
        "grad_sum": floats(2, 5, 8), "grad_out": floats(2, 5, 8), "sum": floats(2, 5, 8), "mean": floats(10),
        "rstd": floats(10).abs(), "weight": floats(8), "branch_dtype": torch.float32,
    },
    "attention": lambda: {"q": floats(2, 5, 2, 16), "k": floats(2, 7, 2, 16), "v": floats(2, 7, 2, 16), "scale": 0.25},
    "attention_backward": attention_saved,
    "attention_varlen": lambda: {
        "q": floats(7, 2, 16), "k": floats(8, 2, 16), "v": floats(8, 2, 16), "cu_seqlens_q": torch.tensor([0, 3, 3, 7]),
        "cu_seqlens_k": torch.tensor([0, 2, 3, 8]), "scale": 0.25,
    },
    "attention_varlen_backward": varlen_saved,
    "attention_varlen_qkvpacked": lambda: {
        "qkv": floats(7, 3, 2, 16), "cu_seqlens": torch.tensor([0, 3, 3, 7], dtype=torch.int32), "scale": 0.25,
    },
    "attention_varlen_qkvpacked_backward": varlen_packed_saved,
    "column_sum": lambda: {"x": floats(5, 6)},
    "gather_tokens": lambda: {"x": floats(2, 9, 8), "ids": ids(2, 4, 9)},
    "gather_tokens_backward": lambda: {"grad_out": floats(2, 4, 8), "ids": ids(2, 4, 9), "num_tokens": 9},
    "gelu": lambda: {"hidden": floats(5, 6)},
    "gelu_backward": lambda: {"hidden": floats(5, 6), "grad": floats(5, 6)},
    "linear": lambda: {"x": floats(5, 6), "weight": floats(4, 6), "bias": floats(4)},
    "linear_backward": lambda: {
        "grad_out": floats(5, 4), "x": floats(5, 6), "weight": floats(4, 6), "bias": floats(4),
        "weight_dtype": torch.float32, "output_mask": [True] * 3,
    },
    "linear_product": lambda: {
        "out": torch.zeros(5, 4), "x": floats(5, 6), "weight": floats(4, 6), "bias": floats(4), "transposed": False,
    },
    "linear_weight_gradient": lambda: {"out": torch.zeros(4, 6), "grad_out": floats(5, 4), "x": floats(5, 6), "add": False},
    "masked_patchify": lambda: {
        "video": video(), "keep": ids(2, 3, 8), "weight": floats(6, 3, 2, 4, 4), "bias": floats(6), "position": floats(8, 6),
        **COLOUR,
    },
    "masked_patchify_backward": lambda: {
        "grad_out": floats(2, 3, 6), "video": video(), "keep": ids(2, 3, 8), "weight": floats(6, 3, 2, 4, 4), "bias": floats(6),
        "position": floats(8, 6), **COLOUR,
    },
    "masked_patchify_varlen": lambda: {
        "videos": videos(), "keep": torch.tensor([1, 5, 7, 8, 19]), "cu_seqlens": torch.tensor([0, 3, 5]),
        "weight": floats(6, 3, 2, 4, 4), "bias": floats(6), "position": floats(20, 6), **COLOUR,
    },
    "masked_patchify_varlen_backward": lambda: {
        "grad_out": floats(5, 6), "videos": videos(), "keep": torch.tensor([1, 5, 7, 8, 19]),
        "cu_seqlens": torch.tensor([0, 3, 5]), "weight": floats(6, 3, 2, 4, 4), "bias": floats(6), "position": floats(20, 6),
        **COLOUR,
    },
    "mlp": lambda: {
        "x": floats(5, 6), "fc1_weight": floats(9, 6), "fc1_bias": floats(9), "fc2_weight": floats(6, 9), "fc2_bias": floats(6),
    },
    "mlp_backward": lambda: {
        "grad_out": floats(5, 6), "x": floats(5, 6), "hidden": floats(5, 9), "activation": torch.empty(0),
        "fc1_weight": floats(9, 6), "fc1_bias": floats(9), "fc2_weight": floats(6, 9), "fc2_bias": floats(6),
        "fc1_dtype": torch.float32, "fc2_dtype": torch.float32, "output_mask": [True] * 5,
    },
    "attention_qkvpacked": lambda: {"qkv": floats(2, 5, 3, 2, 16), "scale": 0.25},
    "attention_qkvpacked_backward": packed_saved,
    "patch_loss": lambda: {
        "pred": floats(2, 3, 96), "video": video(), "masked": ids(2, 3, 8), **LOSS, "normalize": True, **COLOUR,
    },
    "patch_loss_backward": lambda: {
        "grad_loss": floats(2, 3), "pred": floats(2, 3, 96), "video": video(), "masked": ids(2, 3, 8), "patch_mean": floats(2, 3),
        "patch_rstd": floats(2, 3).abs(), **LOSS, **COLOUR,
    },
    "patch_loss_varlen": lambda: {
        "pred": floats(5, 96), "videos": videos(), "masked": torch.tensor([1, 5, 7, 8, 19]),
        "cu_seqlens": torch.tensor([0, 3, 5]), **LOSS_OF_TWO, "normalize": True, **COLOUR,
    },
    "patch_loss_varlen_backward": lambda: {
        "grad_loss": floats(5), "pred": floats(5, 96), "videos": videos(), "masked": torch.tensor([1, 5, 7, 8, 19]),
        "cu_seqlens": torch.tensor([0, 3, 5]), "patch_mean": floats(5), "patch_rstd": floats(5).abs(), **LOSS_OF_TWO, **COLOUR,
    },
    "random_masking": lambda: {"noise": floats(3, 10), "num_keep": 4},
    "random_masking_varlen": lambda: {
        "noise": floats(10), "cu_seqlens": torch.tensor([0, 4, 10]), "cu_keep": torch.tensor([0, 1, 3]), "total_keep": 3,
    },
    "restore_tokens": lambda: {
        "tokens": floats(2, 4, 8), "keep": ids(2, 4, 9), "mask_token": floats(8), "position": floats(9, 8),
    },
    "restore_tokens_backward": lambda: {"grad_out": floats(2, 9, 8), "keep": ids(2, 4, 9), "tokens_dtype": torch.float32},
}  # fmt: skip
