"""The transformer block.

``ops`` is the module that serves the operations, ``stmae.ops`` or ``stmae.reference``; it is handed down from
the model at each call so that switching the back end touches no weights.

A residual stream is carried as a pair (x, branch): the sum of the two, not yet taken. Each LayerNorm takes the sum as it reads it
(``add_layer_norm``), so that the stream passes through memory once less per branch, forward and backward.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def add_layer_norm(x: torch.Tensor, branch: torch.Tensor | None, layer: nn.LayerNorm, ops) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, its LayerNorm)."""
    return ops.add_layer_norm(x, branch, layer.weight, layer.bias, eps=layer.eps)


def drop_path(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016): zeroes whole samples of x [B, N, D] and scales the others by 1 /
    (1 - rate)."""
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block (ViT): attention, then a two-layer MLP, each added to the residual stream.

    The residual stream keeps its dtype: under bfloat16 autocast it stays float32 and only the branches are
    bfloat16.
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
        self.checkpoint_activations = False  # keep only the block's input and compute it again in the backward pass
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)  # rows: (q, k, v), in each the heads
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(self.fc1.out_features, width)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor | None, ops, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream (x, branch), [B, N, D] each (branch None before the first block), after this block; with
        ``rows`` [B, M] only that of those tokens, [B, M, D] each.

        Tokens meet only in the attention, so what nobody reads afterwards need not pass through the projection
        and the MLP.
        """
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, x, branch, ops, rows, use_reentrant=False)
        return self._forward(x, branch, ops, rows)

    def _forward(self, x, branch, ops, rows):
        x, normal = add_layer_norm(x, branch, self.norm1, ops)
        qkv = ops.linear(normal, self.qkv.weight, self.qkv.bias)
        out = ops.packed_attention(qkv.unflatten(2, (3, self.num_heads, -1))).flatten(2)
        if rows is not None:
            x, out = ops.gather_tokens(x, rows), ops.gather_tokens(out, rows)
        branch = self._drop(ops.linear(out, self.proj.weight, self.proj.bias))
        x, normal = add_layer_norm(x, branch, self.norm2, ops)
        return x, self._drop(ops.mlp(normal, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(branch, self.drop_path) if self.training and self.drop_path > 0 else branch


def initialize_block(block: Block) -> None:
    """Xavier-uniform weights, zero biases, as in mae_st.

    mae_st has three projections q, k and v, so each third of the fused matrix is one matrix for the fan-in
    and fan-out rule; the rule on the whole [3D, D] matrix would start with weights smaller by sqrt(2).
    """
    for weight in block.qkv.weight.data.chunk(3):
        nn.init.xavier_uniform_(weight)
    for layer in (block.proj, block.fc1, block.fc2):
        nn.init.xavier_uniform_(layer.weight)
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
