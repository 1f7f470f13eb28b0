"""What reading foreign weights found out: reported, never guessed silently."""

import dataclasses
from dataclasses import dataclass, field

import torch


@dataclass
class LoadReport:
    """What a file or folder was recognised as, and where each choice of the model came from.

    ``model.load_report`` of every model that ``stmae.checkpoint.load`` returns; ``str()`` gives it as text.

    Attributes:
        format: for instance ``mae_st``, ``slowfast``, ``videomae``, ``huggingface-videomae``, ``image-mae``, ``stmae``.
        path: what was read.
        inferred: configuration field -> what in the file says so.
        assumed: configuration field -> why; weights do not determine these, so pass them to ``load`` where they differ.
        unused: tensors of the file that the model has no use for, each with the reason.
        new: parameters of the model that the file does not fill, each with the reason; only of ``initialize``.
        notes: what to check, for instance weights that are all zero or not finite.
    """

    format: str
    path: str = ""
    inferred: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path or 'weights'}: recognised as {self.format}"]
        lines += [f"  inferred {name}: {reason}" for name, reason in self.inferred.items()]
        lines += [f"  assumed {name}: {reason}" for name, reason in self.assumed.items()]
        lines += [f"  unused {name}: {reason}" for name, reason in self.unused.items()]
        lines += [f"  new {name}: {reason}" for name, reason in self.new.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def check_values(self, weights: dict[str, torch.Tensor], *, vectors: bool = True) -> None:
        """Adds notes of tensors that no training leaves behind: with values that are not finite, or all zero.

        Args:
            vectors: zeros of biases and tokens, too; false: of matrices alone, where the model may be a new one.
        """
        zeros = []
        for name, value in weights.items():
            if value.numel() == 0 or value.device.type == "meta":
                continue
            if not torch.isfinite(value).all():
                self.notes.append(f"{name} holds values that are not finite")
            elif not value.any() and (vectors or (value.dim() > 1 and value.shape[0] > 1)):
                zeros.append(name)
        if len(zeros) > 3:  # of a model that was never trained: hundreds
            self.notes.append(f"{zeros[0]} and {len(zeros) - 1} further tensors are all zeros, which trained weights are not")
        else:
            self.notes += [f"{name} is all zeros, which trained weights are not" for name in zeros]
