"""Every kernel launched by Triton's own C launcher, on a driver that records what arrives. Run by test_launch.py.

The tensors are on the CPU, at real addresses; the compiler and the launcher are those of a GPU, and only the driver below them
(tests/support/recording_cuda.c) is not. Needs a process without TRITON_INTERPRET.
"""

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from stmae.kernels import launching
from tests.kernels.suite import launch, layer_arguments, masks, random

STREAM = 0x51A3
SOURCE = Path(__file__).parents[1] / "support" / "recording_cuda.c"
PACK = {
    "i1": "?",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA's GPUs, without what it asks torch.cuda."""

    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return STREAM

    def get_active_torch_device(self):
        return torch.device("cpu")


class Recorder:
    """The recording libcuda.so.1, built, loaded under that name, so that the launcher links to it."""

    def __init__(self, folder):
        path = folder / "libcuda.so.1"
        include = Path(nvidia.dirname) / "include"
        command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", path, SOURCE]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.recorded_name.restype = ctypes.c_char_p

    def __len__(self):
        return self.library.recorded_launches()

    def __getitem__(self, i):
        """(kernel, grid, threads, stream, [bytes of each argument])"""
        shape = (ctypes.c_uint64 * 5)()
        self.library.recorded_shape(i, shape)
        values = []
        for parameter in range(self.library.recorded_parameters(i)):
            value = (ctypes.c_ubyte * 8)()
            size = self.library.recorded_value(i, parameter, value)
            values.append(bytes(value)[:size])
        *grid, threads, stream = shape
        return self.library.recorded_name(i).decode(), tuple(grid), threads, stream, values


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        recorder = Recorder(folder)
        triton.runtime.driver.set_active(Driver())
        yield recorder


@pytest.fixture
def passed(monkeypatch):
    """What is passed to each launch: (kernel, its compiled form, {name: argument}, grid)."""
    launches = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        arguments = dict(zip(self.arg_names, args)) | {name: x for name, x in kwargs.items() if name in self.arg_names}
        grid = grid(arguments) if callable(grid) else grid
        launches.append((self, kernel, arguments, tuple(grid) + (1,) * (3 - len(grid))))
        return kernel

    monkeypatch.setattr(JITFunction, "run", record)
    return launches


def leaves(value, kind, path=()):
    """(path, value, type) of an argument, tuples taken apart."""
    if isinstance(kind, (tuple, list)):
        assert len(value) == len(kind)
        for i, (x, y) in enumerate(zip(value, kind)):
            yield from leaves(x, y, (*path, i))
    else:
        yield path, value, kind


def check(recorded, launched):
    """All that was passed arrived: as an argument, bit by bit, or as a constant that was compiled in."""
    name, grid, threads, stream, values = recorded
    function, kernel, arguments, expected_grid = launched
    assert name == kernel.metadata.name and function.fn.__name__ in name
    assert (grid, threads, stream) == (expected_grid, 32 * kernel.metadata.num_warps, STREAM)
    constants, signature = kernel.src.constants, kernel.src.signature
    assert list(signature) == function.arg_names and set(arguments) == set(signature)
    values, counts = iter(values), dict(pointer=0, number=0, tuple=0, float=0, constant=0, none=0)
    for position, (argument, kind) in enumerate(signature.items()):
        for path, value, leaf in leaves(arguments[argument], kind, (position,)):
            where = f"{function.fn.__name__}, {argument}{list(path[1:])}"
            if leaf == "constexpr":
                compiled = constants[path]
                assert getattr(compiled, "value", compiled) == getattr(value, "value", value), where
                counts["none" if value is None else "constant"] += 1
                continue
            arrived = next(values)
            if leaf.startswith("*"):
                sent = struct.pack("P", value.data_ptr())
                counts["pointer"] += 1
            else:
                sent = struct.pack(PACK[leaf], value)
                counts["float" if leaf.startswith("fp") else "number"] += 1
            counts["tuple"] += len(path) > 1
            assert arrived == sent, f"{where} ({leaf}): {value!r} was passed, {arrived.hex()} arrived, not {sent.hex()}"
    rest = list(values)  # Triton's own: scratch memory, none of which is used
    assert len(rest) <= 2 and not any(any(x) for x in rest)
    return counts


def _tokens():
    keep, masked = masks(2, 37, 11, "cpu")
    x, tokens = random(2, 37, 24, dtype=torch.bfloat16), random(2, 22, 24)[:, ::2]
    mask_token, position = random(48)[::2], random(24, 37).t()
    launch("random_masking", torch.rand(37, 3).t(), 11)
    launch("gather_tokens", x, masked)
    launch("gather_tokens_backward", tokens, keep, 37)
    out = launch("restore_tokens", tokens, keep, mask_token, position)
    launch("restore_tokens_backward", out, keep, torch.float32)


def _patchify():
    video = torch.randint(0, 256, (2, 4, 32, 48, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    keep, _ = masks(2, 12, 5, "cpu")
    for bias, position in ((random(72), random(12, 72)), (None, None)):
        arguments = video, keep, random(72, 3, 2, 16, 16), bias, position, [0.4, 0.45, 0.5], [0.2, 0.225, 0.25]
        out = launch("masked_patchify", *arguments)
        launch("masked_patchify_backward", out, *arguments)


def _loss():
    video, (_, masked) = torch.rand(2, 3, 8, 32, 48), masks(2, 24, 7, "cpu")
    pred, rest = random(2, 18, 776)[:, 1:, :-8], ([0.4, 0.45, 0.5], [0.2, 0.225, 0.25])
    loss, mean, rstd = launch("patch_loss", pred, video, masked, [1, 16, 16], [0, 2, 4, 7], True, *rest)
    grad = torch.rand(17).expand(2, 17)
    launch("patch_loss_backward", grad, pred, video, masked, mean, rstd, [1, 16, 16], [0, 2, 4, 7], *rest)


def _attention():
    qkv = random(2, 33, 3, 2, 32, dtype=torch.bfloat16)
    out, lse = launch("attention_qkvpacked", qkv, 0.3)
    launch("attention_qkvpacked_backward", out, qkv, out, lse, 0.3)
    q, k, v = random(1, 2, 41, 32).transpose(1, 2), random(1, 75, 2, 64)[..., ::2], random(1, 75, 3, 40)[:, :, 1:, 8:]
    out, lse = launch("attention", q, k, v, -0.7)
    launch("attention_backward", out, q, k, v, out, lse, -0.7)


def _transformer():
    x, branch, weight, eps = random(5, 64)[:, 8:56], random(48, 5, dtype=torch.bfloat16).t(), random(48), 1e-6
    total, out, mean, rstd = launch("add_layer_norm", x, branch, weight, weight, eps, torch.bfloat16)
    launch("_layer_norm", x, weight, weight, eps, torch.float32)
    launch("add_layer_norm_backward", total, out, total, mean, rstd, weight, torch.bfloat16)
    launch("add_layer_norm_backward", None, out, total, mean, rstd, weight, torch.float32)
    x, fc1, fc1_bias, fc2, fc2_bias = layer_arguments("mlp", 70, 24, 40, torch.bfloat16, torch.float32, "cpu")
    out, hidden, activation, *casts = launch("mlp", x, fc1, fc1_bias, fc2, fc2_bias)
    parameters, dtypes = (casts[0], fc1_bias, casts[1], fc2_bias), (torch.float32, torch.float32)
    for wanted in ([True] * 5, [True, True, False, True, True]):  # with the bias gradient and without
        launch("mlp_backward", out, x, hidden, activation, *parameters, *dtypes, wanted)


def _sequences():
    sizes = ((4, 32, 48), (2, 16, 32))  # 2 * 2 * 3 and 1 * 1 * 2 patches
    videos = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8).permute(3, 0, 1, 2) for size in sizes]
    statistics, offsets = ([0.4, 0.45, 0.5], [0.2, 0.225, 0.25]), torch.tensor([0, 5, 6])
    ids = torch.tensor([0, 3, 7, 8, 11, 13])  # of both, the second's from 12 on
    arguments = videos, ids, offsets, random(72, 3, 2, 16, 16), random(72), random(14, 72), *statistics
    out = launch("masked_patchify_varlen", *arguments)
    launch("masked_patchify_varlen_backward", out, *arguments)
    pred, frames = random(6, 768), ([1, 16, 16], [0, 2, 1], [2, 1])
    loss, mean, rstd = launch("patch_loss_varlen", pred, videos, ids % 6, offsets, *frames, 1, *statistics)
    launch("patch_loss_varlen_backward", loss, pred, videos, ids % 6, offsets, mean, rstd, *frames, *statistics)
    launch("random_masking_varlen", torch.rand(14), torch.tensor([0, 12, 14]), torch.tensor([0, 3, 4]), 4)
    qkv, offsets = random(58, 3, 2, 32, dtype=torch.bfloat16), torch.tensor([0, 41, 58], dtype=torch.int32)
    out, lse = launch("attention_varlen_qkvpacked", qkv, offsets, 0.3)
    launch("attention_varlen_qkvpacked_backward", out, qkv, out, lse, offsets, 0.3)


OPS = {
    "tokens": _tokens,
    "masked_patchify": _patchify,
    "patch_loss": _loss,
    "attention": _attention,
    "transformer": _transformer,
    "sequences": _sequences,
}


@pytest.mark.parametrize("ops", OPS)
def test_every_argument_arrives(ops, recorder, passed):
    before = len(recorder)
    OPS[ops]()
    assert len(recorder) - before == len(passed) > 0
    counts = [check(recorder[before + i], launched) for i, launched in enumerate(passed)]
    total = {name: sum(x[name] for x in counts) for name in counts[0]}
    print(f"{ops}: {len(passed)} launches, {total}")
    assert total["pointer"] and total["number"] and total["constant"]
    if ops in ("masked_patchify", "patch_loss", "attention", "sequences"):
        assert total["float"] and total["tuple"]
    if ops in ("masked_patchify", "transformer"):
        assert total["none"]


def test_every_kernel_is_launched(recorder, passed):
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "kernels").glob("*.py"))
    for launches in OPS.values():
        launches()
    missing = set(re.findall(r"\blaunch\(\s*(_\w+)", sources)) - {kernel.fn.__name__ for kernel, *_ in passed}
    assert not missing, "give OPS a launch of " + ", ".join(sorted(missing))


def test_a_wrong_argument_is_noticed(recorder, passed):
    x, ids = random(2, 5, 16), torch.tensor([[0, 4], [1, 3]])
    launch("gather_tokens", x, ids)
    function, kernel, arguments, grid = passed[-1]
    check(recorder[len(recorder) - 1], passed[-1])
    for name, wrong in (("x_ptr", x[1:]), ("ids_ptr", x), ("N", 6), ("x_b", 81), ("BLOCK_D", 32), ("ids_m", 2)):
        with pytest.raises(AssertionError):
            check(recorder[len(recorder) - 1], (function, kernel, arguments | {name: wrong}, grid))
    with pytest.raises(AssertionError):
        check(recorder[len(recorder) - 1], (function, kernel, arguments, (grid[0] + 1, 1, 1)))


def test_a_capture_loads_no_kernel(recorder, monkeypatch):
    """Neither a new kernel nor one for arguments that ask for another version; what ran before is launched."""
    small, large = random(2, 5, 40), random(2, 5, 64)
    ids = torch.tensor([[0, 4], [1, 3]])
    monkeypatch.setattr(launching, "capturing", lambda: True)
    for _ in range(2):
        before = len(recorder)
        with pytest.raises(RuntimeError, match="gather_rows: its kernel is not on the GPU yet .* once before the capture"):
            launch("gather_tokens", small, ids)
        assert len(recorder) == before
    monkeypatch.setattr(launching, "capturing", lambda: False)
    launch("gather_tokens", small, ids)
    monkeypatch.setattr(launching, "capturing", lambda: True)
    launch("gather_tokens", small, ids)
    assert len(recorder) == before + 2
    assert recorder[before][0] == recorder[before + 1][0]
    with pytest.raises(RuntimeError, match="once before the capture"):
        launch("gather_tokens", large, ids)
