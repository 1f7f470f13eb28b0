"""Triton's interpreter, made to compute as the hardware does, with a memory sanitiser and counters of traffic and work.

Needs TRITON_INTERPRET=1 before triton is imported, hence a process of its own. What is patched is private to Triton: the
self-test (check_interpreter.py) compares it with torch, value by value, and fails when another Triton needs another patch.
"""

import contextlib
import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests.support.interpreted: expected TRITON_INTERPRET=1 in the environment before triton is imported")

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    if not _is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _rounded(handle):
    """float32 to bfloat16, to the nearest, ties to even; NaN stays NaN."""
    x = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return Handle(np.where(np.isnan(x), np.uint16(0x7FC0), nearest).reshape(handle.data.shape), tl.bfloat16)


def _tf32(x):
    """float32 with the mantissa of 10 bits that a tensor core sees, to the nearest, ties away from zero (cvt.rna)."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).reshape(np.shape(x))


def install():
    """Compute bfloat16 by way of float32, rounding each result, and float32 products in the input precision asked for.

    As it is, the interpreter adds and multiplies the bits of bfloat16 as integers, and ignores input_precision.
    """
    original = {name: getattr(Builder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot", "create_fp_to_fp")}

    def cast_impl(self, source, to):
        if _is_bf16(source):
            wide = _widened(source)
            if to.scalar == tl.bfloat16:
                return source
            return wide if to.scalar == tl.float32 else original["cast_impl"](self, wide, to)
        if to.scalar == tl.bfloat16:
            return _rounded(source if source.dtype.scalar == tl.float32 else original["cast_impl"](self, source, tl.float32))
        return original["cast_impl"](self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if _is_bf16(source) or to.scalar == tl.bfloat16:
            return cast_impl(self, source, to)
        return original["create_fp_to_fp"](self, source, to, rounding)

    def binary_op(self, left, right, op):
        if not _is_bf16(left):
            return original["binary_op"](self, left, right, op)
        result = original["binary_op"](self, _widened(left), _widened(right), op)
        return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else _rounded(result)

    def unary_op(self, x, op):
        return _rounded(original["unary_op"](self, _widened(x), op)) if _is_bf16(x) else original["unary_op"](self, x, op)

    def create_dot(self, a, b, accumulator, precision, imprecise):
        a, b = _widened(a), _widened(b)
        if a.dtype.scalar == tl.float32 and precision in (ir.INPUT_PRECISION.TF32, ir.INPUT_PRECISION.TF32x3):
            high = [Handle(_tf32(x.data), tl.float32) for x in (a, b)]
            if precision == ir.INPUT_PRECISION.TF32x3:
                low = [Handle(_tf32(x.data - y.data), tl.float32) for x, y in zip((a, b), high)]
                for left, right in ((low[0], high[1]), (high[0], low[1])):
                    accumulator = original["create_dot"](self, left, right, accumulator, precision, imprecise)
            a, b = high
        return original["create_dot"](self, a, b, accumulator, precision, imprecise)

    for function in (cast_impl, binary_op, unary_op, create_dot, create_fp_to_fp):
        setattr(Builder, function.__name__, function)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc"):
        setattr(Builder, name, lambda self, source, to: self.cast_impl(source, to))
    # An index is an array of one element: NumPy 2.4 no longer makes a number of it by int(), which Triton 3.6 asks for.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    # Tensors are on the host: copying each storage onto itself and back only costs time, and for a huge one, memory.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, args, host_args, kwargs, host_kwargs: None


def _addresses(pointers, mask):
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    return np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)].ravel()


def _size(pointers):
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextlib.contextmanager
def _replaced(**functions):
    original = {name: getattr(Builder, name) for name in functions}
    for name, function in functions.items():
        setattr(Builder, name, function)
    try:
        yield original
    finally:
        for name, function in original.items():
            setattr(Builder, name, function)


@contextlib.contextmanager
def sanitized():
    """Within, a kernel may touch the memory of the tensors it is given, and no other.

    Fails on a load or store elsewhere; on two programs of one launch that store to one address, or one that reads what another
    stores (between programs there is no order); on one store that writes an address twice. Lanes that are masked off without
    `other`, undefined on a GPU and zero in the interpreter, are poisoned: NaN or the largest integer.
    """
    ranges = []

    loads, stores = [], []  # of the launch: arrays of addresses, each with its program

    def check(self, pointers, mask, what):
        p, size = _addresses(pointers, mask), _size(pointers)
        inside = np.zeros(p.shape, bool)
        for low, high in ranges:
            inside |= (p >= low) & (p + size <= high)
        if not inside.all():
            raise IndexError(f"program {self.grid_idx}: {(~inside).sum()} of {inside.size} lanes {what} out of bounds")
        x, y, z = self.grid_idx
        program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
        addresses = np.unique(p)
        (loads if what == "load" else stores).append((addresses, np.full(addresses.shape, program)))
        return addresses.size == p.size

    def check_order():
        """Between the programs of a launch there is no order: what one stores, no other may load or store."""
        if not stores:
            return
        address, program = (np.concatenate(x) for x in zip(*stores))
        pairs = np.unique(np.stack([address.astype(np.int64), program]), axis=1)
        clash = np.flatnonzero(pairs[0, 1:] == pairs[0, :-1])
        if clash.size:
            raise RuntimeError(f"programs {pairs[1, clash[0]]} and {pairs[1, clash[0] + 1]} store to one address")
        if loads and pairs.size:
            address, program = (np.concatenate(x) for x in zip(*loads))
            at = np.minimum(np.searchsorted(pairs[0], address.astype(np.int64)), pairs.shape[1] - 1)
            clash = np.flatnonzero((pairs[0, at] == address.astype(np.int64)) & (pairs[1, at] != program))
            if clash.size:
                raise RuntimeError(f"program {program[clash[0]]} loads what program {pairs[1, at[clash[0]]]} stores")

    def load(self, pointers, mask, other, *rest):
        check(self, pointers, mask, "load")
        result = original["create_masked_load"](self, pointers, mask, other, *rest)
        if other is not None:
            return result
        if result.dtype.scalar == tl.bfloat16:
            poison = np.uint16(0x7FC0)
        elif result.data.dtype.kind == "f":
            poison = np.nan
        else:
            poison = True if result.data.dtype.kind == "b" else np.iinfo(result.data.dtype).max
        kept = np.broadcast_to(mask.data, result.data.shape).astype(bool)
        return Handle(np.where(kept, result.data, np.array(poison, result.data.dtype)), result.dtype)

    def store(self, pointers, value, mask, *rest):
        if not check(self, pointers, mask, "store"):
            raise RuntimeError(f"program {self.grid_idx} stores to one address twice in one store")
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, *arguments):
        raise RuntimeError(f"program {self.grid_idx} uses an atomic: the order of its sums is not fixed")

    execute = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        storages = [x.untyped_storage() for x in (*args, *kwargs.values()) if hasattr(x, "untyped_storage")]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        loads.clear()
        stores.clear()
        execute(self, *args, **kwargs)
        check_order()

    with _replaced(create_masked_load=load, create_masked_store=store, create_atomic_rmw=atomic) as original:
        interpreter.GridExecutor.__call__ = launch
        try:
            yield
        finally:
            interpreter.GridExecutor.__call__ = execute


class Traffic:
    """Counts, while it is entered: bytes requested, unique bytes in sectors of 32, and operations of tl.dot.

    Unique bytes, of each launch on its own and summed over launches, are what memory has to deliver and take however good
    the caches are.
    """

    SECTOR = 32

    def __init__(self, *, memory=True):
        self.requested = self.read = self.written = self.operations = 0
        self.memory = memory  # counting addresses takes longer than the kernel does

    def _note(self, pointers, mask, seen):
        if not self.memory:
            return
        addresses = _addresses(pointers, mask)
        self.requested += addresses.size * _size(pointers)
        seen.append(np.unique(addresses // self.SECTOR))

    def __enter__(self):
        loads, stores = [], []
        counters = self

        def load(self, pointers, mask, *rest):
            counters._note(pointers, mask, loads)
            return original["create_masked_load"](self, pointers, mask, *rest)

        def store(self, pointers, value, mask, *rest):
            counters._note(pointers, mask, stores)
            return original["create_masked_store"](self, pointers, value, mask, *rest)

        def dot(self, a, b, *rest):
            counters.operations += 2 * a.data.size * b.data.shape[-1]
            return original["create_dot"](self, a, b, *rest)

        execute = self._execute = interpreter.GridExecutor.__call__

        def launch(self, *args, **kwargs):
            loads.clear()
            stores.clear()
            execute(self, *args, **kwargs)
            for what, seen in (("read", loads), ("written", stores)):
                unique = np.unique(np.concatenate(seen)).size if seen else 0
                setattr(counters, what, getattr(counters, what) + unique * counters.SECTOR)

        self._patch = _replaced(create_masked_load=load, create_masked_store=store, create_dot=dot)
        original = self._patch.__enter__()
        interpreter.GridExecutor.__call__ = launch
        return self

    def __exit__(self, *error):
        interpreter.GridExecutor.__call__ = self._execute
        self._patch.__exit__(*error)
