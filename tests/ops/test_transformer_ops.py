"""linear, mlp and add_layer_norm: forward and every gradient against float64, for each instruction set."""

import importlib
import itertools

import pytest
import torch

from stmae import ops, reference
from tests.support.tolerance import assert_as_good_as

DTYPES = [torch.float32, torch.bfloat16]
linear = importlib.import_module("stmae.ops.linear")  # the name in stmae.ops is the function's


def tensors(op, rows, width, hidden, dtype):
    """Arguments of `op`; parameters stay float32, as under autocast."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    if op == "linear":
        return [normal(rows, width, dtype=dtype), normal(hidden, width), normal(hidden)]
    if op == "mlp":
        return [normal(rows, width, dtype=dtype), normal(hidden, width), normal(hidden), normal(width, hidden), normal(width)]
    return [2 * normal(rows, width, dtype=dtype) + 1, normal(rows, width, dtype=dtype), normal(width), normal(width)]


def run(function, arguments, *, seed=0):
    """(results, gradients of every argument), for a random upstream gradient."""
    arguments = [argument.detach().clone().requires_grad_() for argument in arguments]
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in results]
    torch.autograd.backward(results, upstream)
    return [result.detach() for result in results] + [argument.grad for argument in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width,hidden", [(1, 8, 8), (7, 40, 72), (65, 100, 33), (200, 64, 256)])
@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_forward_and_gradients(op, rows, width, hidden, dtype, capability, nan_filled):
    arguments = tensors(op, rows, width, hidden, dtype)
    plain = run(getattr(reference, op), arguments)
    exact = run(getattr(reference, op), [argument.double() for argument in arguments])
    kernel = run(getattr(ops, op), arguments)
    assert len(kernel) == len(plain) == len(exact)
    for index, (p, e, k) in enumerate(zip(plain, exact, kernel)):
        # GELU's polynomial errs by 7.5e-8 in Phi, about as much as a float32 erf; the sums behind it carry that on.
        assert_as_good_as(p, e, k, factor=4 if op == "mlp" else 3, name=f"{op}[{index}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp_in_pieces(dtype):
    """More rows than go through at a time, and a rest."""
    arguments = tensors("mlp", 2 * ops.mlp.__globals__["ROWS"] + 3, 16, 24, dtype)
    plain, kernel = run(reference.mlp, arguments), run(ops.mlp, arguments)
    exact = run(reference.mlp, [argument.double() for argument in arguments])
    for index, (p, e, k) in enumerate(zip(plain, exact, kernel)):
        assert_as_good_as(p, e, k, factor=4, name=f"mlp[{index}]")


def test_gelu_over_its_whole_range(capability):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e30, -1e30])])
    exact = torch.nn.functional.gelu(x.double())
    assert ((torch.ops.stmae.gelu(x) - exact).abs() <= 2e-7 * (1 + x.abs())).all()
    assert torch.ops.stmae.gelu(torch.tensor([float("nan")])).isnan().all()
    assert torch.ops.stmae.gelu(torch.tensor([float("inf")])).isposinf().all()

    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)  # all there are
    exact, out = torch.nn.functional.gelu(x.double()), torch.ops.stmae.gelu(x)
    usual = x.abs() < 1e30
    assert ((out - exact).abs() <= 5e-3 * exact.abs() + 1e-6)[usual].all()
    assert torch.equal(out.isnan(), exact.isnan())


@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_autocast_casts_as_torch_does(op):
    arguments = tensors(op, 9, 24, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain, kernel = run(getattr(reference, op), arguments), run(getattr(ops, op), arguments)
    exact = run(getattr(reference, op), [argument.double() for argument in arguments])
    for index, (p, e, k) in enumerate(zip(plain, exact, kernel)):
        assert_as_good_as(p, e, k, factor=3, name=f"{op}[{index}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_dispatcher_contract(op, dtype):
    arguments = [argument.requires_grad_() for argument in tensors(op, 6, 16, 24, dtype)]
    if op == "add_layer_norm":
        torch.library.opcheck(torch.ops.stmae.add_layer_norm, (*arguments, 1e-6, torch.bfloat16))
    else:
        torch.library.opcheck(getattr(torch.ops.stmae, op), tuple(arguments))


@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_compiles_without_graph_breaks(op):
    arguments = tensors(op, 6, 16, 24, torch.float32)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    for eager, other in zip(run(getattr(ops, op), arguments), run(compiled, arguments)):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_results_do_not_depend_on_threads(op, threads):
    arguments = tensors(op, 150, 96, 128, torch.float32)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(getattr(ops, op), arguments))
    # The matrix library may split a product otherwise; the sums over rows are ours and may not change.
    for other in results[1:]:
        for first, second in zip(results[0], other):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)
            if op == "add_layer_norm":
                assert torch.equal(first, second)


@pytest.mark.parametrize("op", ["linear", "mlp", "add_layer_norm"])
def test_double_backward_is_refused(op):
    arguments = [argument.requires_grad_() for argument in tensors(op, 3, 8, 8, torch.float32)]
    result = getattr(ops, op)(*arguments)
    result = result[1] if isinstance(result, tuple) else result
    (grad,) = torch.autograd.grad(result.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        grad.sum().backward()


@pytest.fixture
def own_products(monkeypatch):
    """The kernels of this package multiply every matrix of a linear layer, on whatever processor."""
    monkeypatch.setattr(linear, "FEWEST_ROWS", dict.fromkeys(DTYPES, 1))
    before = linear._backend
    ops.set_linear_backend("stmae")
    yield
    ops.set_linear_backend(before)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weight {dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width,hidden", [(1, 2, 1), (7, 40, 72), (65, 100, 33), (66, 31, 65), (97, 130, 49), (600, 48, 96)])
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_own_products(op, rows, width, hidden, dtype, weight_dtype, capability, nan_filled, own_products):
    arguments = tensors(op, rows, width, hidden, dtype)
    arguments = [arguments[0], *(parameter.to(weight_dtype) for parameter in arguments[1:])]
    plain = run(getattr(reference, op), arguments)
    exact = run(getattr(reference, op), [argument.double() for argument in arguments])
    kernel = run(getattr(ops, op), arguments)
    for index, (p, e, k) in enumerate(zip(plain, exact, kernel)):
        assert k.dtype == p.dtype
        assert_as_good_as(p, e, k, factor=4 if op == "mlp" else 3, name=f"{op}[{index}]")


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weight {dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_products_of_many_rows(dtype, weight_dtype, own_products):
    """More rows than a weight's gradient packs at a time, and a rest."""
    arguments = tensors("linear", 3 * 2048 + 5, 20, 70, dtype)
    arguments = [arguments[0], *(parameter.to(weight_dtype) for parameter in arguments[1:])]
    plain, kernel = run(reference.linear, arguments), run(ops.linear, arguments)
    exact = run(reference.linear, [argument.double() for argument in arguments])
    for index, (p, e, k) in enumerate(zip(plain, exact, kernel)):
        assert_as_good_as(p, e, k, factor=3, name=f"linear[{index}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,width,hidden", [(2100, 96, 200), (600, 520, 70), (65, 48, 530)])
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_own_products_do_not_depend_on_threads(op, rows, width, hidden, dtype, own_products, threads):
    """Few rows and many columns: each panel is multiplied as soon as it is packed, but not where threads are many."""
    arguments = tensors(op, rows, width, hidden, dtype)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(run(getattr(ops, op), arguments))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other))
    plain, exact = (run(getattr(reference, op), inputs) for inputs in (arguments, [a.double() for a in arguments]))
    for index, (p, e, k) in enumerate(zip(plain, exact, results[1])):
        assert_as_good_as(p, e, k, factor=4, name=f"{op}[{index}]")


@pytest.mark.parametrize("backend", ["stmae", "torch"])
def test_bfloat16_gradients_of_many_pieces_are_rounded_once(backend):
    arguments = tensors("mlp", 24 * ops.mlp.__globals__["ROWS"], 8, 16, torch.bfloat16)
    arguments = [argument.bfloat16() for argument in arguments]
    before = linear._backend
    ops.set_linear_backend(backend)
    try:
        kernel = run(ops.mlp, arguments)
    finally:
        ops.set_linear_backend(before)
    exact = run(reference.mlp, [argument.double() for argument in arguments])
    for index in (2, 4):
        assert (kernel[index] - exact[index]).norm() < 4e-3 * exact[index].norm()


def test_a_weight_gradient_without_rows_is_zero_or_what_there_was():
    for add in (False, True):
        out = torch.ones(3, 4)
        torch.ops.stmae.linear_weight_gradient(out, torch.zeros(0, 3), torch.zeros(0, 4), add)
        assert (out == float(add)).all()


@pytest.mark.parametrize("op", ["linear", "mlp", "attention", "attention_qkvpacked"])
def test_before_what_has_no_gradient(op):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    if op == "attention":
        arguments = [torch.rand(1, 5, 2, 8) for _ in range(3)]
    elif op == "attention_qkvpacked":
        arguments = [torch.rand(1, 5, 3, 2, 8)]
    else:
        arguments = tensors(op, 5, 8, 16, torch.float32)
    arguments = [argument.requires_grad_() for argument in arguments]
    Cut.apply(getattr(ops, op)(*arguments)).sum().backward()
    assert all(argument.grad is None for argument in arguments)


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_nothing_is_computed_for_frozen_arguments(op, rows, own_products, monkeypatch):
    arguments = tensors(op, rows, 16, 32, torch.float32)
    out = [torch.randn(rows, 32 if op == "linear" else 16, generator=torch.Generator().manual_seed(1))]
    expected = run(getattr(ops, op), arguments, seed=1)[1:]
    multiply, calls = linear._weight_gradient, []
    monkeypatch.setattr(linear, "_weight_gradient", lambda *arguments: calls.append(multiply(*arguments)))
    for wanted in itertools.product([False, True], repeat=len(arguments)):
        if not any(wanted):
            continue
        leaves = [argument.clone().requires_grad_(want) for argument, want in zip(arguments, wanted)]
        calls.clear()
        torch.autograd.backward([getattr(ops, op)(*leaves)], out)
        assert len(calls) == sum(wanted[1::2])
        for leaf, want, gradient in zip(leaves, wanted, expected):
            assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


def test_own_products_of_strided_matrices(own_products):
    for dtype in DTYPES:
        x, weight, bias = tensors("linear", 70, 32, 48, dtype)
        expected = run(ops.linear, (x, weight, bias))
        strided = x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]
        for first, second in zip(expected, run(ops.linear, strided)):
            assert torch.equal(first, second)


def test_own_products_pass_on_infinity_and_nan(own_products, capability):
    for dtype in DTYPES:
        arguments = tensors("linear", 70, 32, 48, dtype)
        arguments[0][3, 4], arguments[0][5, 6] = float("nan"), float("inf")
        arguments[1][7, 6] = 0.0
        out = ops.linear(*arguments)
        assert out[3].isnan().all() and out[5, 7].isnan() and out[5, :7].isinf().all()
        assert out[[row for row in range(70) if row not in (3, 5)]].isfinite().all()


@pytest.mark.parametrize(
    "shapes,message",
    [
        ([(4, 6), (4, 8), (5, 8)], r"expected out \[4, 5\] bfloat16, got \[4, 6\]"),
        ([(4, 5), (4, 8), (5, 9)], r"expected weight \[\*, 8\] .*, got \[5, 9\]"),
        ([(4, 5), (4, 3), (5, 3)], "in bfloat16 an even one, got 3"),
        ([(4, 5), (4, 0), (5, 0)], "a positive depth"),
    ],
)
def test_own_products_refuse_what_does_not_fit(shapes, message):
    out, x, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stmae.linear_product(out, x, weight, None, False)
    with pytest.raises(RuntimeError, match=r"linear_weight_gradient: expected x \[4, \*\] bfloat16, got \[3, "):
        torch.ops.stmae.linear_weight_gradient(weight, out, x[1:], False)
    with pytest.raises(RuntimeError, match="linear_product: expected x contiguous"):
        torch.ops.stmae.linear_product(out, out.new_zeros(8, 4).t(), weight, None, False)


def test_linear_backends_agree():
    x, weight, bias = tensors("linear", 600, 64, 48, torch.float32)
    exact = run(reference.linear, [t.double() for t in (x, weight, bias)])
    plain, before = run(reference.linear, (x, weight, bias)), linear._backend
    try:
        for name in ("stmae", "onednn", "torch"):
            ops.set_linear_backend(name)
            for p, e, k in zip(plain, exact, run(ops.linear, (x, weight, bias))):
                assert_as_good_as(p, e, k, factor=3, name=name)
    finally:
        ops.set_linear_backend(before)
    with pytest.raises(ValueError, match="expected one of 'auto', 'stmae', 'onednn', 'torch', got 'mkl'"):
        ops.set_linear_backend("mkl")


def test_empty_batch():
    for op in ("linear", "mlp", "add_layer_norm"):
        results = run(getattr(ops, op), tensors(op, 0, 8, 16, torch.float32))
        assert all(not result.isnan().any() for result in results)


def test_residual_without_branch_or_with_one_output_unused():
    x, branch, weight, bias = tensors("add_layer_norm", 5, 16, 0, torch.float32)
    total, out = ops.add_layer_norm(x, None, weight, bias)
    assert total is x
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-6))
    for used in (0, 1):
        grads = []
        for module in (ops, reference):
            leaves = [t.clone().requires_grad_() for t in (x, branch)]
            module.add_layer_norm(*leaves, weight, bias)[used].square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "op,index,value,message",
    [
        ("linear", 0, torch.zeros(3, 8, dtype=torch.int32), r"linear: expected x .* got \[3, 8\] int32 on cpu"),
        ("linear", 1, torch.zeros(4, 9), r"linear: expected weight \[N, K\] .* got \[4, 9\]"),
        ("linear", 2, torch.zeros(5), r"linear: expected bias \[N\] .* got \[5\]"),
        ("linear", 1, torch.zeros(8, 8, device="meta"), r"linear: expected all tensors on one device, got x on cpu, weight on"),
        ("mlp", 3, torch.zeros(8, 9), r"mlp: expected fc2_weight \[D, F\] .* got \[8, 9\]"),
        ("mlp", 2, None, r"mlp: expected fc1_bias \[F\] .* got NoneType None"),
        ("add_layer_norm", 1, torch.zeros(3, 9), r"add_layer_norm: expected branch .* got \[3, 9\]"),
        ("add_layer_norm", 2, torch.zeros(9), r"add_layer_norm: expected weight \[D\] .* got \[9\]"),
        ("add_layer_norm", 0, "x", r"add_layer_norm: expected x .* got str 'x'"),
    ],
)
def test_bad_input_is_named(op, index, value, message):
    arguments = tensors(op, 3, 8, 8, torch.float32)
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*arguments)
