"""The video encoder: a plain ViT on the visible patches only, and what the two models built on it have in common."""

import math
from collections.abc import Sequence
from typing import Any, cast, overload

import torch
from torch import nn

from stmae.hub import HubMixin
from stmae.models.blocks import Block, initialize_block, run_blocks
from stmae.models.config import EncoderConfig, as_pair
from stmae.models.layers import BackendModule, add, add_layer_norm, is_plain
from stmae.models.packing import check_clips, check_ids, grid_of, numbered, offsets, split
from stmae.models.position import Position


class PatchEmbed(BackendModule):
    """The patch projection: ``weight`` [D, C, pt, ph, pw] and ``bias`` [D], as of a Conv3d with stride = kernel."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.mean, self.std = config.mean, config.std
        shape = (config.width, config.in_channels, config.tubelet_size, *as_pair(config.patch_size))
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(config.width))
        # mae_st: Xavier on the weight as a [D, C * pt * ph * pw] matrix; the bias keeps Conv3d's default.
        nn.init.xavier_uniform_(self.weight.data.flatten(1))
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        video: torch.Tensor | list[torch.Tensor],
        keep: torch.Tensor,
        position: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, K, D] of the patches ``keep`` [B, K] of ``video`` [B, C, T, H, W], plus ``position`` [N, D] if given.

        With ``cu_seqlens`` [S + 1]: [sum K, D] of the patches ``keep`` [sum K] of S clips [C, T, H, W], plus ``position``
        [sum N, D].
        """
        if cu_seqlens is not None:
            parameters = self.weight, self.bias, position
            return self._ops.masked_patchify_varlen(video, keep, cu_seqlens, *parameters, mean=self.mean, std=self.std)
        return self._ops.masked_patchify(video, keep, self.weight, self.bias, position, mean=self.mean, std=self.std)


class Encoder(BackendModule):
    """Patches, positions, class token, blocks, and a final LayerNorm: the autoencoder normalises every token, the classifier
    only the mean.

    Example:
        >>> tokens = encoder(video)  # uint8 [B, C, T, H, W] -> [B, 1 + N, D]
        >>> last4 = encoder.get_intermediate_layers(video, n=4)  # four of [B, N, D]
    """

    def __init__(self, config: EncoderConfig, drop_path: float = 0.0):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.position = Position(
            config.grid,
            config.width,
            separable=config.separable_position,
            class_token=config.class_token,
            table_grid=(config.position_grid or config.grid) if config.position == "sincos" else None,
        )
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, config.width))
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                key_bias=config.key_bias,
                layer_scale=config.layer_scale,
                eps=config.layer_norm_eps,
                drop_path=drop_path * index / max(config.depth - 1, 1),
            )
            for index in range(config.depth)
        )
        eps = config.layer_norm_eps if config.norm_eps is None else config.norm_eps
        self.norm = nn.LayerNorm(config.width, eps=eps) if config.encoder_norm else nn.Identity()
        for block in self.blocks:
            initialize_block(cast(Block, block))

    @overload
    def forward(self, video: torch.Tensor, keep: torch.Tensor | None = None, *, norm: bool = True) -> torch.Tensor: ...

    @overload
    def forward(
        self, video: Sequence[torch.Tensor], keep: Sequence[torch.Tensor] | None = None, *, norm: bool = True
    ) -> list[torch.Tensor]: ...

    def forward(self, video: Any, keep: Any = None, *, norm: bool = True) -> Any:
        """Tokens after the last block, [B, K, D] or, with a class token (first), [B, 1 + K, D].

        Args:
            video: [B, C, T, H, W]; uint8, or floating point and already normalised. Any strides. Or a list of clips
                [C, T, H, W] and pictures [C, H, W] of any sizes that are multiples of the patch, all of one dtype.
            keep: [B, K] int64, the patches to encode; default: all. For a list, a list of [K], ids within each clip.
            norm: whether the final LayerNorm is applied.

        Returns:
            A tensor; for a list of clips a list of [(1 +) K, D].

        Raises:
            ValueError: a video of another shape or dtype than the configuration's, or ids of the wrong shape or dtype.
            RuntimeError: an id out of range or repeated (on CPUs).
        """
        if not isinstance(video, torch.Tensor):
            x, counts = self.packed(video, keep, norm=norm)
            return split(x, counts)
        x, branch = run_blocks(self.blocks, self.embed(video, keep), self._ops)
        return add_layer_norm(x, branch, self.norm, self._ops)[1] if norm else add(x, branch)

    def packed(
        self, clips: Sequence[torch.Tensor], keep: Sequence[torch.Tensor] | None = None, *, norm: bool = True
    ) -> tuple[torch.Tensor, list[int]]:
        """``forward`` of a list of clips as one tensor: tokens [1, total, D], those of one clip after another's, and how many
        each has, with its class token."""
        clips = check_clips(type(self).__name__, self.config, clips)
        grids = [grid_of(self.config, clip) for clip in clips]
        tokens = [math.prod(grid) for grid in grids]
        device = clips[0].device
        if keep is None:
            keep = [torch.arange(n, device=device) for n in tokens]
        keep = check_ids(f"{type(self).__name__}: keep", keep, len(clips))
        kept, first = [len(row) for row in keep], int(self.config.class_token)
        positions = self.position(grids)
        position = torch.cat([own[first:] for own in positions])
        arguments = clips, numbered(keep, tokens)
        if is_plain(self.patch_embed, PatchEmbed):
            x = self.patch_embed.forward(*arguments, position, offsets(kept, device))
        else:
            x = self.patch_embed(*arguments, None, offsets(kept, device))
            x = x + position[arguments[1]].to(torch.promote_types(x.dtype, position.dtype))
        if first:
            class_token = (self.class_token + positions[0][:1]).to(x.dtype)
            x = torch.cat([part for own in x.split(kept) for part in (class_token, own)])
        counts = [first + n for n in kept]
        x, branch = run_blocks(self.blocks, x[None], self._ops, cu_seqlens=offsets(counts, device))
        return add_layer_norm(x, branch, self.norm, self._ops)[1] if norm else add(x, branch), counts

    def forward_features(self, video: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised tokens, [B, (1 +) K, D]: ``forward`` by the name that timm gives it."""
        return self(video, keep)

    def embed(self, video: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the first block, [B, (1 +) K, D]: embedded patches with their positions, after the class token."""
        check_video(type(self).__name__, self.config, video)
        if keep is None:
            keep = self.all_tokens(video)
        first = int(self.config.class_token)
        position = self.position()
        if is_plain(self.patch_embed, PatchEmbed):
            x = self.patch_embed.forward(video, keep, position[first:])
        else:
            x = self.patch_embed(video, keep)
            x = x + position[first:][keep].to(torch.promote_types(x.dtype, position.dtype))
        if not first:
            return x
        class_token = (self.class_token + position[:1]).to(x.dtype)
        return torch.cat([class_token.expand(x.shape[0], 1, -1), x], dim=1)

    def all_tokens(self, video: torch.Tensor) -> torch.Tensor:
        """keep [B, N] int64 that keeps every token of ``video`` [B, C, T, H, W]."""
        return torch.arange(self.config.num_tokens, device=video.device).expand(video.shape[0], -1)

    def get_intermediate_layers(
        self,
        video: torch.Tensor,
        n: int | Sequence[int] = 1,
        *,
        keep: torch.Tensor | None = None,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """What leaves some of the blocks, as in timm and DINOv2.

        Args:
            video: [B, C, T, H, W], as in ``forward``.
            n: how many of the last blocks, or the indices of the blocks wanted (0 is the first, -1 the last).
            keep: [B, K] int64, the patches to encode; default: all.
            reshape: give [B, D, t, h, w] on the patch grid instead of [B, N, D]; needs all patches.
            return_prefix_tokens: give pairs (patch tokens, class token [B, 1, D]; [B, 0, D] where there is none).
            norm: apply the final LayerNorm to each.

        Returns:
            A list with a tensor of patch tokens [B, K, D] for each block wanted, in the order of the blocks.

        Raises:
            ValueError: a block that is not there, ``reshape`` with ``keep``, and as ``forward``.
        """
        if reshape and keep is not None:
            raise ValueError("get_intermediate_layers: expected reshape only with all patches, got keep, too")
        x, branch, start, outputs = self.embed(video, keep), None, 0, []
        first = int(self.config.class_token)
        for index in self._block_indices("get_intermediate_layers", n):
            x, branch = run_blocks(self.blocks[start : index + 1], x, self._ops, branch=branch)
            start = index + 1
            # Without the norm the sum is taken once, and the next block reads it.
            x, out = add_layer_norm(x, branch, self.norm, self._ops) if norm else (add(x, branch),) * 2
            branch = None
            prefix, patches = out[:, :first], out[:, first:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, self.config.grid)
            outputs.append((patches, prefix) if return_prefix_tokens else patches)
        return outputs

    def get_attention_maps(
        self, video: torch.Tensor, n: int | Sequence[int] = 1, *, keep: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The attention weights of some blocks: for each [B, H, N, N] float32, or [B, H, 1 + N, 1 + N] with a class token,
        softmax(q k^T / sqrt(D / H)) with queries along the second last dimension.

        The kernels never form them, so they are computed here, in plain PyTorch: 4 H N^2 bytes a clip and block.

        Args:
            video: [B, C, T, H, W], as in ``forward``.
            n: as for ``get_intermediate_layers``.
            keep: [B, K] int64, the patches to encode; default: all.
        """
        x, start, maps = self.embed(video, keep), 0, []
        for index in self._block_indices("get_attention_maps", n):
            x = add(*run_blocks(self.blocks[start:index], x, self._ops))
            start = index
            maps.append(cast(Block, self.blocks[index]).attention_weights(x))
        return maps

    def _block_indices(self, name: str, n: int | Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        indices = list(range(depth - n, depth)) if isinstance(n, int) else [i + depth if i < 0 else i for i in n]
        if not len(indices) or not all(0 <= i < depth for i in indices):
            raise ValueError(
                f"{name}: expected n at least one of the {depth} blocks, as a number of last ones or indices, got {n!r}"
            )
        return sorted(set(indices))


def check_video(name: str, config: EncoderConfig, video: torch.Tensor) -> None:
    """Raises ValueError, in the name of ``name``, for what is no video [B, C, T, H, W] of ``config``'s."""
    expected = config.video_shape
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"{name}: expected video to be a tensor, got {type(video).__name__}")
    if video.dim() != 5 or tuple(video.shape[1:]) != expected:
        raise ValueError(f"{name}: expected video [B, {', '.join(map(str, expected))}] (B, C, T, H, W), got {list(video.shape)}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(f"{name}: expected video uint8 or normalised floating point, got {video.dtype}")


class VideoModel(HubMixin, BackendModule):
    """What both models have: ``config``, ``encoder`` and its blocks."""

    encoder: Encoder

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config

    def blocks(self) -> list[Block]:
        """The transformer blocks, the encoder's and then the decoder's: what is sharded, compiled or checkpointed one by one."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @property
    def checkpoint_activations(self) -> bool:
        """Whether the backward pass computes each block again instead of keeping its activations: less memory, a third more
        time, the same numbers."""
        return any(block.checkpoint_activations for block in self.blocks())

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        for block in self.blocks():
            block.checkpoint_activations = on

    def no_weight_decay(self) -> set[str]:
        """Names of tokens and position embeddings, which mae_st decays in pre-training and not in
        fine-tuning.

        Biases and norms, never decayed, are the parameters with fewer than two dimensions; these all have
        two.
        """
        return {name for name, _ in self.named_parameters() if "position." in name or name.endswith("_token")}

    def _check_video(self, video: torch.Tensor) -> None:
        check_video(type(self).__name__, self.config, video)
