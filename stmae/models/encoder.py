"""The video encoder: a plain ViT on the visible patches only, and what the two models built on it share."""

import torch
from torch import nn

from stmae import ops, reference
from stmae.models.blocks import Block, initialize_block
from stmae.models.config import EncoderConfig
from stmae.models.position import Position

_BACKENDS = {"ops": ops, "reference": reference}


class PatchEmbed(nn.Module):
    """Weights of the patch projection: ``weight`` [D, C, pt, ph, pw] and ``bias`` [D], as of a Conv3d with
    stride = kernel."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        shape = (config.width, config.in_channels, config.tubelet_size, *config.patch_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(config.width))
        # mae_st: Xavier on the weight as a [D, C * pt * ph * pw] matrix; the bias keeps Conv3d's default.
        nn.init.xavier_uniform_(self.weight.data.flatten(1))
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)


class Encoder(nn.Module):
    """Patches, positions, class token, blocks. ``norm`` belongs to it but is applied by its user: the
    autoencoder normalises every token, the classifier the mean."""

    def __init__(self, config: EncoderConfig, drop_path: float = 0.0):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.position = Position(config.grid, config.width, separable=config.separable_position, class_token=config.class_token)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, config.width))
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                eps=config.layer_norm_eps,
                drop_path=drop_path * index / max(config.depth - 1, 1),
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        for block in self.blocks:
            initialize_block(block)

    def forward(self, video: torch.Tensor, keep: torch.Tensor, ops) -> tuple[torch.Tensor, torch.Tensor]:
        """video [B, C, T, H, W], keep [B, K] -> the residual stream (x, branch) before ``norm``: [B, K, D] each
        or, with a class token (first), [B, 1 + K, D]."""
        x = ops.masked_patchify(
            video,
            keep,
            self.patch_embed.weight,
            self.patch_embed.bias,
            self.position.of_patches(),
            mean=self.config.mean,
            std=self.config.std,
        )
        if self.config.class_token:
            first = (self.class_token + self.position.of_class_token()).to(x.dtype)
            x = torch.cat([first.expand(x.shape[0], 1, -1), x], dim=1)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, ops)
        return x, branch


class VideoModel(nn.Module):
    """What both models have: ``config``, ``encoder``, the choice of back end, and checks of the input."""

    encoder: Encoder

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self._backend = "ops"

    @property
    def backend(self) -> str:
        """``ops``: the kernels; ``reference``: the same weights on plain PyTorch (``stmae.reference``)."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in _BACKENDS:
            choices = ", ".join(_BACKENDS)
            raise ValueError(f"{type(self).__name__}: expected backend to be one of {choices}, got {name!r}")
        self._backend = name

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

    @property
    def _ops(self):
        # Looked up by name, because a module object held by the model could be neither copied nor pickled.
        return _BACKENDS[self._backend]

    def no_weight_decay(self) -> set[str]:
        """Names of tokens and position embeddings, which mae_st decays in pre-training and not in
        fine-tuning.

        Biases and norms, never decayed, are the parameters with fewer than two dimensions; these all have
        two.
        """
        return {name for name, _ in self.named_parameters() if "position." in name or name.endswith("_token")}

    def _all_tokens(self, video: torch.Tensor) -> torch.Tensor:
        """keep [B, N] that keeps everything."""
        return torch.arange(self.config.num_tokens, device=video.device).expand(video.shape[0], -1)

    def _check_video(self, video: torch.Tensor) -> None:
        name = type(self).__name__
        expected = self.config.video_shape
        if not isinstance(video, torch.Tensor):
            raise ValueError(f"{name}: expected video to be a tensor, got {type(video).__name__}")
        if video.dim() != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(
                f"{name}: expected video [B, {', '.join(map(str, expected))}] (B, C, T, H, W), got {list(video.shape)}"
            )
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ValueError(f"{name}: expected video uint8 or normalised floating point, got {video.dtype}")
