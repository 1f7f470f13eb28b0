"""The transformer block, and the one place where linear layers, layer norms and GELU are called.

``ops`` is the module that serves the custom operations, ``stmae.ops`` or ``stmae.reference``; it is handed down from the model at each
call so that switching the back end touches no weights.
"""

import torch
import torch.nn.functional as F
from torch import nn


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """[..., in] -> [..., out]."""
    return F.linear(x, layer.weight, layer.bias)


def layer_norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    """[..., D] -> [..., D], statistics in float32."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU, ``x * Phi(x)``."""
    return F.gelu(x)


def drop_path(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016): zeroes whole samples of x [B, N, D] and scales the others by 1 / (1 - rate)."""
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block (ViT): attention, then a two-layer MLP, each added to the residual stream.

    The residual stream keeps its dtype: under bfloat16 autocast it stays float32 and only the branches are bfloat16.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)  # rows: all of q, all of k, all of v; heads within
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(self.fc1.out_features, width)

    def forward(self, x: torch.Tensor, ops, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, N, D] -> [B, N, D], or [B, M, D] for the tokens ``rows`` [B, M] alone.

        Tokens meet only in the attention, so what nobody reads afterwards need not pass through the MLP.
        """
        batch, tokens, width = x.shape
        qkv = linear(layer_norm(x, self.norm1), self.qkv)
        out = ops.packed_attention(qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads))
        x = x + self._drop(linear(out.reshape(batch, tokens, width), self.proj))
        if rows is not None:
            x = ops.gather_tokens(x, rows)
        hidden = gelu(linear(layer_norm(x, self.norm2), self.fc1))
        return x + self._drop(linear(hidden, self.fc2))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(branch, self.drop_path) if self.training and self.drop_path > 0 else branch


def initialize_block(block: Block) -> None:
    """Xavier-uniform weights, zero biases, as in mae_st.

    mae_st has three projections q, k and v, so each third of the fused matrix is one matrix for the fan-in and fan-out rule; the
    rule on the whole [3D, D] matrix would start with weights smaller by sqrt(2).
    """
    for weight in block.qkv.weight.data.chunk(3):
        nn.init.xavier_uniform_(weight)
    for layer in (block.proj, block.fc1, block.fc2):
        nn.init.xavier_uniform_(layer.weight)
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
