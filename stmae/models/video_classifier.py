"""The video classifier that the pre-trained encoder is fine-tuned as: mean of the patch tokens, LayerNorm,
dropout, linear."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stmae.models.config import VideoClassifierConfig
from stmae.models.encoder import Encoder, VideoModel
from stmae.models.layers import add_layer_norm, linear
from stmae.models.packing import check_clips

Clips = torch.Tensor | Sequence[torch.Tensor]
Keep = torch.Tensor | Sequence[torch.Tensor] | None


class VideoClassifier(VideoModel):
    """ViT classifier for clips.

    With a class token, the mean leaves it out (as mae_st and SlowFast do). Without one it is over all patch
    tokens, where mae_st would still drop the first, a patch. The head starts normal (0.02) with zero bias;
    the encoder as the autoencoder's.
    """

    config: VideoClassifierConfig
    head: nn.Module

    def __init__(self, config: VideoClassifierConfig):
        super().__init__(config)
        self.encoder = Encoder(config, drop_path=config.drop_path)
        self.reset_classifier(config.num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``, by which the configuration goes from then on; 0: none, as in timm."""
        if num_classes != self.config.num_classes:
            self.config = self.config.replace(num_classes=num_classes)
        if num_classes == 0:
            self.head = nn.Identity()
            return
        weight = self.encoder.patch_embed.weight
        head = nn.Linear(self.config.width, num_classes, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.head = head

    def forward(self, video: Clips, *, keep: Keep = None) -> torch.Tensor:
        """Logits [B, num_classes]; with ``num_classes=0`` the pooled features [B, D].

        Args:
            video: [B, C, T, H, W]; uint8, or floating point and already normalised. Any strides. Or a list of S clips
                [C, T, H, W] and pictures [C, H, W] of any sizes that are multiples of the patch: logits [S, num_classes].
            keep: [B, K] the visible tokens, for masked fine-tuning; default: all. For a list, a list of [K].
        """
        return self.forward_head(self.forward_features(video, keep=keep))

    def forward_features(self, video: Clips, *, keep: Keep = None) -> Any:
        """All tokens [B, N, D], or [B, 1 + N, D] with the class token first, after the last block and before the norm, which
        is that of their mean (timm's ``fc_norm``). Arguments as in ``forward``; for a list of clips a list of [(1 +) N, D]."""
        if not isinstance(video, torch.Tensor):
            video = check_clips("VideoClassifier", self.config, video)
            if keep is not None and any(len(row) == 0 for row in keep):
                raise ValueError("VideoClassifier: expected keep with at least one token a clip, got one with none")
            return self.encoder(video, keep, norm=False)
        self._check_video(video)
        if isinstance(keep, torch.Tensor) and keep.numel() == 0 and len(video):
            raise ValueError(f"VideoClassifier: expected keep with at least one token a clip, got {list(keep.shape)}")
        return self.encoder(video, keep, norm=False)

    def forward_head(self, tokens: torch.Tensor | list[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """Logits [B, num_classes] of what ``forward_features`` gives; with ``pre_logits`` what the head would get, [B, D]."""
        if not isinstance(tokens, torch.Tensor):  # one by one: a product of other rows adds up in another order
            return torch.cat([self.forward_head(own[None], pre_logits) for own in tokens])
        x = F.dropout(self._pooled(tokens), self.config.dropout, self.training)
        return x if pre_logits else linear(self.head, x, self._ops)

    def features(self, video: Clips, *, keep: Keep = None, pooled: bool = True) -> Any:
        """What the head sees: the normalised mean of the patch tokens, [B, D].

        ``pooled=False`` gives the tokens that are averaged, [B, N, D] in grid order ([B, K, D] with
        ``keep``), before the norm.
        """
        tokens = self.forward_features(video, keep=keep)
        if pooled:
            return self._pooled(tokens)
        return (
            self._patch_tokens(tokens) if isinstance(tokens, torch.Tensor) else [self._patch_tokens(x[None])[0] for x in tokens]
        )

    def _pooled(self, tokens: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        if not isinstance(tokens, torch.Tensor):
            return torch.cat([self._pooled(x[None]) for x in tokens])
        if self.config.pooling == "first":
            return add_layer_norm(tokens[:, 0], None, self.encoder.norm, self._ops)[1]
        return self.pool(self._patch_tokens(tokens))

    def _patch_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 1:] if self.config.class_token else tokens

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """The normalised mean [B, D] of tokens [B, N, D]: of those that ``features(pooled=False)`` gives, what it gives else."""
        return add_layer_norm(tokens.mean(dim=1), None, self.encoder.norm, self._ops)[1]
