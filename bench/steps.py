"""A pre-training step as each side runs it: forward, backward, gradient clipping, AdamW, on synthetic uint8 clips.

    ours          stmae.ops
    reference     stmae.reference
    tuned         plain PyTorch with its best parts (tuned.py)
    huggingface   transformers' VideoMAE with SDPA; its decoder is made as wide and deep as ours. It normalizes the full video
                  and predicts every frame where we predict one of two, so its loss is another and only its time is compared.

SIDE-compiled is the same under torch.compile, SIDE-graph captured in one CUDA graph.
"""

import contextlib

import torch

import stmae
from bench import tuned
from stmae.models import layers

layers._BACKENDS["tuned"] = tuned

BACKENDS = {"ours": "ops", "reference": "reference", "tuned": "tuned"}
FACTORIES = {
    "tiny": lambda: stmae.models.mae_vit_small_patch16(
        image_size=64, num_frames=4, width=64, depth=2, num_heads=2, decoder_width=32, decoder_depth=1, decoder_num_heads=1
    ),
    "small": stmae.models.mae_vit_small_patch16,
    "base": stmae.models.mae_vit_base_patch16,
    "large": stmae.models.mae_vit_large_patch16,
}


def precision(dtype, device):
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def adamw(model, capturable=False):
    options = dict(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True, capturable=capturable)
    return torch.optim.AdamW(model.parameters(), **options)


def inputs(config, batch, device):
    """Clips [B, T, H, W, 3] uint8, as a decoder makes them, and the mask's noise [B, N]."""
    generator = torch.Generator().manual_seed(1)
    _, T, H, W = config.video_shape
    shape = (batch, T, H, W, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return frames.to(device), torch.rand(batch, config.num_tokens, generator=generator).to(device)


class Step:
    """One model and its optimizer on one backend; a call is one training step."""

    def __init__(self, size, backend, dtype, device, batch, *, dense=False, capturable=False):
        torch.manual_seed(0)
        self.model = FACTORIES[size]().to(device)
        self.model.backend = backend
        self.dtype, self.device, self.dense = dtype, device, dense
        self.optimizer = adamw(self.model, capturable)
        frames, self.noise = inputs(self.model.config, batch, device)
        self.video = frames.permute(0, 4, 1, 2, 3)  # [B, C, T, H, W] as a view

    def loss(self):
        with precision(self.dtype, self.device):
            if not self.dense:
                return self.model(self.video, noise=self.noise).loss
            # The dense encoder sees every token; the decoder gets the visible ones, so that all else is the same work.
            model, ops = self.model, self.model._ops
            keep, masked = model.sample_mask(len(self.video), noise=self.noise)
            tokens = torch.cat([keep.new_zeros(len(keep), 1), keep + 1], dim=1)
            pred = model.decode(ops.gather_tokens(model.encode(self.video), tokens), keep, masked)
            config = model.config
            return ops.patch_loss(pred, self.video, masked, patch_size=config.target_patch_size, frames=config.frames)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.02)
        self.optimizer.step()
        return loss.detach()


class HuggingFaceStep(Step):
    def __init__(self, size, dtype, device, batch, *, capturable=False):
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        config = FACTORIES[size]().config
        (_, T, H, _), (t, h, _) = config.video_shape, config.grid
        torch.manual_seed(0)
        theirs = VideoMAEConfig(
            image_size=H,
            num_frames=T,
            patch_size=H // h,
            tubelet_size=T // t,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.width,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=4 * config.decoder_width,
            norm_pix_loss=True,
            attn_implementation="sdpa",
        )
        self.model = VideoMAEForPreTraining(theirs).to(device).train()
        assert self.model.config._attn_implementation == "sdpa"
        self.dtype, self.device = dtype, device
        self.optimizer = adamw(self.model, capturable)
        frames, noise = inputs(config, batch, device)
        self.video = frames.permute(0, 1, 4, 2, 3)  # [B, T, C, H, W]
        visible = noise.argsort(1)[:, : round(config.num_tokens * (1 - config.mask_ratio))]
        self.masked = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 1, 3, 1, 1)

    def loss(self):
        pixels = (self.video.float() / 255 - self.mean) / self.std
        with precision(self.dtype, self.device):
            return self.model(pixels, bool_masked_pos=self.masked).loss


class Graph:
    """A step captured in a CUDA graph; a call replays it."""

    def __init__(self, step):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # tunes, allocates the optimizer's moments
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        step.optimizer.zero_grad(set_to_none=True)
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()

    def __call__(self):
        self.graph.replay()
        return self.loss


def make(side, size, dtype, device, batch):
    """The step of a side by its name, as at the top of this file."""
    name, _, way = side.partition("-")
    capturable = way == "graph"
    if name == "huggingface":
        step = HuggingFaceStep(size, dtype, device, batch, capturable=capturable)
    else:
        step = Step(size, BACKENDS[name], dtype, device, batch, capturable=capturable)
    if way == "compiled":
        step.model.compile()
    return Graph(step) if capturable else step


def check(steps, dtype):
    """All sides must compute the same thing before a ratio means anything."""
    results = {}
    for name, step in steps.items():
        loss = step.loss()
        loss.backward()
        results[name] = loss.item(), step.model.encoder.blocks[0].qkv.weight.grad.clone()
        step.optimizer.zero_grad(set_to_none=True)
    loss, grad = results["ours"]
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-4
    for name, (other_loss, other_grad) in results.items():
        assert abs(loss - other_loss) < tolerance * abs(loss), f"{name}: loss {other_loss}, ours {loss}"
        assert (grad - other_grad).norm() < 3 * tolerance * grad.norm(), f"{name}: gradients differ"
