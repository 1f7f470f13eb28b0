"""The action detector: the pre-trained encoder under a head that says what the person in a box does."""

import torch
import torch.nn.functional as F
from torch import nn

from stmae.models.config import ActionDetectorConfig
from stmae.models.encoder import Encoder, VideoModel
from stmae.models.layers import linear
from stmae.models.roi_align import roi_align


class ActionDetector(VideoModel):
    """ViT that scores the actions of persons in given boxes; it does not find the persons.

    The normalised tokens of the last block are averaged over time, RoIAlign takes each box's part of that map, its maximum goes
    through dropout to a linear layer. Actions do not exclude each other: a sigmoid of each logit is its score.

    Source: Feichtenhofer et al., "SlowFast Networks for Video Recognition", section 5, and its published head, with a plain ViT's
    only feature map; Feichtenhofer et al., "Masked Autoencoders As Spatiotemporal Learners", appendix A.
    """

    config: ActionDetectorConfig
    head: nn.Module

    def __init__(self, config: ActionDetectorConfig):
        super().__init__(config)
        self.encoder = Encoder(config, drop_path=config.drop_path)
        self.head = nn.Linear(config.width, config.num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, video: torch.Tensor, boxes: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        """Logits [K, num_classes] of K boxes.

        Args:
            video: [B, C, T, H, W]; uint8, or floating point and already normalised. Any strides.
            boxes: [K, 4] floating point (x1, y1, x2, y2), relative to the frames' width and height.
            clip: [K] int64, which of the B clips a box lies in.

        Raises:
            ValueError: operands of other shapes or dtypes.
        """
        self._check_video(video)
        tokens = self.encoder(video)
        first = int(self.config.class_token)
        t, h, w = self.config.grid
        # The few values behind the encoder are computed in float32, boxes too: bf16 does not tell pixels of 224 apart.
        with torch.autocast(video.device.type, enabled=False):
            feature_map = tokens[:, first:].float().unflatten(1, (t, h * w)).mean(1).transpose(1, 2).unflatten(2, (h, w))
            x = roi_align(feature_map, boxes.float(), clip, self.config.roi_size).amax((2, 3))
            x = F.dropout(x, self.config.dropout, self.training)
            return linear(self.head, x, self._ops)
