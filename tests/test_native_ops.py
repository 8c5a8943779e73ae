"""Native DoRA, adapters and prefixes: what of each op a CPU computes itself, on every instruction set."""

import pytest
import torch

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.reference import dora as reference_dora

try:
    from peft_ops.kernels.cpu import dora
except ImportError:
    dora = None

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (13, 64, 3), (37, 131, 16), (70, 300, 40)]


def double(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def assert_matches(names, ours, reference, arguments, times=2.0):
    """ours(*arguments) against the yardstick of the reference; a result may be None on both sides."""
    as_tuple = lambda t: t if isinstance(t, tuple) else (t,)
    results = (
        as_tuple(f(*a)) for f, a in ((ours, arguments), (reference, arguments), (reference, map(double, arguments)))
    )
    for name, out, same, exact in zip(names.split(), *results, strict=True):
        assert (out is None) == (same is None), name
        if out is not None:
            assert_as_accurate(name, out, same, exact, times)


def laid_out(t, layout):
    """t with other strides."""
    match layout:
        case "transposed":
            return t.t().contiguous().t()
        case "sliced":
            return t.repeat(1, 2)[:, : t.shape[1]]
        case "every second":
            return t.repeat_interleave(2, 1)[:, ::2]
    return t


LAYOUTS = ["as it is", "transposed", "sliced", "every second"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "K", "R"), SIZES)
def test_norms_of_a_dense_weight(isa, N, K, R, dtype, layout):
    w = laid_out(torch.randn(N, K).to(dtype), layout)
    a, b = torch.randn(R, K), torch.randn(N, R, dtype=dtype)
    assert_matches("norm", dora.dora_norm, reference_dora.dora_norm, (w, a, b, 0.3))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("N", "K", "R"), SIZES)
def test_norms_of_a_4_bit_weight(isa, N, K, R, double_quant):
    weight, a, b = nf4.quantize(torch.randn(N, K), 64, double_quant), torch.randn(R, K), torch.randn(N, R)
    norm, dense = dora.dora_norm(weight, a, b, 0.3), nf4.dequantize(weight)
    same, exact = (reference_dora.dora_norm(*t, 0.3) for t in ((dense, a, b), map(double, (dense, a, b))))
    assert_as_accurate("norm", norm, same, exact)


@pytest.mark.parametrize("layout", ["as it is", "transposed"])
def test_norms_of_rows_that_vanish_or_overflow_or_are_none(isa, layout):
    w, a, b = torch.randn(40, 70), torch.randn(2, 70), torch.randn(40, 2)
    w[3], b[3] = 0, 0
    w[5, 7], w[9, 69], b[11, 1] = float("nan"), 3e38, float("inf")
    norm = dora.dora_norm(laid_out(w, layout), a, b, 1.0)
    expected = reference_dora.dora_norm(w, a, b, 1.0)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    assert norm[[3]].eq(1e-18).all()
    assert norm[[5]].isnan().all()
    assert norm[[9, 11]].isinf().all()


def test_a_weight_of_no_plain_memory_is_copied(isa):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return function(*(t.inner if isinstance(t, cls) else t for t in args), **(kwargs or {}))

    w, a, b = torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    assert torch.equal(dora.dora_norm(Wrapper(w), a, b, 0.5), dora.dora_norm(w, a, b, 0.5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N", "R"), SIZES)
def test_dora_linear(isa, M, N, R, dtype):
    K = 24
    x, w, s = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(M, R)
    b, g, bias = torch.randn(N, R), torch.rand(N) + 0.5, torch.randn(N, dtype=dtype)
    for keep_u in (True, False):
        for shift in (bias, None):
            arguments = (x, w, shift, s, b, 0.3, g, keep_u)
            assert_matches("y u", dora.dora_linear, reference_dora.dora_linear, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (13, 70), (200, 131)])
def test_dora_gradients(isa, M, N, dtype, layout):
    dy, u, g = laid_out(torch.randn(M, N).to(dtype), layout), torch.randn(M, N, dtype=dtype), torch.rand(N) + 0.5
    for out, need_dz in ((u, True), (None, True), (u, False)):
        assert_matches("dz dg", dora.dora_gradients, reference_dora.dora_gradients, (dy, out, g, need_dz), times=3)


def test_dora_of_no_rows(isa):
    x, w, s = torch.empty(0, 8), torch.randn(5, 8), torch.empty(0, 2)
    b, g = torch.randn(5, 2), torch.rand(5)
    y, u = dora.dora_linear(x, w, None, s, b, 1.0, g, True)
    dz, dg = dora.dora_gradients(y, u, g, True)
    assert y.shape == u.shape == dz.shape == (0, 5)
    assert torch.equal(dg, torch.zeros(5))


@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_the_number_of_threads(isa):
    w, dy, u = (torch.randn(300, 700, dtype=torch.bfloat16) for _ in range(3))
    weight, a, b, g = nf4.quantize(w), torch.randn(16, 700), torch.randn(300, 16), torch.rand(700)

    def results():
        yield from (dora.dora_norm(t, a, b, 1.0) for t in (w, laid_out(w, "transposed"), weight))
        yield from dora.dora_gradients(dy, u, g, True)

    two = list(results())
    torch.set_num_threads(1)
    assert all(torch.equal(ours, other) for ours, other in zip(two, results(), strict=True))
