"""What a run remembers: counters and results (``TrainState``), and its tensors by name.

The order of the videos, crops and masks follow from the seed and the step, so no random state is among it.
"""

import dataclasses
from dataclasses import dataclass

from . import fsdp


@dataclass
class TrainState:
    """Where a run is. A checkpoint holds it as plain values, under these names."""

    step: int = 0
    """steps done"""
    videos: int = 0
    """in the data set"""
    skipped_steps: int = 0
    """steps without a finite loss and gradient"""
    skips_in_a_row: int = 0
    """of these, the last ones without a step between them"""
    before: dict | None = None
    """what the evaluation hooks gave before the first step"""
    after: dict | None = None
    """what they gave after the last step"""
    done: bool = False
    """whether the run came to its end"""

    def to_dict(self):
        return dataclasses.asdict(self)

    def load_dict(self, values):
        """Takes the values that a checkpoint holds; of an older version's, those that there are."""
        names = {field.name for field in dataclasses.fields(self)}
        for name, value in values.items():
            if name in names:
                setattr(self, name, value)


def state_tensors(model, optimizer, average):
    """The tensors to continue from, by name: ``model.NAME``, ``optimizer.KEY.NAME`` and ``average.NAME``. Sharded tensors stay
    where they are, the others come on the CPU."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors.update({f"average.{name}": value for name, value in average.items()})
    for name, parameter in model.named_parameters():
        tensors.update({f"optimizer.{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()})
    return {
        name: value.detach() if isinstance(value, fsdp.DTensor) else value.detach().cpu().contiguous()
        for name, value in tensors.items()
    }


def owner_in(model):
    """name in ``state_tensors`` -> the weight of ``model`` that the tensor of this name is, or is a moment of; None: none."""
    weights = model.state_dict()
    return lambda name: weights.get(name.split(".", 2 if name.startswith("optimizer.") else 1)[-1])


def load_state_tensors(tensors, model, optimizer, average):
    """Puts the tensors of ``state_tensors`` back, sharded as the model is now."""
    owner = owner_in(model)

    def placed(name, value):
        own = owner(name)
        if own is None:
            return value  # load_state_dict says what is wrong with it
        return fsdp.distribute_as(value, own) if own.shape == value.shape else value.to(own.device)

    tensors = {name: placed(name, value) for name, value in tensors.items()}
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("average."):
            average[name.removeprefix("average.")].copy_(value)
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            optimizer.state[parameters[parameter]][key] = value
