"""What the bridges to other code bases share: their names for our parameters, and their arguments for our
configuration."""

import torch

from stmae.checkpoint.state import build
from stmae.models.config import EncoderConfig, MaskedAutoencoderConfig
from stmae.models.encoder import VideoModel
from stmae.models.masked_autoencoder import MaskedAutoencoder
from stmae.models.video_classifier import VideoClassifier

# Ours -> theirs; a name that ends in a dot stands for all that begin with it. The encoder is called the same
# in mae_st and SlowFast.
ENCODER = {
    "encoder.patch_embed.weight": "patch_embed.proj.weight",
    "encoder.patch_embed.bias": "patch_embed.proj.bias",
    "encoder.class_token": "cls_token",
    "encoder.position.spatial": "pos_embed_spatial",
    "encoder.position.temporal": "pos_embed_temporal",
    "encoder.position.class_token": "pos_embed_class",
    "encoder.position.joint": "pos_embed",
    "encoder.norm.": "norm.",
}
_BLOCK = {
    "norm1.": "norm1.",
    "qkv.": "attn.qkv.",
    "proj.": "attn.proj.",
    "norm2.": "norm2.",
    "fc1.": "mlp.fc1.",
    "fc2.": "mlp.fc2.",
}


def block_names(prefix: str, their_prefix: str, depth: int, special: dict[str, str] | None = None) -> dict[str, str]:
    """The table's rows for ``depth`` blocks; ``special``: rows that go before the usual ones."""
    rows = {**(special or {}), **_BLOCK}
    return {
        f"{prefix}{index}.{ours}": f"{their_prefix}{index}.{theirs}" for index in range(depth) for ours, theirs in rows.items()
    }


def translate(name: str, table: dict[str, str]) -> str:
    """A name by the table; one that is not in it stays as it is."""
    for source, target in table.items():
        if name == source or (source.endswith(".") and name.startswith(source)):
            return target + name.removeprefix(source)
    return name


def has_leading_one(name: str) -> bool:
    """Whether the parameter of ours is [n, D] where theirs is [1, n, D]: tokens and positions."""
    return "position." in name or name.endswith("_token")


def build_renamed(
    config: EncoderConfig,
    weights: dict[str, torch.Tensor],
    table: dict[str, str],
    source: str,
) -> VideoModel:
    """The model of ``config`` from weights by their names; ``table``: ours -> theirs. Raises CheckpointMismatch, by their
    names."""
    model_class = MaskedAutoencoder if isinstance(config, MaskedAutoencoderConfig) else VideoClassifier
    backwards = {theirs: ours for ours, theirs in table.items()}
    state = {}
    for theirs, value in weights.items():
        name = translate(theirs, backwards)
        leading_one = has_leading_one(name) and value.dim() == 3 and value.shape[0] == 1
        state[name] = value[0] if leading_one else value
    return build(model_class, config, state, source, lambda name: translate(name, table)).eval()


def unwrap(state_dict: dict) -> dict[str, torch.Tensor]:
    """The tensors by their plain names, out of nesting under ``model``, ``model_state`` or ``module`` and without
    wrappers' prefixes."""
    for key in ("model_state", "model", "module"):
        if isinstance(state_dict.get(key), dict):
            return unwrap(state_dict[key])
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                "expected a dictionary of tensors, or one nested under 'model' or 'model_state', "
                f"got {type(value).__name__} at {name!r}"
            )
    return strip_prefixes(state_dict)


def strip_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without torch.compile's ``_orig_mod.``, and without DDP's ``module.`` and Lightning's ``model.`` where every name has
    them."""
    tensors = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    for prefix in ("module.", "model.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fields(where: str, config: dict, arguments: dict, without_field: set) -> dict:
    """Their arguments as fields of our configuration.

    ``arguments``: theirs -> (our field, their default; None: it must be given).
    ``without_field``: further arguments that are allowed.
    """
    # A misspelt argument would otherwise be its default, which for a number of heads loads without a word and
    # computes something else.
    known = set(arguments) | without_field
    unknown = sorted(set(config) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise ValueError(f"{where}: unknown arguments {', '.join(unknown)}; known are {listed}")
    absent = [name for name, (_, default) in arguments.items() if default is None and name not in config]
    if absent:
        raise ValueError(f"{where}: expected config to name {', '.join(absent)}, which have no default")
    return {field: config.get(name, default) for name, (field, default) in arguments.items()}
