"""Entry points of torch.hub: ``torch.hub.load("OWNER/stmae", "mae_vit_base_patch16")``. They need stmae installed."""

dependencies = ["torch", "stmae"]

from stmae.models import (  # noqa: E402, F401
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    vit_base_patch16,
    vit_huge_patch14,
    vit_large_patch16,
    vit_small_patch16,
)


def load(name_or_path: str, **overrides):
    """A model of a folder, a file or a Hugging Face repository, whatever code base wrote it; see ``stmae.checkpoint.load``."""
    from stmae.models.encoder import VideoModel

    return VideoModel.from_pretrained(name_or_path, **overrides)
