"""torch.ops.stmae.* called directly, without the checks of stmae.ops: every op with every kind of bad operand, one at a time.

A bad call is refused with an error that names the op, or, where the operand is only unusual, gives what the same values give in
plain memory. It never ends the process, and never writes beyond its outputs (which `make sanitize` sees for itself).
"""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import layouts
from tests.support.op_calls import BF16, CALLS, COLOUR, floats

stmae = torch.ops.stmae


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("stmae::").split(".")[0] for name in names if name.startswith("stmae::")})


def on_cpu(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"stmae::{name}", "CPU")


def test_the_table_has_every_op():
    assert [name for name in registered() if on_cpu(name) and name not in CALLS] == []


def call(name, arguments):
    result = getattr(stmae, name)(**arguments)
    if result is None:
        return [arguments[name] for name in ("out",) if name in arguments]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def plain(value):
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [plain(x) for x in value]
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value


def faked(value, mode):
    if isinstance(value, list):
        return [faked(x, mode) for x in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def refused_or_right(name, arguments, mode, must=False):
    """Refused by name, or the same as with plain memory, with the shapes that the op's shape function gives."""
    try:
        results = call(name, arguments)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        assert not isinstance(error, RuntimeError) or str(error), error
        return
    assert not must, f"{name} took it"
    again = call(name, {key: plain(value) for key, value in arguments.items()})
    shapes = [tuple(x.shape) for x in results]
    if "out" not in arguments:  # whose shape is given; up to 2.11 torch fails where a fake tensor to be written to is conjugated
        with mode:  # on the CPU: on the meta device the shape functions speak of GPUs
            fake = {key: faked(value, mode) for key, value in arguments.items()}
            shapes = [tuple(x.shape) for x in call(name, fake)]
    for index, (result, expected) in enumerate(zip(results, again, strict=True)):
        if name.startswith(("linear", "mlp")):  # a library sums transposed or stepped operands in another order
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            same = torch.equal(result.nan_to_num(), expected.nan_to_num())
            assert same, f"result {index} differs"
        assert result.shape == shapes[index], f"{name}: result {index} has shape {result.shape}, expected {shapes[index]}"


# Kinds of bad tensors: what becomes of a good one.
def resized(dim, change):
    def make(x):
        if x.dim() <= dim or x.shape[dim] + change < 0:
            return None
        shape = list(x.shape)
        shape[dim] += change
        return x.new_zeros(shape)

    return make


DTYPES = (torch.float32, torch.float64, torch.float16, BF16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64)
KINDS = {
    "scalar": lambda x: x.new_zeros(()) if x.dim() else None,
    "flat": lambda x: x.flatten() if x.dim() != 1 else None,
    "extra dimension": lambda x: x[None],
    "empty": lambda x: x.new_empty(0),
    **{f"dimension {d} {change:+d}": resized(d, change) for d in range(5) for change in (-1, 1)},
    **{f"dimension {d} of zero": lambda x, d=d: x.narrow(d, 0, 0) if x.dim() > d else None for d in range(5)},
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) if x.dtype != dtype else None for dtype in DTYPES},
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else None,
    "stepped": lambda x: layouts.strided(x, [2 * stride for stride in x.stride()]) if x.dim() else None,
    "stepped rows": lambda x: layouts.strided(x, [2 * s if s > 1 else s for s in x.stride()]) if x.dim() > 1 else None,
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "expanded rows": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else None,
    "overlapping": lambda x: x.flatten().as_strided(x.shape, [1] * x.dim()) if x.dim() else None,
    "at the end of a page": lambda x: layouts.strided(x, x.stride()),
    "at the start of a page": lambda x: layouts.strided(x, x.stride(), at_end=False),
    "misaligned": lambda x: layouts.misaligned(x) if x.element_size() > 1 and x.numel() else None,
    "no storage": layouts.without_storage,
    "half a storage": lambda x: layouts.without_storage(x, x.untyped_storage().nbytes() // 2),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "conjugate": lambda x: torch.complex(x.float(), x.float()).conj().imag if x.is_floating_point() else None,
    "not a tensor": lambda x: "no tensor",
    "missing": lambda x: None,
}  # fmt: skip
MUST_FAIL = {"torch.float64", "torch.float16", "torch.int32", "torch.bool", "torch.complex64", "no storage", "half a storage",
             "misaligned", "sparse", "quantised", "not a tensor"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CALLS))
def test_bad_tensors(name, capability):
    good = CALLS[name]()
    call(name, good)  # is not refused
    mode = FakeTensorMode()
    for argument, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        for kind, make in KINDS.items():
            if kind == "on meta":
                continue  # goes to the shape function by torch's rules
            bad = make(value)
            if bad is None and kind != "missing":
                continue
            try:
                allowed = argument.startswith("cu_") and kind == "torch.int32"  # offsets are int32 or int64
                must = kind in MUST_FAIL and value.numel() > 0 and not allowed
                refused_or_right(name, {**CALLS[name](), argument: bad}, mode, must=must)
            except AssertionError as error:
                raise AssertionError(f"{name}({argument} {kind}): {error}") from error


def test_bad_offsets(capability):
    """Offsets that do not start at 0, ascend and end at the total, of every op that takes some."""
    found = 0
    for name in sorted(CALLS):
        for argument, good in CALLS[name]().items():
            if not argument.startswith("cu_"):
                continue
            found += 1
            last = int(good[-1])
            for bad in ([0, last + 1, last], [0] * 4, [1, 1, last], [0, 1, last - 1], [0, 1, last + 1], [-1, 0, last],
                        [0, 2**31 - 1, last], [last], []):  # fmt: skip
                if len(bad) == len(good) and sorted(bad) == bad and bad[0] == 0 and bad[-1] == last:
                    continue
                with pytest.raises(RuntimeError, match=f"{name}: expected"):
                    call(name, {**CALLS[name](), argument: torch.tensor(bad, dtype=good.dtype)})
    assert found >= 12


@pytest.mark.parametrize("bad", [-1, 8, 20, 2**62, -(2**63), "repeated", "of the other video"])
@pytest.mark.parametrize("name", sorted(name for name in CALLS if "videos" in CALLS[name]()))
def test_bad_ids_in_a_list_of_videos(name, bad, capability):
    good = CALLS[name]()
    argument = "keep" if "keep" in good else "masked"
    good[argument][2] = {"repeated": good[argument][0], "of the other video": 9}.get(bad, bad)
    with pytest.raises(RuntimeError, match=f"{name}: expected {argument} (of sequence 0 in \\[0, 8\\)|without repeats)"):
        call(name, good)


@pytest.mark.parametrize("name", sorted(name for name in CALLS if "videos" in CALLS[name]()))
def test_bad_videos_in_a_list(name, capability):
    mode = FakeTensorMode()
    for kind, make in KINDS.items():
        for index in (0, 1):
            arguments = CALLS[name]()
            bad = make(arguments["videos"][index])
            if kind in ("on meta", "missing", "not a tensor") or bad is None:
                continue
            arguments["videos"][index] = bad
            try:
                refused_or_right(name, arguments, mode, must=kind in MUST_FAIL - {"misaligned"})
            except AssertionError as error:
                raise AssertionError(f"{name}(videos[{index}] {kind}): {error}") from error


@pytest.mark.parametrize(
    "name", sorted(name for name in CALLS if {"keep", "masked", "ids"} & set(CALLS[name]()) and "videos" not in CALLS[name]())
)
@pytest.mark.parametrize("bad", [-1, 8, 9, 2**31, 2**62, -(2**63), "repeated"])
def test_bad_ids(name, bad, capability):
    good = CALLS[name]()
    argument = next(a for a in ("keep", "masked", "ids") if a in good)
    limit = 8 if "video" in good else 9
    if bad == 8 and limit == 9:
        return
    good[argument][1, 2] = good[argument][1, 0] if bad == "repeated" else bad
    with pytest.raises(RuntimeError, match=f"{name}: expected {argument} (in \\[0, {limit}\\)|without repeats)"):
        call(name, good)


BAD_VALUES = {
    "num_keep": [0, -1, 10, 11, 2**40, 2**62, -(2**63)],
    "total_keep": [-1, 2, 4, 11, 2**40, 2**62, -(2**63)],
    "frame_counts": [[4], [4, 6, 0], [5, 5], [4, 7], [-4, 14], [2**62, 6], [4, -(2**63)]],
    "num_tokens": [-1, 3, 2**31, 2**62, -(2**63)],
    "patch_size": [[], [2, 4], [2, 4, 4, 1], [0, 4, 4], [-2, 4, 4], [2, 3, 4], [1, 4, 4], [2**62, 2**62, 2**62]],
    "frames": [[], [0], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 2, 2**62], [0] * 5],
    "mean": [[], [0.5], [0.5] * 4, [0.5, float("nan"), 0.5], [float("inf")] * 3],
    "std": [[], [0.5], [0.5] * 4, [0.5, 0.0, 0.5], [-0.5] * 3, [float("nan")] * 3],
    "scale": [float("nan"), float("inf"), -float("inf")],
    "dtype": [torch.float64, torch.float16, torch.int64, torch.bool],
    "branch_dtype": [torch.float64, torch.uint8, torch.complex64],
    "tokens_dtype": [torch.float64, torch.uint8],
    "weight_dtype": [torch.float64, torch.int64],
    "fc1_dtype": [torch.float16, torch.bool],
    "fc2_dtype": [torch.float16, torch.bool],
    "output_mask": [[], [True], [True] * 9],
}
BAD_CALLS = [(name, a, value) for name in sorted(CALLS) for a in CALLS[name]() for value in BAD_VALUES.get(a, [])]


@pytest.mark.parametrize(("name", "argument", "value"), BAD_CALLS)
def test_bad_values(name, argument, value):
    with pytest.raises((RuntimeError, ValueError)):
        call(name, {**CALLS[name](), argument: value})


def test_extents_that_overflow():
    """Views whose sizes are beyond any memory, though their storage holds a few bytes."""
    rows = torch.zeros(16)
    huge = rows.as_strided((1, 2**40, 1, 8), (0, 0, 0, 1))
    q = floats(1, 2, 1, 8)
    for k in (huge, rows.as_strided((1, 2**31 - 1, 2**20, 8), (0, 0, 0, 1))):
        with pytest.raises((RuntimeError, MemoryError)):
            stmae.attention(q.expand(1, 2, k.shape[2], 8), k, k, 1.0)
    with pytest.raises((RuntimeError, MemoryError)):
        stmae.gather_tokens_backward(
            rows.as_strided((2**40, 0, 8), (0, 8, 1)), torch.zeros(2**40, 0, dtype=torch.int64), 2**31 - 1
        )
    with pytest.raises((RuntimeError, MemoryError)):
        stmae.restore_tokens_backward(
            rows.as_strided((2**40, 2**20, 8), (0, 0, 1)), torch.zeros(2**40, 0, dtype=torch.int64), torch.float32
        )
    video = torch.zeros(1, dtype=torch.uint8).expand(1, 3, 2**20, 2**20, 2**20)
    with pytest.raises((RuntimeError, MemoryError)):
        stmae.masked_patchify(video, torch.zeros(1, 1, dtype=torch.int64), floats(2, 3, 1, 1, 1), None, None, **COLOUR)


def test_an_output_that_overlaps_an_input():
    memory = torch.zeros(100)
    with pytest.raises(RuntimeError, match="linear_product: expected out that does not overlap x"):
        stmae.linear_product(memory[:20].view(5, 4), memory[10:40].view(5, 6), floats(4, 6), None, False)
    with pytest.raises(RuntimeError, match="linear_weight_gradient: expected out that does not overlap grad"):
        stmae.linear_weight_gradient(memory[:24].view(4, 6), memory[20:40].view(5, 4), floats(5, 6), False)


def test_a_call_inspects_no_signature(monkeypatch):
    """Which torch does at each call of an autograd.Function with a setup_context: most of what a small call costs the host."""
    calls = {name: make() for name, make in CALLS.items()}

    def refuse(*arguments, **options):
        raise AssertionError("a signature was inspected")

    monkeypatch.setattr(inspect, "signature", refuse)
    for name, arguments in calls.items():
        getattr(stmae, name)(**arguments)
