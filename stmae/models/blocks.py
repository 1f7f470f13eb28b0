"""The transformer block, and how a sequence of them is run.

Between two plain blocks the residual stream is carried as a pair (x, branch): the sum of the two, not yet taken. Each LayerNorm
takes the sum as it reads it (``add_layer_norm``), so that the stream passes through memory once less per branch, forward and
backward. A block that is called, because it has hooks, for instance, gets and gives the stream itself, [B, N, D].
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stmae.models.layers import BackendModule, LayerScale, QKVLinear, add, add_layer_norm, is_plain, linear, mlp


def drop_path(x: torch.Tensor, rate: float, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016): zeroes samples of x [B, N, D] and scales the others by 1 /
    (1 - rate). With cu_seqlens [S + 1], samples lie one after another in x [1, total, D]."""
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keep = torch.rand(samples, 1, 1, device=x.device, dtype=torch.float32) >= rate
    if cu_seqlens is not None:
        keep = keep[:, 0].repeat_interleave(cu_seqlens.diff(), dim=0, output_size=x.shape[1])
    return x * (keep / (1 - rate)).to(x.dtype)


class Block(BackendModule):
    """Pre-norm transformer block (ViT): attention, then a two-layer MLP, each added to the residual stream.

    The residual stream keeps its dtype: under bfloat16 autocast it stays float32 and only the branches are
    bfloat16.

    Args:
        width: ``D``.
        num_heads: attention heads, which share the width.
        mlp_ratio: width of the hidden layer, over ``width``.
        qkv_bias: whether the query, key and value projections have biases.
        key_bias: whether, with ``qkv_bias``, the key projection has one, too.
        layer_scale: start of the learned scale of both branches; None: no scale.
        eps: of the LayerNorms.
        drop_path: rate of stochastic depth in training.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.checkpoint_activations = False  # keep only the block's input and compute it again in the backward pass
        self.norm1 = nn.LayerNorm(width, eps=eps)
        # Rows: (q, k, v), in each the heads.
        self.qkv = QKVLinear(width) if qkv_bias and not key_bias else nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(self.fc1.out_features, width)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """The residual stream x [B, N, D] after this block; with ``rows`` [B, M] int64 only that of those tokens, [B, M, D].

        With ``cu_seqlens`` [S + 1], x [1, total, D] holds S sequences one after another; tokens attend to their own sequence.

        Tokens meet only in the attention, so what nobody reads afterwards need not pass through the projection
        and the MLP.
        """
        return add(*self.residual(x, None, rows, cu_seqlens))

    def residual(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        rows: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward`` for a stream that is given and returned as a pair (x, branch): the sum x + branch, not yet taken."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._residual, x, branch, rows, cu_seqlens, use_reentrant=False)
        return self._residual(x, branch, rows, cu_seqlens)

    def _residual(
        self, x: torch.Tensor, branch: torch.Tensor | None, rows: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ops = self._ops
        x, qkv = self._qkv(x, branch)
        if cu_seqlens is None:
            out = ops.attention_qkvpacked(qkv).flatten(2)
        else:
            out = ops.attention_varlen_qkvpacked(qkv[0], cu_seqlens).flatten(1)[None]
        drop = self.training and self.drop_path > 0
        if rows is not None:
            if drop and cu_seqlens is not None:
                raise ValueError("Block: expected rows of sequences one after another only without drop_path")
            x, out = ops.gather_tokens(x, rows), ops.gather_tokens(out, rows)
        branch = self.ls1(linear(self.proj, out, ops))
        branch = drop_path(branch, self.drop_path, cu_seqlens) if drop else branch
        x, normal = add_layer_norm(x, branch, self.norm2, ops)
        branch = self.ls2(mlp(self.fc1, self.act, self.fc2, normal, ops))
        return x, drop_path(branch, self.drop_path, cu_seqlens) if drop else branch

    def _qkv(self, x: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + branch, its queries, keys and values [B, N, 3, H, D / H])."""
        x, normal = add_layer_norm(x, branch, self.norm1, self._ops)
        return x, linear(self.qkv, normal, self._ops).unflatten(2, (3, self.num_heads, -1))

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """What each token of the stream x [B, N, D] attends to in this block: softmax weights [B, H, N, N] float32, queries
        along the second last dimension, each row adding up to 1."""
        q, k, _ = self._qkv(x, None)[1].float().permute(2, 0, 3, 1, 4)  # [B, H, N, D / H] each
        with torch.autocast(x.device.type, enabled=False):
            return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    ops: ModuleType,
    *,
    branch: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stream (x, branch), [B, N, D] each, after ``blocks``; with ``rows`` [B, M] only that of those tokens,
    [B, M, D] each."""
    blocks = list(blocks)
    for index, block in enumerate(blocks):
        wanted = rows if index == len(blocks) - 1 else None
        if is_plain(block, Block):
            x, branch = block.residual(x, branch, wanted, cu_seqlens)
            continue
        x, branch = add(x, branch), None
        if cu_seqlens is not None:
            x = block(x, wanted, cu_seqlens)
        elif wanted is None:
            x = block(x)
        elif isinstance(block, Block):
            x = block(x, wanted)
        else:  # another module in a block's place
            x = ops.gather_tokens(block(x), wanted)
    return x, branch


def initialize_block(block: Block) -> None:
    """Xavier-uniform weights, zero biases, as in mae_st.

    mae_st has three projections q, k and v, so each third of the fused matrix is one matrix for the fan-in
    and fan-out rule; the rule on the full [3D, D] matrix would start with weights smaller by sqrt(2).
    """
    for weight in block.qkv.weight.data.chunk(3):
        nn.init.xavier_uniform_(weight)
    for layer in (block.proj, block.fc1, block.fc2):
        nn.init.xavier_uniform_(layer.weight)
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
