"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: the matrix products that they compute, as it counts those of
`stmae.reference`. A multiplication with its addition counts two; what the attention's backward computes a second time is not
counted, nor is what is no product.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable

import torch


def _linear(x, weight, *_, **__):
    return 2 * x[0] * weight[0] * weight[1]


def _linear_backward(grad_out, x, weight, bias, weight_dtype, output_mask, **_):
    return (output_mask[0] + output_mask[1]) * _linear(x, weight)


def _mlp(x, fc1_weight, fc1_bias, fc2_weight, *_, **__):
    return _linear(x, fc1_weight) + _linear(x, fc2_weight)


def _mlp_backward(
    grad_out, x, hidden, activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_dtype, fc2_dtype, output_mask, **_
):
    needs_x, needs_fc1, needs_fc1_bias, needs_fc2, _ = output_mask
    first = (needs_x + needs_fc1) * _linear(x, fc1_weight)
    return first + ((needs_x or needs_fc1 or needs_fc1_bias) + needs_fc2) * _linear(x, fc2_weight)


def _attention(q, k, *_, **__):
    batch, queries, heads, head_dim = q
    return 4 * batch * queries * k[1] * heads * head_dim


def _attention_backward(grad_out, q, k, *_, **__):
    return 2 * _attention(q, k)


def _attention_qkvpacked(qkv, *_, **__):
    batch, tokens, _, heads, head_dim = qkv
    return 4 * batch * tokens * tokens * heads * head_dim


def _attention_qkvpacked_backward(grad_out, qkv, *_, **__):
    return 2 * _attention_qkvpacked(qkv)


def _pairs(queries, cu_seqlens_q, keys, cu_seqlens_k):
    """How many (query, key) pairs there are; of offsets without values, as many as with sequences of one length."""
    from torch._subclasses.fake_tensor import FakeTensor

    if any(x.device.type == "meta" or isinstance(x, FakeTensor) for x in (cu_seqlens_q, cu_seqlens_k)):
        return queries * keys // max(1, cu_seqlens_q.shape[0] - 1)
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, **__):
    return 4 * _pairs(q.shape[0], cu_seqlens_q, k.shape[0], cu_seqlens_k) * q.shape[1] * q.shape[2]


def _attention_varlen_backward(grad_out, q, k, v, out, lse, *rest, **__):
    return 2 * _attention_varlen(q, k, v, *rest)


def _attention_varlen_qkvpacked(qkv, cu_seqlens, *_, **__):
    q, k, v = qkv.unbind(1)
    return _attention_varlen(q, k, v, cu_seqlens, cu_seqlens)


def _attention_varlen_qkvpacked_backward(grad_out, qkv, out, lse, cu_seqlens, *_, **__):
    return 2 * _attention_varlen_qkvpacked(qkv, cu_seqlens)


def _masked_patchify(video, keep, weight, *_, **__):
    return 2 * math.prod(keep) * math.prod(weight)


def _masked_patchify_backward(grad_out, video, keep, weight, *_, **__):
    return _masked_patchify(video, keep, weight)


def _masked_patchify_varlen(videos, keep, cu_seqlens, weight, *_, **__):
    return _masked_patchify(videos, keep, weight)


def _masked_patchify_varlen_backward(grad_out, videos, keep, cu_seqlens, weight, *_, **__):
    return _masked_patchify(videos, keep, weight)


FORMULAS = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "mlp": _mlp,
    "mlp_backward": _mlp_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_qkvpacked": _attention_qkvpacked,
    "attention_qkvpacked_backward": _attention_qkvpacked_backward,
    "masked_patchify": _masked_patchify,
    "masked_patchify_backward": _masked_patchify_backward,
    "masked_patchify_varlen": _masked_patchify_varlen,
    "masked_patchify_varlen_backward": _masked_patchify_varlen_backward,
}


# Of ops whose work the values of offsets decide: called with the tensors, not with their shapes.
RAW_FORMULAS = {
    "attention_varlen": _attention_varlen,
    "attention_varlen_backward": _attention_varlen_backward,
    "attention_varlen_qkvpacked": _attention_varlen_qkvpacked,
    "attention_varlen_qkvpacked_backward": _attention_varlen_qkvpacked_backward,
}


def _register():
    from torch.utils.flop_counter import register_flop_formula

    for formulas, get_raw in ((FORMULAS, False), (RAW_FORMULAS, True)):
        for name, formula in formulas.items():
            register: Callable = register_flop_formula(getattr(torch.ops.stmae, name), get_raw=get_raw)
            register(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``action`` when the module ``name`` has been imported, and is then gone."""

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = None if spec is None else spec.loader
        if loader is None:  # a torch without the counter
            return spec
        execute = loader.exec_module

        def execute_and_act(module):
            execute(module)
            self.action()

        vars(loader)["exec_module"] = execute_and_act  # of this loader alone
        return spec


def register():
    """Registers the formulas: now if the counter is there, else when it is imported, for it imports Triton, which takes time."""
    if "torch.utils.flop_counter" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport("torch.utils.flop_counter", _register))
