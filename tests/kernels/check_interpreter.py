"""The patched interpreter against torch, the sanitiser against kernels that do wrong. Run like check_interpreted.py."""

from tests.support import interpreted

interpreted.install()

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


def special(dtype):
    """Random numbers of every size, and those that rounding treats in a way of their own."""
    torch.manual_seed(0)
    x = torch.randn(1024) * 2.0 ** torch.randint(-30, 30, (1024,))
    # Ties down and up, just above one, overflow, infinity, NaN, subnormal, -0.
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x00000001, 0x80000000]
    x[:8] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return x.to(dtype)


@triton.jit
def _arithmetic(x_ptr, y_ptr, cast_ptr, sum_ptr, product_ptr, less_ptr, negative_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(cast_ptr + i, x.to(tl.float32).to(tl.bfloat16))
    tl.store(sum_ptr + i, x.to(tl.bfloat16) + y.to(tl.bfloat16))
    tl.store(product_ptr + i, x.to(tl.bfloat16) * y.to(tl.bfloat16))
    tl.store(less_ptr + i, (x.to(tl.bfloat16) < y.to(tl.bfloat16)).to(tl.int32))
    tl.store(negative_ptr + i, -x.to(tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32], ids=str)
def test_bfloat16_is_torchs(dtype):
    floating = dtype.is_floating_point
    x = special(dtype) if floating else torch.randint(0, 255, (1024,), dtype=dtype)
    y = special(dtype).flip(0) if floating else x.flip(0)
    cast, total, product, negative = (torch.empty(1024, dtype=torch.bfloat16) for _ in range(4))
    less = torch.empty(1024, dtype=torch.int32)
    _arithmetic[(1,)](x, y, cast, total, product, less, negative, BLOCK=1024)
    a, b = x.bfloat16(), y.bfloat16()
    minus = -a if TRITON >= (3, 8) else 0 - a  # Triton's own definition before 3.8, hence 0 for 0
    for ours, theirs in ((cast, a), (total, a + b), (product, a * b), (negative, minus)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num().view(torch.int16), theirs.nan_to_num().view(torch.int16))
    assert torch.equal(less.bool(), a < b)


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION))


def test_products_have_the_precision_asked_for():
    torch.manual_seed(0)
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a.double() @ b.double()
    error = {}
    for precision in ("ieee", "tf32", "tf32x3"):
        out = torch.empty(64, 64)
        _product[(1,)](a, b, out, PRECISION=precision, BLOCK=64)
        error[precision] = (out - exact).abs().max().item()
    assert error["ieee"] < 2e-5 and error["tf32x3"] < 2e-5
    assert 1e-3 < error["tf32"] < 3e-2

    def tf32(x):  # by another road: a float of 11 significant bits
        fraction, exponent = torch.frexp(x.double())
        return torch.ldexp((fraction * 2048 + 0.5 * fraction.sign()).trunc() / 2048, exponent)

    out = torch.empty(64, 64)
    _product[(1,)](a, b, out, PRECISION="tf32", BLOCK=64)
    assert (out - tf32(a) @ tf32(b)).abs().max() < 2e-5
    low, out = (a.bfloat16(), b.bfloat16()), torch.empty(64, 64)
    _product[(1,)](*low, out, PRECISION=None, BLOCK=64)
    assert (out - low[0].double() @ low[1].double()).abs().max() < 2e-5


@triton.jit
def _load_past(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def _store_past(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i - 1, tl.load(x_ptr + i))


@triton.jit
def _store_over_another(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _store_twice(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i), mask=tl.program_id(0) == 0)


@triton.jit
def _load_of_another(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK // 2 + tl.arange(0, BLOCK // 2)
    tl.store(out_ptr + i, tl.load(out_ptr + BLOCK - 1 - i))


@triton.jit
def _add_atomically(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize(
    "kernel, message",
    [
        (_load_past, "load out of bounds"),
        (_store_past, "store out of bounds"),
        (_store_over_another, "store to one address"),
        (_store_twice, "twice in one store"),
        (_load_of_another, "loads what program"),
        (_add_atomically, "atomic"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_sanitizer_catches(kernel, message):
    x, out = torch.zeros(16), torch.zeros(16)
    with pytest.raises((InterpreterError, RuntimeError), match=message), interpreted.sanitized():
        kernel[(2,)](x, out, BLOCK=16)


@triton.jit
def _load_without_other(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_sanitizer_poisons_lanes_without_other(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    with interpreted.sanitized():
        _load_without_other[(1,)](x, out, BLOCK=16)
    assert (out[:10] == 1).all()
    assert out[10:].isnan().all() if dtype.is_floating_point else (out[10:] == 255).all()


def test_traffic_counts_each_byte_once_and_requests_as_often_as_made():
    x, out = torch.zeros(1024), torch.zeros(64, 64)
    with interpreted.Traffic() as traffic:
        for _ in range(2):
            _store_over_another[(3,)](x, torch.zeros(1024), BLOCK=1024)
    assert traffic.requested == 2 * 3 * 2 * 4096
    assert abs(traffic.read - 2 * 4096) <= 64 and abs(traffic.written - 2 * 4096) <= 64  # a sector at either end
    with interpreted.Traffic() as traffic:
        _product[(1,)](out, out, torch.empty(64, 64), PRECISION="ieee", BLOCK=64)
    assert traffic.operations == 2 * 64**3
