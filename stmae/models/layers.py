"""How the models run their layers.

Every layer is an ordinary module (``nn.Linear``, ``nn.LayerNorm``, ``nn.GELU``) and runs through its own ``__call__``, so that
hooks fire and adapters, parametrizations, pruning, quantization and replaced layers count. Where a layer is *plain*, calling it
can have no other effect than its mathematics, and an op computes that, of several layers at once where there is such an op.

Under torch.compile, torch's own rule holds for hooks: those registered before compilation count.
"""

from types import ModuleType
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _nn_module

from stmae import ops, reference

_BACKENDS: dict[str, ModuleType] = {"ops": ops, "reference": reference}
_Module = TypeVar("_Module", bound=nn.Module)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


class BackendModule(nn.Module):
    """A module that runs on the ops of one of two backends, and so do those in it."""

    _backend = "ops"

    @property
    def backend(self) -> str:
        """``ops``: the kernels; ``reference``: the same weights on plain PyTorch (``stmae.reference``)."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in _BACKENDS:
            choices = ", ".join(_BACKENDS)
            raise ValueError(f"{type(self).__name__}: expected backend to be one of {choices}, got {name!r}")
        for module in self.modules():
            if isinstance(module, BackendModule):
                module._backend = name

    @property
    def _ops(self) -> ModuleType:
        # Looked up by name, because a module object held by the model could be neither copied nor pickled.
        return _BACKENDS[self._backend]


class QKVLinear(nn.Linear):
    """The fused projection to q, k and v of which q and v have biases and k has none, as in VideoMAE."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def qkv_bias(self) -> torch.Tensor:
        """[3 D]: the biases of q and v, zeros between them."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., 3 D]."""
        return F.linear(input, self.weight, self.qkv_bias())


class LayerScale(nn.Module):
    """A learned factor ``gamma`` [D] for each channel of a branch (Touvron et al. 2021)."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] * gamma, in the dtype of x."""
        return x * self.gamma.to(x.dtype)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling ``module`` does what ``kind.forward`` does and nothing else: it is of that very class (parametrizations
    and FSDP make another), has no hooks, no forward or compiled call of its own, and no module has global hooks."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not (_nn_module._global_forward_hooks or _nn_module._global_forward_pre_hooks)
        and not (_nn_module._global_backward_hooks or _nn_module._global_backward_pre_hooks)
    )


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether an op may compute this ``nn.Linear``: its parameters are no subclasses of tensors either (quantized, DTensor)."""
    return is_plain(layer, nn.Linear) and type(layer.weight) in _PLAIN_TENSORS and _is_plain_or_none(layer.bias)


def linear(layer: nn.Module, x: torch.Tensor, ops: ModuleType) -> torch.Tensor:
    """layer(x), for x [..., K]."""
    if is_plain_linear(layer):
        return ops.linear(x, layer.weight, layer.bias)
    if is_plain(layer, QKVLinear) and type(layer.weight) in _PLAIN_TENSORS and type(layer.q_bias) in _PLAIN_TENSORS:
        return ops.linear(x, layer.weight, layer.qkv_bias())
    return layer(x)


def add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor | None, norm: nn.Module, ops: ModuleType
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, norm(x + branch)), for x and branch [..., D]; without a branch (x, norm(x))."""
    if (
        is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == x.shape[-1:]
        and type(norm.weight) in _PLAIN_TENSORS
        and type(norm.bias) in _PLAIN_TENSORS
    ):
        return ops.add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)
    x = add(x, branch)
    return x, norm(x)


def mlp(fc1: nn.Module, act: nn.Module, fc2: nn.Module, x: torch.Tensor, ops: ModuleType) -> torch.Tensor:
    """fc2(act(fc1(x))), for x [..., D]."""
    if (
        is_plain(act, nn.GELU)
        and act.approximate == "none"
        and is_plain_linear(fc1)
        and is_plain_linear(fc2)
        and fc1.bias is not None
        and fc2.bias is not None
    ):
        return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return linear(fc2, act(linear(fc1, x, ops)), ops)


def add(x: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
    """x + branch in the dtype of x."""
    return x if branch is None else x + branch.to(x.dtype)


def _is_plain_or_none(parameter: torch.Tensor | None) -> bool:
    return parameter is None or type(parameter) in _PLAIN_TENSORS
