"""The video classifier that the pre-trained encoder is fine-tuned as: mean of the patch tokens, LayerNorm,
dropout, linear."""

import torch
import torch.nn.functional as F
from torch import nn

from stmae.models.config import VideoClassifierConfig
from stmae.models.encoder import Encoder, VideoModel
from stmae.models.layers import add_layer_norm, linear


class VideoClassifier(VideoModel):
    """ViT classifier for clips.

    With a class token, the mean leaves it out (as mae_st and SlowFast do). Without one it is over all patch
    tokens, where mae_st would still drop the first, a patch. The head starts normal (0.02) with zero bias;
    the encoder as the autoencoder's.
    """

    config: VideoClassifierConfig

    def __init__(self, config: VideoClassifierConfig):
        super().__init__(config)
        self.encoder = Encoder(config, drop_path=config.drop_path)
        self.head = nn.Linear(config.width, config.num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, video: torch.Tensor, *, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, num_classes].

        Args:
            video: [B, C, T, H, W]; uint8, or floating point and already normalised. Any strides.
            keep: [B, K] tokens to look at, for masked fine-tuning; default: all.
        """
        x = F.dropout(self.features(video, keep=keep), self.config.dropout, self.training)
        return linear(self.head, x, self._ops)

    def features(self, video: torch.Tensor, *, keep: torch.Tensor | None = None, pooled: bool = True) -> torch.Tensor:
        """What the head sees: the normalised mean of the patch tokens, [B, D].

        ``pooled=False`` gives the tokens that are averaged, [B, N, D] in grid order ([B, K, D] with
        ``keep``), before the norm.
        """
        self._check_video(video)
        if keep is not None and keep.numel() == 0 and len(video):
            raise ValueError(f"VideoClassifier: expected keep with at least one token a clip, got {list(keep.shape)}")
        tokens = self.encoder(video, keep, norm=False)
        if self.config.class_token:
            tokens = tokens[:, 1:]
        return self.pool(tokens) if pooled else tokens

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """The normalised mean [B, D] of tokens [B, N, D]: of those that ``features(pooled=False)`` gives, what it gives else."""
        return add_layer_norm(tokens.mean(dim=1), None, self.encoder.norm, self._ops)[1]
