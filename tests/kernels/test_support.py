"""Where the Triton kernels cannot run, one line says why, and attention goes to SDPA."""

import importlib.metadata
import re
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stmae import ops
from stmae.kernels import attention_backends, support


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts a GPU of a name and compute capability here, as far as torch.cuda's properties of it go."""

    def install(name, major, minor):
        properties = types.SimpleNamespace(name=name, major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: properties)
        monkeypatch.setattr(torch.version, "hip", None)

    return install


@pytest.mark.parametrize(
    "installed, problem",
    [
        ({}, "triton is not installed (pip install 'triton>=3.6')"),
        ({"triton": "3.5.1"}, "triton 3.5.1 is too old (pip install 'triton>=3.6')"),
        ({"pytorch-triton-rocm": "3.4.0"}, "triton 3.4.0 is too old (pip install 'triton>=3.6')"),
        ({"triton": "3.6.0"}, None),
        ({"pytorch-triton": "3.10.0+git1a2b3c"}, None),
        ({"a checkout": ""}, None),  # of Triton on the path: only its import can show it
    ],
    ids=str,
)
def test_triton_is_looked_for(installed, problem, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(support, "is_installed", lambda name: bool(installed))
    assert support._triton_problem() == problem


def test_a_module_without_a_spec_is_not_an_installed_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert not support.is_installed("flash_attn")
    assert not support.is_installed("no_such_package") and support.is_installed("torch")


@pytest.mark.parametrize("capability, supported", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)], ids=str)
def test_an_old_gpu_gets_sdpa(gpu, capability, supported, monkeypatch):
    monkeypatch.setattr(support, "TRITON_PROBLEM", None)
    gpu("NVIDIA T4", *capability)
    problem = None if supported else f"NVIDIA T4 has compute capability {capability[0]}.{capability[1]}, and 8.0 is needed"
    assert support.gpu_problem(0) == problem
    chosen, reason = attention_backends.choose("auto", dtype=torch.bfloat16)
    assert chosen == ("triton" if supported else "sdpa")
    if not supported:
        assert reason == problem
        with pytest.raises(ValueError, match=re.escape(f"attention: impl='triton' cannot be used: {problem}")):
            attention_backends.choose("triton")


def test_amds_gpus_have_no_compute_capability_to_check(gpu, monkeypatch):
    monkeypatch.setattr(support, "TRITON_PROBLEM", None)
    gpu("AMD Instinct MI100", 7, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert support.gpu_problem(0) is None


@pytest.mark.parametrize("triton", ["triton is not installed", None])
def test_attention_takes_sdpa_on_fake_cuda_tensors(triton, gpu, monkeypatch):
    monkeypatch.setattr(support, "TRITON_PROBLEM", triton)
    called = []
    sdpa = attention_backends.ADAPTERS["sdpa"]
    monkeypatch.setitem(attention_backends.ADAPTERS, "sdpa", lambda *arguments: called.append(1) or sdpa(*arguments))
    with FakeTensorMode():
        qkv = torch.empty(1, 5, 3, 2, 16, device="cuda", dtype=torch.float16)
        gpu("NVIDIA T4", 7, 5)
        ops.attention_qkvpacked(qkv)
        ops.attention(*qkv.unbind(2))
    assert len(called) == 2


def test_the_other_ops_say_why_in_one_line(monkeypatch):
    monkeypatch.setattr(support, "TRITON_PROBLEM", "triton 3.5.1 is too old (pip install 'triton>=3.6')")
    expected = "gather_tokens: the GPU kernels cannot run: triton 3.5.1 is too old (pip install 'triton>=3.6'); "
    expected += "stmae.reference and model.backend = 'reference' can"
    entry = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # that a CUDA tensor comes to
    with pytest.raises(RuntimeError) as error:
        torch.ops.stmae.gather_tokens.default.redispatch(entry, torch.zeros(1, 3, 8), torch.zeros(1, 1, dtype=torch.int64))
    assert str(error.value) == expected


def test_ids_cannot_be_checked_in_a_capture(gpu, monkeypatch):
    class Captured(torch.Tensor):
        device = torch.device("cuda")

    gpu("NVIDIA H100", 9, 0)
    monkeypatch.setattr(ops.checks, "DEBUG", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ids = torch.tensor([[0, 1]]).as_subclass(Captured)
    with pytest.raises(
        RuntimeError, match="the values of ids cannot be checked while a CUDA graph is captured; unset STMAE_DEBUG"
    ):
        ops.checks.ids("gather_tokens", "ids", ids, 1, 4)
