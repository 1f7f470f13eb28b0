"""What a run remembers: counters and results (``TrainState``), and its tensors by name.

The order of the videos, crops and masks follow from the seed and the step, so no random state is among it.
"""

import dataclasses
from dataclasses import dataclass

from ..config.wording import counted
from . import fsdp


@dataclass
class TrainState:
    """Where a run is. A checkpoint holds it as plain values, under these names."""

    step: int = 0
    """steps done"""
    videos: int = 0
    """in the data set"""
    steps: int = 0
    """of the run; 0: unknown, of an older version"""
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

    def problem_of(self, values):
        """Why ``values``, which a checkpoint holds, cannot be those of a run, or None. An older version's may be fewer."""
        for field in dataclasses.fields(self):
            value = values.get(field.name, field.default)
            expected = (dict, type(None)) if field.default is None else (type(field.default),)
            if type(value) not in expected:
                return f"its {field.name} is {value!r}"
        if not 0 <= values["step"] <= (values.get("steps") or values["step"]):
            return f"its step {values['step']} is beyond the end, {values['steps']}"
        return None

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


def tensors_problem(tensors, model, average, updates):
    """Why the tensors of ``state_tensors`` are not those of ``model`` after ``updates`` updates of AdamW, or None."""
    weights = model.state_dict()
    shapes = {f"model.{name}": value.shape for name, value in weights.items()}
    shapes.update({f"average.{name}": weights[name].shape for name in average})
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        return f"it lacks {missing[0]}" + (f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else "")
    moments = {key: set() for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, parameter = rest.partition(".")
            if key not in moments or parameter not in weights:
                return f"{name} belongs to no parameter"
            moments[key].add(parameter)
            shapes[name] = weights[parameter].shape if key != "step" else value.shape
        if name not in shapes or value.shape != shapes[name]:
            return f"{name} has the shape {list(value.shape)}, not {list(shapes[name]) if name in shapes else 'that of a weight'}"
    if len({frozenset(parameters) for parameters in moments.values()}) > 1 or (updates > 0 and not moments["step"]):
        return "it lacks tensors of the optimizer"
    return None


def load_state_tensors(tensors, model, optimizer, average):
    """Puts the tensors of ``state_tensors`` back, sharded as the model is now."""
    owner = owner_in(model)

    def placed(name, value):
        own = owner(name)
        if own is None:
            return value  # load_state_dict reports what is wrong with it
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
