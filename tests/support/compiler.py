"""Compiles what a launcher would launch, for a GPU that is not there, and reads the figures out of the machine code.

A launcher runs as it is, on meta tensors: no memory, but shapes, strides, dtypes and the alignment of addresses, which is all
that Triton's binder looks at. Only the last step of a launch is left out. Needs a process without TRITON_INTERPRET.
"""

import bisect
import collections
import contextlib
import itertools
import math
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stmae.kernels import launching

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of one multiprocessor, from the CUDA programming guide's table of compute capabilities: registers, bytes of shared memory
# (all, and the most that one block may have), threads, blocks.
LIMITS = {
    "sm_80": (65536, 164 * 1024, 163 * 1024, 2048, 32),
    "sm_90": (65536, 228 * 1024, 227 * 1024, 2048, 32),
    "sm_100": (65536, 228 * 1024, 227 * 1024, 2048, 32),
}
# Of one gfx942 compute unit, from AMD's CDNA 3 ISA guide: bytes of LDS; per SIMD of four, 512 vector registers a lane.
LDS = 64 * 1024
# Tensor-core instructions: of a warp, of a warp group (sm_90), on tensor memory (sm_100).
MACHINES = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}  # as nvdisasm calls those that Triton compiles for
TENSOR_CORES = {"HMMA": "HMMA", "HGMMA": "HGMMA", "UTCMMA": "UTC[A-Z]*MMA"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoDriver:
    """All that a launch asks of a driver before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"{self.target.backend}{self.target.arch}"  # any hashable: the key of a kernel's cache

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


class AllConfigs:
    """In place of the autotuner: launches every configuration that it would time."""

    def __init__(self, kernel, configs, key):
        self.kernel, self.configs = kernel, configs
        unknown = set(key) - set(kernel.arg_names)
        if unknown:
            raise ValueError(f"{kernel.__name__} is tuned by {unknown}, which it does not take")

    def __getitem__(self, grid):
        def run(*args, **constants):
            for config in self.configs:
                self.kernel[grid](*args, **constants, **config.all_kwargs())

        return run


@contextlib.contextmanager
def compiling(target, *, every_config=True):
    """Within, launchers given meta tensors compile for `target`; yields the list of (kernel name, compiled, tiles, grid)."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("compiling: TRITON_INTERPRET is set; a process either interprets or compiles")
    compiled = []
    run, backend, may_tune, tuner = JITFunction.run, launching.backend, launching.may_tune, launching._tuner

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(kwargs)
        tiles = {name: value for name, value in kwargs.items() if name.startswith("BLOCK")}
        compiled.append((self.fn.__name__.lstrip("_"), kernel, tiles, grid))
        return kernel

    driver = triton.runtime.driver._active  # not .active, which looks for a device
    triton.runtime.driver.set_active(NoDriver(TARGETS[target]))
    JITFunction.run = record
    launching.backend = lambda: TARGETS[target].backend
    launching.may_tune = lambda tensor: every_config
    launching._tuner = AllConfigs
    try:
        yield compiled
    finally:
        JITFunction.run, launching.backend, launching.may_tune, launching._tuner = run, backend, may_tune, tuner
        triton.runtime.driver.set_active(driver)


def _tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _code(cubin):
    """The instructions of a cubin, an ELF file of 64 bits: its sections named .text.*, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]  # name, ..., offset, size
    texts = (x for x in sections if cubin.startswith(b".text.", sections[names][4] + x[0]))
    return b"".join(cubin[offset : offset + length] for _, _, _, _, offset, length in texts)


def _disassemble(codes, target):
    """Opcodes and their number, of each piece of code. One call for all: nvdisasm takes half a second to start."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        sass = _tool("nvdisasm", "--no-dataflow", "--binary", MACHINES[target], file.name)
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    ends = list(itertools.accumulate(len(code) for code in codes))
    opcodes = [collections.Counter() for _ in codes]
    for address, opcode in found:
        opcodes[bisect.bisect_right(ends, int(address, 16))][opcode] += 1
    return opcodes


def _nvidia(cubin, warps, shared, opcodes, target):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, local = (int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "LOCAL"))

    def count(pattern):
        return sum(number for opcode, number in opcodes.items() if re.match(rf"(?:{pattern})(?:\.|$)", opcode))

    def width(pattern):
        wide, half, every = count(rf"(?:{pattern})\..*128"), count(rf"(?:{pattern})\..*64"), count(pattern)
        return [wide, half, every - wide - half]

    return {
        "registers": registers,
        "spilled": local + count("LDL|STL"),
        "shared": shared,
        "warps": warps,
        "blocks_per_sm": blocks_per_sm(target, registers, warps, shared),
        "mma": {name: count(pattern) for name, pattern in TENSOR_CORES.items() if count(pattern)},
        "loads": width("LDG|LDGSTS"),
        "stores": width("STG"),
        "atomics": count("RED|REDG|ATOM|ATOMG"),
        "instructions": sum(opcodes.values()),
    }


def blocks_per_sm(target, registers, warps, shared):
    """How many programs fit on one multiprocessor at a time: the least that registers, shared memory and threads allow."""
    all_registers, all_shared, _, threads, blocks = LIMITS[target]
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = all_registers // 4 // of_a_warp * 4 // warps  # each of four partitions has a quarter of the registers
    by_shared = all_shared // (math.ceil((shared + 1024) / 128) * 128)  # 1 KiB of every block is the system's
    return min(by_registers, by_shared, threads // (warps * 32), blocks)


def _amd(text, warps, shared):

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def count(pattern):
        return len(re.findall(rf"^\s+(?:{pattern})", text, re.M))

    vector = field("vgpr_count") + field("agpr_count")

    def width(name):
        wide, half, every = (count(rf"(?:global|buffer)_{name}{size}") for size in ("_dwordx[34]", "_dwordx2", ""))
        return [wide, half, every - wide - half]

    waves = min(8, 512 // max(8, math.ceil(vector / 8) * 8))  # of a SIMD
    return {
        "registers": vector,
        "spilled": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "shared": shared,
        "warps": warps,
        "blocks_per_sm": min(waves * 4 // warps, LDS // max(shared, 1)),
        "mma": {"MFMA": count("v_mfma")} if count("v_mfma") else {},
        "loads": width("load"),
        "stores": width("store"),
        "atomics": count(r"(?:global|buffer|flat)_atomic"),
        "instructions": count(r"[sv]_|global_|buffer_|ds_"),
    }


def machine_code(kernel):
    """What `figures` reads, in a form that can be sent to another process: the code, its warps and bytes of shared memory."""
    return kernel.asm.get("cubin") or kernel.asm["amdgcn"], kernel.metadata.num_warps, kernel.metadata.shared


def figures(codes, target):
    """Of each of these: registers a thread, spills, bytes of shared memory, programs that fit on one multiprocessor,
    tensor-core instructions, and global loads and stores by width [128, 64, less bits]; counts are static."""
    if target.startswith("gfx"):
        return [_amd(*code) for code in codes]
    opcodes = _disassemble([_code(cubin) for cubin, _, _ in codes], target)
    return [_nvidia(*code, counted, target) for code, counted in zip(codes, opcodes)]
