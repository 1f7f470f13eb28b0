"""How an op is registered: its schema here in Python, its CPU kernels by loading stmae._C, its CUDA kernels on first use."""

import functools
import importlib
from typing import Any

import torch

try:
    from stmae import _C
except ImportError as error:
    raise ImportError(
        f"stmae: the compiled kernels (stmae._C) do not load: {error}. Build them, in a checkout, with: pip install -e ."
    ) from error

cpu_capability = _C.cpu_capability
best_cpu_capability = _C.best_cpu_capability
set_cpu_capability = _C.set_cpu_capability


def define(name, schema, *, fake, kernels=None, cpu=None):
    """Define `stmae::name` with its shape function.

    kernels: a CUDA tensor is the first to import stmae.kernels.<kernels> (and triton), and calls its function `name`.
    cpu: the CPU kernel where it is Python; by default stmae._C has it.
    """
    torch.library.define(f"stmae::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"stmae::{name}")(fake)
    if kernels is not None:

        def launch(*arguments):
            support = importlib.import_module("stmae.kernels.support")
            support.require(name, next(x for x in arguments if isinstance(x, torch.Tensor)))
            return getattr(importlib.import_module(f"stmae.kernels.{kernels}"), name)(*arguments)

        torch.library.impl(f"stmae::{name}", "CUDA")(launch)
    if cpu is not None:
        torch.library.impl(f"stmae::{name}", "CPU")(cpu)
    return getattr(torch.ops.stmae, name).default


def differentiable(op, backward, setup_context, *, public=None):
    """Registers the gradient of ``op`` and returns the function to call it by.

    public: the function of stmae.ops that an internal op belongs to, for error messages.
    backward, setup_context: as those of torch.autograd.Function. Under torch.func's grad and vmap the function is an
    autograd.Function, which these see through (an op of the dispatcher they do not); a batch of calls is made one by one.
    """
    name = _name(op)
    public = public or name.removesuffix("_backward")
    gradient = {"backward": staticmethod(backward), "jvp": staticmethod(functools.partial(_refuse_forward_mode, public))}
    function: Any = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            **gradient,
            "forward": staticmethod(functools.partial(_below_autograd, op)),
            "setup_context": staticmethod(setup_context),
            "vmap": staticmethod(lambda info, in_dims, *arguments: _one_by_one(call, info, in_dims, arguments)),
        },
    )

    def forward(ctx, *arguments):
        output = _below_autograd(op, *arguments)
        setup_context(ctx, arguments, output)
        return output

    # Without torch.func: a function with a setup_context has its signature inspected at each call, which takes 20 us.
    plain: Any = type(f"{name}_autograd", (torch.autograd.Function,), {**gradient, "forward": staticmethod(forward)})

    def autograd(*arguments):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.ops.stmae.{name}: torch.func does not see through it; call stmae.ops.{public} or stmae.reference.{public}"
            )
        return plain.apply(*arguments)

    torch.library.impl(f"stmae::{name}", "Autograd")(autograd)

    def call(*arguments):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return op(*arguments)

    return call


def not_twice_differentiable(backward_op):
    """Registers a backward op's own gradient as an error, rather than a silent zero; as ``differentiable``."""
    name = _name(backward_op).removesuffix("_backward")

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not supported; use stmae.reference.{name} for second derivatives")

    return differentiable(backward_op, refuse, lambda ctx, inputs, output: None)


def _name(op):
    return op._schema.name.removeprefix("stmae::")


def _below_autograd(op, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _refuse_forward_mode(name, ctx, *tangents):
    raise RuntimeError(
        f"{name}: forward mode (torch.func.jvp, torch.autograd.forward_ad) is not supported; use stmae.reference.{name}, or, in "
        "a model, backend = 'reference'"
    )


def _one_by_one(call, info, in_dims, arguments):
    """The vmap rule of every op: ``call`` for each element of the batch. Returns (stacked results, their batch dimensions)."""

    def element(argument, dim, index):
        return argument.select(dim, index).contiguous() if isinstance(argument, torch.Tensor) and dim is not None else argument

    results = [
        call(*(element(argument, dim, index) for argument, dim in zip(arguments, in_dims))) for index in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(result) for result in zip(*results)), (0,) * len(results[0])
