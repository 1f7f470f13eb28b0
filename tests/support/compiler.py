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


def launch_every_option(kernel, grid, args, configs, key, constants):
    """In place of the autotuner: launches every configuration that it would time."""
    unknown = set(key) - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} is tuned by {unknown}, which it does not take")
    for config in configs.options:
        kernel[grid](*args, **constants, **config.all_kwargs())


@contextlib.contextmanager
def compiling(target, *, every_config=True):
    """Within, launchers given meta tensors compile for `target`; yields the list of (kernel name, compiled, tiles, grid)."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("compiling: TRITON_INTERPRET is set; a process either interprets or compiles")
    compiled = []
    run = JITFunction.run
    patched = {name: getattr(launching, name) for name in ("backend", "target", "may_tune", "_tuned")}

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(kwargs)
        tiles = {name.removeprefix("BLOCK_"): value for name, value in kwargs.items() if name.startswith(("BLOCK", "EIGHTHS"))}
        tiles["warps"] = kwargs["num_warps"]
        compiled.append((self.fn.__name__.lstrip("_"), kernel, tiles, grid))
        return kernel

    driver = triton.runtime.driver._active  # not .active, which looks for a device
    triton.runtime.driver.set_active(NoDriver(TARGETS[target]))
    JITFunction.run = record
    launching.backend = lambda: TARGETS[target].backend
    launching.target = lambda device: target
    launching.may_tune = lambda tensor: every_config
    launching._tuned = launch_every_option
    try:
        yield compiled
    finally:
        JITFunction.run = run
        for name, function in patched.items():
            setattr(launching, name, function)
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
    """Of each piece of code its instructions, (address, opcode, address that it branches to or None). One call for all:
    nvdisasm takes half a second to start."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        sass = _tool("nvdisasm", "--no-dataflow", "--binary", MACHINES[target], file.name)
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$", sass, re.M)
    ends = list(itertools.accumulate(len(code) for code in codes))
    instructions = [[] for _ in codes]
    for address, opcode, operands in found:
        to = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        instruction = int(address, 16), opcode, int(to[1], 16) if to else None
        instructions[bisect.bisect_right(ends, instruction[0])].append(instruction)
    return instructions


def _main_loop(instructions, product):
    """(instructions of the loop that a kernel spends its time in, those before and after it), as opcodes.

    It is the longest range that a branch goes back over; one with products in it, if there is one. What lies behind the last
    exit does not count: functions for rare cases, and waits that jump out of line and back.
    """
    last = max(i for i, (_, opcode, _) in enumerate(instructions) if opcode.startswith(("EXIT", "s_endpgm")))
    body = [x for x in instructions[: last + 1] if not x[1].startswith("NOP")]
    loops = [[op for address, op, _ in body if to <= address <= end] for end, _, to in body if to is not None and to < end]
    loop = max(loops, key=lambda ops: (any(product(op) for op in ops), len(ops)), default=[])
    return loop, len(body) - len(loop)


def _nvidia(cubin, warps, shared, instructions, target):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, local = (int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "LOCAL"))
    opcodes = collections.Counter(opcode for _, opcode, _ in instructions)
    loop, outside = _main_loop(instructions, re.compile("|".join(TENSOR_CORES.values())).match)

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
        "instructions": len(instructions),
        "loop": len(loop),
        "exponentials": sum(opcode.startswith("MUFU.EX2") for opcode in loop),
        "outside": outside,
    }


def blocks_per_sm(target, registers, warps, shared):
    """How many programs fit on one multiprocessor at a time: the least that registers, shared memory and threads allow."""
    all_registers, all_shared, _, threads, blocks = LIMITS[target]
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = all_registers // 4 // of_a_warp * 4 // warps  # each of four partitions has a quarter of the registers
    by_shared = all_shared // (math.ceil((shared + 1024) / 128) * 128)  # 1 KiB of every block is the system's
    return min(by_registers, by_shared, threads // (warps * 32), blocks)


def _amd_instructions(text):
    """As _disassemble gives them; addresses count instructions."""
    lines = re.findall(r"^(?:(\.LBB\w+):|\s+((?:[sv]|global|buffer|flat|scratch|ds)_\w+)(.*))", text, re.M)
    labels, found = {}, []
    for label, opcode, operands in lines:
        if label:
            labels[label] = len(found)
        else:
            found.append((len(found), opcode, operands.strip() if "branch" in opcode else None))
    return [(address, opcode, labels.get(to)) for address, opcode, to in found]


def _amd(text, warps, shared):

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def count(pattern):
        return len(re.findall(rf"^\s+(?:{pattern})", text, re.M))

    vector = field("vgpr_count")  # the accumulation registers are among them
    instructions = _amd_instructions(text)
    loop, outside = _main_loop(instructions, lambda opcode: opcode.startswith("v_mfma"))

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
        "instructions": len(instructions),
        "loop": len(loop),
        "exponentials": sum(opcode.startswith("v_exp") for opcode in loop),
        "outside": outside,
    }


def machine_code(kernel):
    """What `figures` reads, in a form that can be sent to another process: the code, its warps and bytes of shared memory."""
    return kernel.asm.get("cubin") or kernel.asm["amdgcn"], kernel.metadata.num_warps, kernel.metadata.shared


def figures(codes, target):
    """Of each of these: registers a thread, spills, bytes of shared memory, programs that fit on one multiprocessor,
    tensor-core instructions, global loads and stores by width [128, 64, less bits], instructions of the main loop, the
    exponentials among them, and instructions outside of it; counts are static."""
    if target.startswith("gfx"):
        return [_amd(*code) for code in codes]
    disassembled = _disassemble([_code(cubin) for cubin, _, _ in codes], target)
    return [_nvidia(*code, instructions, target) for code, instructions in zip(codes, disassembled)]
