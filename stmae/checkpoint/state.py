"""From a dictionary of tensors to a model, all or nothing."""

from collections.abc import Callable
from typing import TypeVar

import torch

from stmae.models.config import EncoderConfig
from stmae.models.encoder import VideoModel
from stmae.models.position import Position

Model = TypeVar("Model", bound=VideoModel)


class CheckpointMismatch(ValueError):
    """Weights that do not fit a model.

    Attributes:
        missing: names that the model needs and the weights lack.
        unexpected: names in the weights that the model has no use for.
        shapes: name -> (expected shape, shape that came).
    """

    def __init__(self, source: str, missing: list[str], unexpected: list[str], shapes: dict[str, tuple]) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.shapes = dict(sorted(shapes.items()))
        lines = [f"{source} does not fit the model:"]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        lines += [f"  shape: {name} expected {list(want)}, got {list(got)}" for name, (want, got) in self.shapes.items()]
        super().__init__("\n".join(lines))


def build(
    model_class: type[Model],
    config: EncoderConfig,
    state: dict[str, torch.Tensor],
    source: str,
    called: Callable[[str], str] = str,
) -> Model:
    """A model on the CPU with exactly these weights, copied, in their dtype if they share one.

    Args:
        state: tensors by the model's own names.
        source: what the error message calls them.
        called: own name -> the name that the error message should use.

    Raises:
        CheckpointMismatch: if a name is missing or left over or a shape differs.
    """
    with torch.device("meta"):  # no time or memory for an initialisation that is overwritten
        model = model_class(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [called(name) for name in expected if name not in state]
    unexpected = [called(name) for name in state if name not in expected]
    shapes = {
        called(name): (expected[name], tuple(value.shape))
        for name, value in state.items()
        if name in expected and expected[name] != tuple(value.shape)
    }
    if missing or unexpected or shapes:
        raise CheckpointMismatch(source, missing, unexpected, shapes)
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, Position):
            module.reset_buffers()
    model.load_state_dict(state)
    return model
