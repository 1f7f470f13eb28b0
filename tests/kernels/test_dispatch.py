"""What can be reached of the CUDA path without a GPU: registration, shapes on fake CUDA tensors, and launchers on meta tensors.

suite.py goes through the same dispatcher entries with real data.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from stmae import ops
from stmae.kernels import support
from stmae.ops import checks

needs_triton = pytest.mark.skipif(support.TRITON_PROBLEM is not None, reason=f"launchers need it: {support.TRITON_PROBLEM}")

ALL_OPS = [
    "random_masking",
    "masked_patchify",
    "masked_patchify_backward",
    "restore_tokens",
    "restore_tokens_backward",
    "gather_tokens",
    "gather_tokens_backward",
    "attention",
    "attention_backward",
    "attention_qkvpacked",
    "attention_qkvpacked_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_qkvpacked",
    "attention_varlen_qkvpacked_backward",
    "masked_patchify_varlen",
    "masked_patchify_varlen_backward",
    "patch_loss_varlen",
    "patch_loss_varlen_backward",
    "random_masking_varlen",
    "patch_loss",
    "patch_loss_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "_layer_norm",
    "linear",
    "linear_backward",
    "mlp",
    "mlp_backward",
]


@needs_triton
@pytest.mark.parametrize("op", ALL_OPS)
def test_registered_for_cuda_with_the_launchers_signature(op):
    import importlib
    import inspect

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"stmae::{op}", "CUDA")
    schema = getattr(torch.ops.stmae, op).default._schema
    module = "add_layer_norm" if op == "_layer_norm" else op.removesuffix("_backward")
    if module != "masked_patchify_varlen":  # the others' kernels are those without
        module = re.sub("(_varlen|_qkvpacked)+$", "", module)
    launcher = getattr(importlib.import_module(f"stmae.kernels.{module}"), op)
    assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_public_ops_on_tensors_that_hold_nothing(device):
    """Checks and shape functions as torch.compile runs them, on fake CUDA tensors; with autograd, forward and backward, on fake
    CPU tensors (a torch without CUDA cannot record a gradient on its device)."""
    requires_grad = device == "cpu"
    with FakeTensorMode():

        def new(*shape, dtype=torch.bfloat16):
            x = torch.empty(*shape, dtype=dtype, device=device)
            return x.requires_grad_(requires_grad) if dtype.is_floating_point else x

        video = new(2, 8, 32, 32, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        keep, masked = ops.random_masking(torch.empty(2, 16, device=device), 3)
        parameters = new(64, 3, 2, 16, 16), new(64), new(16, 64, dtype=torch.float32)
        tokens = ops.masked_patchify(video, keep, *parameters)
        x = ops.attention_qkvpacked(new(2, 3, 3, 2, 32))
        restored = ops.restore_tokens(x.flatten(2), keep, new(64), new(16, 64))
        pred = ops.gather_tokens(restored, masked)
        loss = ops.patch_loss(new(2, 13, 768), video, masked, patch_size=(1, 16, 16), frames=[0, 2, 4, 7])
        y = ops.attention(*(new(2, 5, 2, 80) for _ in range(3)))
        layer = new(96, 64, dtype=torch.float32), new(96, dtype=torch.float32), new(64, 96, dtype=torch.float32), new(64)
        total, out = ops.add_layer_norm(ops.add_layer_norm(tokens, None, new(64), new(64))[0], new(2, 3, 64), new(64), new(64))
        hidden, out = ops.linear(out, *layer[:2]), ops.mlp(out, *layer)
        results = (keep, masked, tokens, x, restored, pred, loss, y)
        shapes = [tuple(z.shape) for z in results]
        assert shapes == [(2, 3), (2, 13), (2, 3, 64), (2, 3, 2, 32), (2, 16, 64), (2, 13, 64), (), (2, 5, 2, 80)]
        assert tokens.dtype == torch.float32 and loss.dtype == torch.float32
        assert total.dtype == out.dtype == torch.float32 and (hidden.shape, out.shape) == ((2, 3, 96), (2, 3, 64))
        assert all(z.device.type == device for z in (*results, total, hidden, out))
        if requires_grad:
            (tokens.sum() + pred.float().sum() + loss + y.float().sum() + hidden.sum() + out.sum()).backward()
            assert all(z.grad.shape == z.shape and z.grad.dtype == z.dtype for z in (*parameters, *layer))


@pytest.mark.skipif(support.TRITON_PROBLEM is not None, reason=f"the layers are torch's own: {support.TRITON_PROBLEM}")
def test_compiled_for_a_gpu_in_one_graph():
    """torch.compile traces the public ops on (fake) CUDA tensors without a break, and keeps each as the one node it is."""
    graphs = []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(video, noise, weight, mask_token, position, qkv, q, k, v, pred, square, sequences):
        keep, masked = ops.random_masking(noise, 3)
        x = ops.masked_patchify(video, keep, weight, None, position)
        x = ops.restore_tokens(x, keep, mask_token, position)
        x = ops.gather_tokens(x, masked)
        loss = ops.patch_loss(pred, video, masked, patch_size=(1, 16, 16), frames=[0, 2, 4, 7])
        x, normal = ops.add_layer_norm(x, None, mask_token, mask_token)
        normal = ops.mlp(ops.linear(normal, square), square, mask_token, square, mask_token)
        videos, cu, row, packed, one, one_pred = sequences
        loss += ops.attention_varlen_qkvpacked(packed, cu).sum() + ops.attention_varlen(one, one, one, cu).sum()
        own, rest = ops.random_masking_varlen(row, cu, [3])
        loss += ops.masked_patchify_varlen(videos, own, cu, weight, None, None).sum()
        loss += ops.patch_loss_varlen(one_pred, videos, rest, cu, patch_size=(1, 16, 16), frames=[[0, 2, 4, 7]])
        layer = ops.add_layer_norm(x, normal, mask_token, mask_token)[1]
        return layer, loss, ops.attention_qkvpacked(qkv), ops.attention(q, k, v)

    with FakeTensorMode(), torch.no_grad():
        new = functools.partial(torch.empty, device="cuda")
        video = new(2, 8, 32, 32, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        parameters = new(64, 3, 2, 16, 16), new(64), new(16, 64)
        projections = new(2, 3, 3, 2, 32), *(new(2, 3, 2, 32) for _ in range(3))
        compiled = torch.compile(step, backend=keep_graph, fullgraph=True)
        clips = [new(3, 8, 32, 32, dtype=torch.uint8)]
        sequences = clips, new(2, dtype=torch.int64), new(16), new(6, 3, 2, 32), new(6, 2, 32), new(13, 768)
        results = compiled(video, new(2, 16), *parameters, *projections, new(2, 13, 768), new(64, 64), sequences)
    assert all(x.device.type == "cuda" for x in results)
    assert [tuple(x.shape) for x in results] == [(2, 13, 64), (), (2, 3, 2, 32), (2, 3, 2, 32)]
    (graph,) = graphs
    called = [str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("stmae.")]
    forward = [op for op in ALL_OPS if "backward" not in op]
    assert sorted(called) == sorted(forward)


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, where ids are not looked at but in debugging."""

    device = torch.device("cuda")


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("ids", [[[0, 3], [2, 1]], [[0, 4], [2, 1]], [[0, 1], [-1, 1]], [[1, 3], [2, 2]]], ids=str)
def test_ids_are_checked_where_debugging_asks_for_it(ids, debug, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", debug)
    ids, bad = torch.tensor(ids).as_subclass(OnGpu), ids != [[0, 3], [2, 1]]
    expected = pytest.raises(ValueError, match=r"gather_tokens: expected ids in \[0, 4\) without repeats in a row, got \[2, 2\]")
    with expected if bad and debug else contextlib.nullcontext():
        checks.ids("gather_tokens", "ids", ids, 2, 4)


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_debugging_is_asked_for_by_the_environment(value):
    environment = {name: x for name, x in os.environ.items() if name != "STMAE_DEBUG"} | ({"STMAE_DEBUG": value} if value else {})
    command = [sys.executable, "-c", "from stmae.ops import checks; print(checks.DEBUG)"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == str(value == "1")


LAUNCH = """
import sys, torch, triton
sys.path.insert(0, {root!r})
import stmae.ops
from tests.support import compiler
from tests.kernels.suite import launch

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def check(op, *arguments):
    # The launcher, and the shape function that torch.compile uses in its place: same shapes, dtypes and strides.
    real = launch(op, *arguments)
    fake = getattr(torch.ops.stmae, op).default(*arguments)
    real, fake = ((x,) if torch.is_tensor(x) else x for x in (real, fake))
    for a, b in zip(real, fake, strict=True):
        a, b = ((x.shape, x.dtype, x.stride()) for x in (a, b))
        assert a == b, (op, a, b)
    return real

triton.knobs.runtime.jit_cache_hook = lambda **launch: True  # bind the arguments, compile nothing: test_kernels_compiled.py does
with compiler.compiling("sm_90", every_config=False) as compiled:
    keep, masked = check("random_masking", meta(2, 392, dtype=torch.float32), 39)
    for channels_last in (True, False):
        video = meta(2, 16, 112, 112, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        if not channels_last:
            video = video.contiguous()
        parameters = meta(64, 3, 2, 16, 16), meta(64), meta(392, 64, dtype=torch.float32)
        (tokens,) = check("masked_patchify", video, keep, *parameters, [0.45] * 3, [0.225] * 3)
        check("masked_patchify_backward", tokens, video, keep, *parameters, [0.45] * 3, [0.225] * 3)
        pred, frames = meta(2, 353, 768), list(range(0, 16, 2))
        loss, mean, rstd = check("patch_loss", pred, video, masked, [1, 16, 16], frames, True, [0.45] * 3, [0.225] * 3)
        check("patch_loss_backward", loss, pred, video, masked, mean, rstd, [1, 16, 16], frames, [0.45] * 3, [0.225] * 3)
    tokens = meta(2, 39, 64)
    (x,) = check("restore_tokens", tokens, keep, meta(64), meta(392, 64))
    check("restore_tokens_backward", x, keep, torch.bfloat16)
    (y,) = check("gather_tokens", x, masked)
    check("gather_tokens_backward", y, masked, 392)
    qkv = meta(2, 392, 3, 2, 32)
    out, lse = check("attention_qkvpacked", qkv, 0.2)
    check("attention_qkvpacked_backward", out, qkv, out, lse, 0.2)
    x, branch, norm = meta(2, 39, 64, dtype=torch.float32), meta(2, 39, 64), meta(64, dtype=torch.float32)
    total, out, mean, rstd = check("add_layer_norm", x, branch, norm, norm, 1e-6, torch.bfloat16)
    check("add_layer_norm", branch, x, norm.bfloat16(), norm.bfloat16(), 1e-6, torch.float32)
    check("add_layer_norm", x.mT, x.mT, meta(39), meta(39), 1e-6, torch.float32)
    check("_layer_norm", x[:, ::2], norm, norm, 1e-6, torch.bfloat16)
    check("add_layer_norm_backward", None, out, total, mean, rstd, norm, torch.bfloat16)
    check("add_layer_norm_backward", total, out, total, mean, rstd, norm, torch.float32)
    x, grad = meta(78, 64), meta(78, 96)
    for dtype in (torch.float32, torch.bfloat16):
        fc1, fc1_bias, fc2, fc2_bias = (meta(*shape, dtype=dtype) for shape in ((96, 64), (96,), (64, 96), (64,)))
        check("linear", x, fc1, None)
        _, kept = check("linear", x, fc1, fc1_bias)
        taken = kept if kept.dim() == 2 else fc1
        for wanted in ([True] * 3, [False, True, False]):
            check("linear_backward", grad, x, taken, fc1_bias, dtype, wanted)
        _, hidden, activation, kept1, kept2 = check("mlp", x, fc1, fc1_bias, fc2, fc2_bias)
        parameters = taken, fc1_bias, kept2 if kept2.dim() == 2 else fc2, fc2_bias
        for wanted in ([True] * 5, [False, True, False, False, True]):
            check("mlp_backward", x, x, hidden, activation, *parameters, dtype, dtype, wanted)
    cu, videos = meta(3, dtype=torch.int32), [video[0], video[1, :, :8, :96, :64]]
    keep, masked = check("random_masking_varlen", meta(490, dtype=torch.float32), cu, meta(3, dtype=torch.int64), 48)
    embedding = meta(64, 3, 2, 16, 16), meta(64), meta(488, 64, dtype=torch.float32)
    varlen = videos, keep, cu, *embedding, [0.45] * 3, [0.225] * 3
    (tokens,) = check("masked_patchify_varlen", *varlen)
    check("masked_patchify_varlen_backward", tokens, *varlen)
    rest = [2, 16, 16], [*range(16), *range(8)], [16, 8]
    pred = meta(masked.shape[0], 1536)
    loss, mean, rstd = check("patch_loss_varlen", pred, videos, masked, cu, *rest, 1, [0.45] * 3, [0.225] * 3)
    check("patch_loss_varlen_backward", loss, pred, videos, masked, cu, mean, rstd, *rest, [0.45] * 3, [0.225] * 3)
    out, lse = check("attention_varlen_qkvpacked", qkv[0], cu, 0.2)
    check("attention_varlen_qkvpacked_backward", out, qkv[0], out, lse, cu, 0.2)
    q, k, v = qkv[0].unbind(1)
    out, lse = check("attention_varlen", q, k, v, cu, cu, 0.2)
    check("attention_varlen_backward", out, q, k, v, out, lse, cu, cu, 0.2)
    q, k, v = qkv.unbind(2)
    out, lse = check("attention", q, k, v, 0.2)
    check("attention_backward", out, q, k, v, out, lse, 0.2)
for name, kernel, tiles, grid in compiled:
    assert all(isinstance(n, int) and n > 0 for n in grid) and len(grid) <= 3, (name, grid)
print(len(compiled), "launches")
"""


@needs_triton
def test_launchers_agree_with_the_shape_functions():
    code = LAUNCH.format(root=str(Path(__file__).parents[2]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 20


def test_importing_stmae_imports_no_triton():
    code = "import sys, stmae, stmae.ops; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


def test_a_kernel_that_would_wait_for_the_device_is_not_there():
    """No launcher reads data on the host or uploads any: a CUDA graph refuses that."""
    for file in (Path(__file__).parents[2] / "kernels").glob("*.py"):
        source = file.read_text()
        for word in (".item()", ".tolist()", ".cpu()", "synchronize", ".nonzero(", "torch.tensor(", "torch.as_tensor("):
            assert word not in source, f"{file.name} has {word}"


def test_errors_of_an_internal_op_name_the_public_one():
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^add_layer_norm: .*use stmae.reference.add_layer_norm"):
        ops.add_layer_norm(forward_ad.make_dual(x, x), None, weight, weight)
