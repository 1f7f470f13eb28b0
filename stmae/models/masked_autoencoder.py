"""The masked autoencoder: encodes the visible patches of a clip, reconstructs the masked ones.

Source: Feichtenhofer et al., "Masked Autoencoders As Spatiotemporal Learners", section 3; the details that
the paper leaves open are those of its two official implementations, each a switch of
``MaskedAutoencoderConfig``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import nn

from stmae.masking import Mask, make_mask, make_masks, num_keep
from stmae.models.blocks import Block, initialize_block, run_blocks
from stmae.models.config import MaskedAutoencoderConfig
from stmae.models.encoder import Encoder, VideoModel
from stmae.models.hog import hog_errors, hog_loss
from stmae.models.layers import BackendModule, add_layer_norm, linear
from stmae.models.packing import Grid, check_clips, check_ids, grid_of, numbered, offsets, split
from stmae.models.position import Position
from stmae.models.visualization import Reconstruction, reconstruct

# target -> patch_loss's ``normalize``
_NORMALIZE = {"pixels": False, "normalized_pixels": True, "channel_normalized_pixels": "channel"}


class MaskedAutoencoderOutput(NamedTuple):
    """loss: scalar float32; pred: [B, M, P], in the order of ``masked``; keep: [B, K], what the encoder saw; masked: [B, M],
    what was reconstructed: with a decoder mask, not all of the rest. Both ascending."""

    loss: torch.Tensor
    pred: torch.Tensor
    keep: torch.Tensor
    masked: torch.Tensor


class PackedOutput(NamedTuple):
    """``MaskedAutoencoderOutput`` of a list of clips. loss: scalar float32; pred: [M, P] of each; keep: [K], masked: [M]."""

    loss: torch.Tensor
    pred: list[torch.Tensor]
    keep: list[torch.Tensor]
    masked: list[torch.Tensor]


class Decoder(BackendModule):
    """A narrower ViT over all tokens, mask tokens in the masked places, and the prediction of the masked
    patches."""

    def __init__(self, config: MaskedAutoencoderConfig):
        super().__init__()
        self.config = config
        width = config.decoder_width
        separable = config.decoder_separable_position
        self.embed = nn.Linear(config.width, width, bias=config.decoder_embed_bias)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        if config.class_token and config.decoder_class_token == "own":
            # mae_st starts it at zero, unlike the encoder's.
            self.class_token = nn.Parameter(torch.zeros(1, width))
        self.position = Position(
            config.grid,
            width,
            separable=config.separable_position if separable is None else separable,
            class_token=config.class_token,
            table_grid=(config.position_grid or config.grid) if config.position == "sincos" else None,
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.decoder_num_heads,
                mlp_ratio=config.mlp_ratio if config.decoder_mlp_ratio is None else config.decoder_mlp_ratio,
                qkv_bias=config.qkv_bias,
                key_bias=config.key_bias,
                layer_scale=config.layer_scale,
                eps=config.layer_norm_eps,
            )
            for _ in range(config.decoder_depth)
        )
        eps = config.layer_norm_eps if config.decoder_norm_eps is None else config.decoder_norm_eps
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, config.patch_values)

        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.embed, self.head):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for block in self.blocks:
            initialize_block(cast(Block, block))

    def forward(
        self,
        latent: torch.Tensor,
        keep: Any,
        masked: Any,
        grids: list[Grid] | None = None,
    ) -> torch.Tensor:
        """latent [B, (1 +) K, D], keep [B, K], masked [B, M] -> pred [B, M, P].

        With a decoder mask, the sequence holds the tokens ``keep`` and ``masked`` only; without, all N.

        With ``grids``, one for each of S clips: latent [1, total, D], their tokens one after another's, and lists of keep [K] and
        masked [M] -> [1, sum M, P].
        """
        if grids is not None:
            return self._packed(latent, keep, masked, grids)
        ops = self._ops
        partial = self.config.decoder_mask_ratio > 0 and keep.shape[1] + masked.shape[1] != self.config.num_tokens
        x = linear(self.embed, latent, ops)
        if self.config.class_token:
            # The class token is token 0 of the sequence, so it goes through the same scatter as the visible
            # tokens and the N tokens are written once. Replacing its row after the projection is cheaper than
            # projecting a strided slice without it.
            if self.config.decoder_class_token == "own":
                x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x[:, 1:]], dim=1)
            keep = torch.cat([keep.new_zeros(keep.shape[0], 1), keep + 1], dim=1)
            masked = masked + 1
        position = self.position()
        if partial:
            # Attention does not ask in which order the tokens come: the visible ones, then those to be reconstructed.
            visible, hidden = x + F.embedding(keep, position), self.mask_token + F.embedding(masked, position)
            x = torch.cat([visible, hidden], dim=1)
            masked = torch.arange(visible.shape[1], x.shape[1], device=x.device).expand(x.shape[0], -1)
        else:
            x = ops.restore_tokens(x, keep, self.mask_token[0], position)
        x, branch = run_blocks(self.blocks, x, ops, rows=masked)
        return linear(self.head, add_layer_norm(x, branch, self.norm, ops)[1], ops)

    def _packed(
        self, latent: torch.Tensor, keep: list[torch.Tensor], masked: list[torch.Tensor], grids: list[Grid]
    ) -> torch.Tensor:
        ops, first, device = self._ops, int(self.config.class_token), latent.device
        x = linear(self.embed, latent, ops)
        if first:
            if self.config.decoder_class_token == "own":
                class_token = self.class_token.to(x.dtype)
                parts = x[0].split([1 + len(row) for row in keep])
                x = torch.cat([part for own in parts for part in (class_token, own[1:])])[None]
            keep = [torch.cat([row.new_zeros(1), row + 1]) for row in keep]
            masked = [row + 1 for row in masked]
        positions = self.position(grids)
        tokens = [len(own) for own in positions]
        if self.config.decoder_mask_ratio > 0 and any(len(k) + len(m) != n for k, m, n in zip(keep, masked, tokens)):
            visible, hidden = [len(row) for row in keep], [len(row) for row in masked]
            sequences = []
            for own, k, m, position in zip(x[0].split(visible), keep, masked, positions):
                sequences += [own + F.embedding(k, position), self.mask_token + F.embedding(m, position)]
            x = torch.cat(sequences)[None]
            tokens = [k + m for k, m in zip(visible, hidden)]
            ids = numbered([torch.arange(k, n, device=device) for k, n in zip(visible, tokens)], tokens)
        else:
            x = ops.restore_tokens(x, numbered(keep, tokens)[None], self.mask_token[0], torch.cat(positions))
            ids = numbered(masked, tokens)
        x, branch = run_blocks(self.blocks, x, ops, rows=ids[None], cu_seqlens=offsets(tokens, device))
        return linear(self.head, add_layer_norm(x, branch, self.norm, ops)[1], ops)


class MaskedAutoencoder(VideoModel):
    """Masked autoencoder for video.

    Initialised as mae_st: Xavier-uniform linear layers with zero biases, class token and positions truncated
    normal (0.02), mask token normal (0.02), the decoder's own class token zero.

    Example:
        >>> model = stmae.models.mae_vit_base_patch16()
        >>> out = model(video)  # uint8 [B, 3, 16, 224, 224]
        >>> out.loss.backward()
    """

    config: MaskedAutoencoderConfig

    def __init__(self, config: MaskedAutoencoderConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._frames = config.frames

    @overload
    def forward(
        self,
        video: torch.Tensor,
        *,
        mask: Mask | None = None,
        mask_ratio: float | None = None,
        decoder_mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        phase: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedAutoencoderOutput: ...

    @overload
    def forward(
        self,
        video: Sequence[torch.Tensor],
        *,
        mask: Sequence[Mask] | None = None,
        mask_ratio: float | Sequence[float] | None = None,
        decoder_mask_ratio: float | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        phase: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PackedOutput: ...

    def forward(
        self,
        video: Any,
        *,
        mask: Any = None,
        mask_ratio: Any = None,
        decoder_mask_ratio: float | None = None,
        noise: Any = None,
        phase: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Masks, encodes, decodes and compares.

        A list of clips of any lengths and sizes is one packed batch: nothing is padded and nothing dropped, every clip has its
        own mask, and on a CPU the prediction has the bits of each clip by itself. Arguments and results are then lists, one entry
        a clip, without the dimension ``B``.

        Args:
            video: [B, C, T, H, W]; uint8 (0..255, normalised inside the kernels) or floating point, already
                normalised. Any strides. Or a list of clips [C, T, H, W], and of pictures [C, H, W], which are clips of one
                tubelet, all of one dtype, with sizes that are multiples of the patch.
            mask: which tokens are visible and which are reconstructed, from ``sample_mask``, say; default: made of
                the arguments that follow, which are refused beside it. In a model with a decoder mask, ``masked`` may hold
                visible tokens, too, as VideoMAE V2's does: they are predicted, and no part of the loss.
            mask_ratio: masked fraction of the tokens; default: the configuration's. For a list of clips also a list with one for
                each, or a tuple (lowest, highest), from which one is drawn for each.
            decoder_mask_ratio: fraction of the masked tokens that is left out of the decoder; default: the configuration's.
            noise: [B, N] float32 whose smallest entries are kept; default: drawn by the configuration's
                strategy.
            phase: [B] int64 in [0, 4), where the running cells of a decoder mask start (``stmae.masking.sample_phase``);
                default: drawn with the noise, 0 for noise that is given. Without a decoder mask it is not used.
            generator: source of what is drawn.

        Returns:
            ``MaskedAutoencoderOutput(loss, pred [B, M, P], keep [B, K], masked [B, M])``. The loss is the
            mean over reconstructed patches of the mean squared error within a patch (section 3 of the paper), or with
            ``loss_reduction`` ``clip`` the mean over clips of the mean over each one's. For a list, ``PackedOutput``.

        Raises:
            ValueError: video, mask, noise or phase of the wrong shape or dtype, a ratio that keeps nothing or everything,
                noise that does not fit the strategy, or arguments beside a mask.
            RuntimeError: NaN in the noise.
        """
        if not isinstance(video, torch.Tensor):
            return self._forward_clips(video, mask, mask_ratio, decoder_mask_ratio, noise, phase, generator)
        self._check_video(video)
        given = mask is not None
        if mask is None:
            mask = self.sample_mask(
                video.shape[0],
                mask_ratio=mask_ratio,
                decoder_mask_ratio=decoder_mask_ratio,
                noise=noise,
                phase=phase,
                generator=generator,
                device=video.device,
            )
        else:
            beside = {
                "mask_ratio": mask_ratio,
                "decoder_mask_ratio": decoder_mask_ratio,
                "noise": noise,
                "phase": phase,
                "generator": generator,
            }
            self._check_mask(mask, video.shape[0], [name for name, value in beside.items() if value is not None])
        keep, masked = mask
        pred = self.decode(self.encode(video, keep), keep, masked)
        if self.config.target == "hog":
            loss = hog_loss(pred, video, masked, self._frames, self.config.target_patch_size)
        elif given and self.config.decoder_mask_ratio > 0:
            # As in VideoMAE V2, what is reconstructed at visible places is no part of the loss.
            visible = torch.zeros(len(keep), self.config.num_tokens, dtype=torch.bool, device=keep.device).scatter_(1, keep, True)
            hidden = ~visible.gather(1, masked)
            each = self._patch_loss(pred, video, masked, "none")
            loss = self._reduced((each * hidden).sum(dim=1), hidden.sum(dim=1))
        else:
            loss = self._patch_loss(pred, video, masked)
        return MaskedAutoencoderOutput(loss, pred, keep, masked)

    def _reduced(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The loss, from what each clip's reconstructed patches add up to [S] and how many they are [S]."""
        if self.config.loss_reduction == "clip":
            return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
        return sums.sum() / counts.sum().clamp(min=1)

    def _forward_clips(
        self,
        clips: Sequence[torch.Tensor],
        mask: Sequence[Mask] | None,
        mask_ratio: float | Sequence[float] | None,
        decoder_mask_ratio: float | None,
        noise: Sequence[torch.Tensor] | None,
        phase: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> PackedOutput:
        name, config = type(self).__name__, self.config
        clips = check_clips(name, config, clips)
        grids, device = [grid_of(config, clip) for clip in clips], clips[0].device
        given = mask is not None
        if mask is None:
            mask = self.sample_masks(
                grids,
                mask_ratio=mask_ratio,
                decoder_mask_ratio=decoder_mask_ratio,
                noise=noise,
                phase=phase,
                generator=generator,
                device=device,
            )
        else:
            names = ("mask_ratio", "decoder_mask_ratio", "noise", "phase", "generator")
            values = (mask_ratio, decoder_mask_ratio, noise, phase, generator)
            self._check_beside([key for key, value in zip(names, values) if value is not None])
            if not isinstance(mask, (list, tuple)) or not all(isinstance(own, tuple) and len(own) == 2 for own in mask):
                raise ValueError(f"{name}: expected mask a list of a Mask(keep, masked) for each clip, got {type(mask).__name__}")
        keep = check_ids(f"{name}: mask.keep", [own[0] for own in mask], len(clips))
        masked = check_ids(f"{name}: mask.masked", [own[1] for own in mask], len(clips))
        if given:
            for k, m, grid in zip(keep, masked, grids):
                self._check_ids(k[None], m[None], math.prod(grid))
        latent, _ = self.encoder.packed(clips, keep)
        pred = self.decoder(latent, keep, masked, grids)
        counts = [len(row) for row in masked]
        each = self._loss_of_clips(pred[0], clips, masked, grids).split(counts)
        number = torch.tensor(counts).to(device, non_blocking=True)
        if given and config.decoder_mask_ratio > 0:  # as in forward
            shown = [torch.zeros(math.prod(grid), dtype=torch.bool, device=device) for grid in grids]
            hidden = [~visible.index_fill(0, k, True)[m] for visible, k, m in zip(shown, keep, masked)]
            each = [own * wanted for own, wanted in zip(each, hidden)]
            number = torch.stack([wanted.sum() for wanted in hidden])
        sums = torch.stack([own.sum() for own in each])
        return PackedOutput(self._reduced(sums, number), split(pred, counts), keep, masked)

    def _loss_of_clips(
        self, pred: torch.Tensor, clips: list[torch.Tensor], masked: list[torch.Tensor], grids: list[Grid]
    ) -> torch.Tensor:
        """The loss of each patch, [sum M], from pred [sum M, P]."""
        config = self.config
        frames = [config.frames_of(clip.shape[1]) for clip in clips]
        counts = [len(row) for row in masked]
        if config.target == "hog":
            own = zip(pred.split(counts), clips, masked, frames)
            return torch.cat([hog_errors(p[None], x[None], m[None], f, config.target_patch_size)[0] for p, x, m, f in own])
        mean, std = config.mean, config.std
        if config.target_range == "unit":
            clips = [self._in_unit_range(clip) for clip in clips]
            mean, std = 0.0, 1.0
        return self._ops.patch_loss_varlen(
            pred,
            clips,
            numbered(masked, [math.prod(grid) for grid in grids]),
            offsets(counts, pred.device),
            patch_size=config.target_patch_size,
            frames=frames,
            normalize=_NORMALIZE[config.target],
            mean=mean,
            std=std,
            reduction="none",
        )

    def _in_unit_range(self, video: torch.Tensor) -> torch.Tensor:
        """Floating frames [..., C, T, H, W], which are normalised, as frames in [0, 1]; bytes as they are."""
        if not video.is_floating_point():
            return video
        shift, scale = (torch.as_tensor(x, device=video.device).view(-1, 1, 1, 1) for x in (self.config.mean, self.config.std))
        return video.float() * scale + shift

    def _patch_loss(self, pred: torch.Tensor, video: torch.Tensor, masked: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        config = self.config
        mean, std = config.mean, config.std
        if config.target_range == "unit":
            video = self._in_unit_range(video)
            mean, std = 0.0, 1.0  # bytes to [0, 1]
        return self._ops.patch_loss(
            pred,
            video,
            masked,
            patch_size=config.target_patch_size,
            frames=self._frames,
            normalize=_NORMALIZE[config.target],
            mean=mean,
            std=std,
            reduction=reduction,
        )

    def sample_mask(
        self,
        batch: int,
        *,
        mask_ratio: float | None = None,
        decoder_mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        phase: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Mask:
        """``Mask(keep [B, K], masked [B, M])`` for a batch of ``B`` clips, by the configuration's strategy. Arguments as in
        ``forward``; device: where it lies, by default that of the noise or torch's default device."""
        config = self.config
        return make_mask(
            config.mask_strategy,
            batch,
            config.grid,
            config.mask_ratio if mask_ratio is None else mask_ratio,
            decoder_ratio=config.decoder_mask_ratio if decoder_mask_ratio is None else decoder_mask_ratio,
            noise=noise,
            phase=phase,
            generator=generator,
            device=device,
            ops=self._ops,
        )

    def sample_masks(
        self,
        grids: Sequence[Grid],
        *,
        mask_ratio: float | Sequence[float] | None = None,
        decoder_mask_ratio: float | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        phase: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> list[Mask]:
        """``Mask(keep [K], masked [M])`` for each of S clips of these patch grids (t, h, w), by the configuration's strategy.
        Arguments as in ``forward`` of a list; device: where they lie."""
        config = self.config
        ratio = config.mask_ratio if mask_ratio is None else mask_ratio
        if isinstance(ratio, tuple):
            if len(ratio) != 2 or not all(isinstance(x, (int, float)) for x in ratio) or not 0 < ratio[0] <= ratio[1] < 1:
                raise ValueError(
                    f"MaskedAutoencoder: expected mask_ratio a range (lowest, highest) between 0 and 1 (exclusive), got {ratio}"
                )
            for grid in set(grids) if config.mask_strategy != "multi_block" else ():
                for bound in ratio:  # of a range that some draw would not do for, none does
                    num_keep(config.mask_strategy, grid, bound)
            draws = torch.rand(len(grids), generator=generator, device=None if generator is None else generator.device).tolist()
            ratios = [ratio[0] + x * (ratio[1] - ratio[0]) for x in draws]
        elif isinstance(ratio, (int, float)):
            ratios = [ratio] * len(grids)
        else:
            ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio]
            if not all(isinstance(x, (int, float)) for x in ratios):
                raise ValueError(
                    "MaskedAutoencoder: expected mask_ratio a number, a tuple (lowest, highest) or a list of a number for each "
                    f"clip, got {ratio!r}"
                )
        if len(ratios) != len(grids):
            raise ValueError(f"MaskedAutoencoder: expected one mask_ratio for each clip, {len(grids)} in all, got {len(ratios)}")
        return make_masks(
            config.mask_strategy,
            grids,
            ratios,
            decoder_ratio=config.decoder_mask_ratio if decoder_mask_ratio is None else decoder_mask_ratio,
            blocks=config.blocks,
            noise=noise,
            phase=phase,
            generator=generator,
            device=device,
            ops=self._ops,
        )

    def _check_beside(self, beside: list[str]) -> None:
        if beside:
            raise ValueError(f"MaskedAutoencoder: expected a mask or what one is made of, got mask and {', '.join(beside)}")

    def _check_mask(self, mask: Mask, batch: int, beside: list[str]) -> None:
        self._check_beside(beside)
        if not isinstance(mask, tuple) or len(mask) != 2:
            raise ValueError(f"MaskedAutoencoder: expected mask to be a Mask(keep, masked), got {type(mask).__name__}")
        for name, ids in zip(Mask._fields, mask):
            if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != batch:
                got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
                raise ValueError(f"MaskedAutoencoder: expected mask.{name} [{batch}, *] (B, tokens) int64, got {got}")
        self._check_ids(*mask, self.config.num_tokens)

    def _check_ids(self, keep: torch.Tensor, masked: torch.Tensor, tokens: int) -> None:
        overlap = self.config.decoder_mask_ratio > 0
        if keep.shape[1] + masked.shape[1] > tokens and not overlap:
            got = f"{keep.shape[1]} and {masked.shape[1]}"
            raise ValueError(f"MaskedAutoencoder: expected mask.keep and mask.masked with {tokens} tokens at most, got {got}")
        if keep.device.type == "cpu" and not torch.compiler.is_compiling() and keep.numel() and masked.numel():
            together = torch.cat([keep, masked], dim=1)
            separate = overlap and together.shape[1] != tokens
            for ids in (keep, masked) if separate else (together,):
                ids = ids.sort(dim=1).values
                if bool((ids[:, 1:] == ids[:, :-1]).any()):
                    raise ValueError("MaskedAutoencoder: expected no token twice in a row of mask.keep and mask.masked, got one")

    @overload
    def encode(self, video: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor: ...

    @overload
    def encode(self, video: Sequence[torch.Tensor], keep: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]: ...

    def encode(self, video: Any, keep: Any = None) -> Any:
        """Latents [B, K, D] of the tokens ``keep`` [B, K] (default: all), after the final norm.

        With a class token, which comes first: [B, 1 + K, D]. Of a list of clips [C, T, H, W] and pictures [C, H, W], with a list
        of ``keep`` [K] or None, a list of [(1 +) K, D].
        """
        if isinstance(video, torch.Tensor):
            self._check_video(video)
        return self.encoder(video, keep)

    def decode(self, latent: torch.Tensor, keep: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Predictions [B, M, P] for the tokens ``masked`` [B, M], from ``encode``'s latents of the tokens
        ``keep`` [B, K]."""
        return self.decoder(latent, keep, masked)

    @overload
    def reconstruct(
        self, video: torch.Tensor, out: MaskedAutoencoderOutput | None = None, *, fill: float = 0.5
    ) -> Reconstruction: ...

    @overload
    def reconstruct(
        self, video: Sequence[torch.Tensor], out: PackedOutput | None = None, *, fill: float = 0.5
    ) -> list[Reconstruction]: ...

    def reconstruct(self, video: Any, out: Any = None, *, fill: float = 0.5) -> Any:
        """Pictures of what the model was given, saw and predicted; see ``stmae.models.visualization.reconstruct``.

        Args:
            video: [B, C, T, H, W], or a list of clips, as in ``forward``.
            out: ``forward``'s result for this video; default: computed here, in evaluation mode, without
                gradients and without a decoder mask.
            fill: grey value in [0, 1] of masked patches in the ``masked`` pictures.

        Returns:
            ``Reconstruction(original, masked, reconstruction, frames, patch_statistics)``: three float32
            tensors [B, C, F, H, W] in [0, 1], F the predicted frames, ``frames`` their indices in the clip.
            ``patch_statistics`` is ``"original"`` if the model predicts normalised patches, in which case
            each patch's mean and deviation were taken from the original, else ``"predicted"``. Of a list, a list with the
            pictures of each clip, B = 1.
        """
        if isinstance(video, torch.Tensor):
            self._check_video(video)
        else:
            video = check_clips(type(self).__name__, self.config, video)
        with torch.no_grad():
            if out is None:
                training = self.training
                self.eval()
                try:
                    out = self(video, decoder_mask_ratio=0)
                finally:
                    self.train(training)
            if isinstance(video, torch.Tensor):
                return reconstruct(self.config, video, out.pred, out.masked, keep=out.keep, fill=fill)
            return [
                reconstruct(self._config_of(clip), clip[None], pred[None], masked[None], keep=keep[None], fill=fill)
                for clip, pred, masked, keep in zip(video, out.pred, out.masked, out.keep, strict=True)
            ]

    def _config_of(self, clip: torch.Tensor) -> MaskedAutoencoderConfig:
        """The configuration of a model whose own clips are as ``clip`` [C, T, H, W] is."""
        frames, *size = clip.shape[1:]
        predicted = self.config.target_patch_size[0] * (frames // self.config.tubelet_size)
        return self.config.replace(num_frames=frames, image_size=tuple(size), predicted_frames=predicted)
