"""Which implementation of attention is taken, and that each adapter hands over what its package's signature calls for."""

import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stmae import reference
from stmae.kernels import attention_backends as backends

ROOT = Path(__file__).parents[2]

# Stand-ins with the packages' own signatures, copied from what is published, that compute the right answer. Sources:
# flash-attn 2.8.3, flash_attn/flash_attn_interface.py; xformers 0.0.35, xformers/ops/fmha/__init__.py (without annotations).
# They hold to what these packages' own checks ask for: [batch, length, heads, head dim], dense in the head dim.


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0.0, False, (-1, -1), 0.0, None)
    assert not return_attn_probs  # would give a tuple
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return _attention(q, k, v, softmax_scale)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert (attn_bias, p, op, output_dtype) == (None, 0.0, None, None)
    return _attention(query, key, value, scale)


def _attention(q, k, v, scale):
    assert q.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape, "not [B, N, H, D]"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dtype == k.dtype == v.dtype
    return reference.attention(q, k, v, scale=scale)


@pytest.fixture
def packages(monkeypatch):
    """flash_attn and xformers, as far as their signatures go."""
    flash, top, ops = (types.ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops"))
    flash.flash_attn_func = flash_attn_func
    top.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    for module in (flash, top, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in backends.INSTALLED:
        monkeypatch.setitem(backends.INSTALLED, name, True)
    monkeypatch.setattr(backends.support, "TRITON_PROBLEM", None)


@pytest.fixture
def no_packages(monkeypatch):
    for name in backends.INSTALLED:
        monkeypatch.setitem(backends.INSTALLED, name, False)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("impl", backends.ADAPTERS)
def test_adapter_gives_what_the_reference_does(packages, impl, deterministic, monkeypatch):
    """q, k and v differ in length, content and strides: none can be taken for another, nor a dimension for its neighbour."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 3, 8), torch.randn(2, 11, 3, 2, 8).select(3, 1), torch.randn(2, 3, 11, 8).transpose(1, 2)
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    out = backends.ADAPTERS[impl](q, k, v, 0.3)
    expected = reference.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert out.shape == q.shape
    grad = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "module, recorded", [("flash_attn", flash_attn_func), ("xformers.ops", memory_efficient_attention)], ids=["flash", "xformers"]
)
def test_installed_package_has_the_recorded_signature(module, recorded):
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module} is not installed: its adapter ran against the signature recorded from its source")
    function = getattr(importlib.import_module(module), recorded.__name__)

    def parameters(of):
        return {x.name: (x.kind, x.default) for x in inspect.signature(of).parameters.values()}

    # What was recorded, in this order; a later version may have more behind, as long as it has a default.
    real, known = parameters(function), parameters(recorded)
    assert {name: real.get(name) for name in known} == known
    positional = [name for name, (kind, _) in known.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(real)[: len(positional)] == positional
    assert all(default is not inspect.Parameter.empty for name, (_, default) in real.items() if name not in known)


def test_auto_prefers_the_projects_own_kernels(packages):
    impl, reason = backends.choose("auto", device_type="cuda", dtype=torch.bfloat16)
    assert impl == "triton" and reason
    assert backends.choose("auto", device_type="cpu") == ("sdpa", "triton needs CUDA tensors, got cpu")


@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_missing_package_is_named(no_packages, impl):
    with pytest.raises(ValueError, match=f"attention: impl='{impl}' cannot be used: {impl} is not installed"):
        backends.choose(impl)


def test_what_cannot_serve_is_refused(packages):
    assert backends.choose("flash_attn", dtype=torch.float16) == ("flash_attn", "asked for")
    assert backends.choose("xformers", dtype=torch.float32) == ("xformers", "asked for")
    with pytest.raises(ValueError, match="flash_attn takes float16 and bfloat16, got float32"):
        backends.choose("flash_attn", dtype=torch.float32)
    with pytest.raises(ValueError, match="triton needs CUDA tensors, got cpu"):
        backends.choose("triton", device_type="cpu")
    with pytest.raises(ValueError, match="expected impl one of auto, triton, sdpa, flash_attn, xformers, got 'flash'"):
        backends.choose("flash")


def test_nothing_is_imported_before_it_is_used():
    code = (
        "import sys, stmae.kernels.attention_backends as b; b.choose('auto');"
        "print({'triton', 'flash_attn', 'xformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"
