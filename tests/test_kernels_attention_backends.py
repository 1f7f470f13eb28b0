"""Which implementation of attention is taken, and that each adapter hands over what its package's signature calls for."""

import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from stmae.kernels import attention_backends as backends

from stmae import reference

ROOT = Path(__file__).parents[1]

# As published by the packages (flash-attn 2.8, xformers 0.0.33): what the adapters were written against.


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
    assert dropout_p == 0.0 and not causal and not return_attn_probs
    return _attention(q, k, v, softmax_scale)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert attn_bias is None and p == 0.0 and op is None and output_dtype is None
    return _attention(query, key, value, scale)


def _attention(q, k, v, scale):
    assert q.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape, "not [B, N, H, D]"
    return reference.attention(q, k, v, scale=scale)


@pytest.fixture
def packages(monkeypatch):
    """flash_attn and xformers, as far as their signatures go."""
    flash, top, ops = (types.ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops"))
    flash.flash_attn_func = flash_attn_func
    top.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    for module in (flash, top, ops):
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def no_packages(monkeypatch):
    find = importlib.util.find_spec
    missing = ("flash_attn", "xformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))


@pytest.mark.parametrize("impl", backends.ADAPTERS)
def test_adapter_gives_what_the_reference_does(packages, impl):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 3, 8), torch.randn(2, 11, 3, 8), torch.randn(2, 11, 3, 8)
    out = backends.ADAPTERS[impl](q, k, v, 0.3)
    torch.testing.assert_close(out, reference.attention(q, k, v, scale=0.3), rtol=1e-5, atol=1e-6)
    assert out.shape == q.shape


@pytest.mark.parametrize("impl, name, recorded", [("flash_attn", "flash_attn_func", flash_attn_func), ("xformers", "ops", None)])
def test_installed_package_has_the_recorded_signature(impl, name, recorded):
    """Where the real package is installed, what is recorded above still holds; where not, the record itself is checked."""
    if importlib.util.find_spec(impl) is not None:
        module = importlib.import_module(f"{impl}.ops" if impl == "xformers" else impl)
        function = getattr(module, "memory_efficient_attention" if impl == "xformers" else name)
    else:
        function = recorded or memory_efficient_attention
    parameters = list(inspect.signature(function).parameters)
    if impl == "flash_attn":
        assert parameters[:3] == ["q", "k", "v"] and "softmax_scale" in parameters
    else:
        assert parameters[:3] == ["query", "key", "value"] and "scale" in parameters


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
