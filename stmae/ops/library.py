"""How an op is registered: its schema here in Python, its CPU kernels by loading stmae._C, its CUDA kernels on first use."""

import importlib

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


def define(name, schema, *, fake, stem=None, cpu=None):
    """Define `stmae::name` with its shape function.

    stem: a CUDA tensor is the first to import stmae.kernels.<stem> (and triton), and calls its function `name`.
    cpu: the CPU kernel where it is Python; by default stmae._C has it.
    """
    torch.library.define(f"stmae::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"stmae::{name}")(fake)
    if stem is not None:

        def launch(*arguments):
            support = importlib.import_module("stmae.kernels.support")
            support.require(name, next(x for x in arguments if isinstance(x, torch.Tensor)))
            return getattr(importlib.import_module(f"stmae.kernels.{stem}"), name)(*arguments)

        torch.library.impl(f"stmae::{name}", "CUDA")(launch)
    if cpu is not None:
        torch.library.impl(f"stmae::{name}", "CPU")(cpu)
    return getattr(torch.ops.stmae, name).default


def differentiable(op, backward, setup_context):
    torch.library.register_autograd(op, backward, setup_context=setup_context)


def not_twice_differentiable(backward_op):
    """Registers a backward op's own gradient as an error that says so, rather than a silent zero."""
    name = backward_op._schema.name.replace("stmae::", "").replace("_backward", "")

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not supported; use stmae.reference.{name} for second derivatives")

    torch.library.register_autograd(backward_op, refuse)
