"""Native DoRA, adapters and prefixes: what of each op a CPU computes itself, on every instruction set."""

import pytest
import torch

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.reference import bottleneck_adapter as reference_adapter
from peft_ops.reference import dora as reference_dora
from peft_ops.reference import gated as reference_gated
from peft_ops.reference.activations import ACTIVATIONS, activate, derivative

try:
    from peft_ops.kernels.cpu import bottleneck_adapter, dora, gated
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


def truths(z, activation):
    return activate(z, activation), derivative(z, activation)


def activated(z, activation):
    """act(z) and act'(z), as the native gated product gives them."""
    one = torch.ones_like(z)[None]
    h, slope, _ = gated.gated_gradients(one.clone(), z[None], one, activation)
    return h[0], slope[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(isa, activation):
    """As near to float64 as float32 comes, and finite where the reference is."""
    large = torch.logspace(-45, 38, 997)
    z = torch.cat([torch.linspace(-20, 20, 9001), large, -large, torch.tensor([0.0, 1e-45, -89, -104])])
    results = activated(z, activation), truths(z, activation), truths(z.double(), activation)
    for ours, plain, truth in zip(*results, strict=True):
        finite = plain.isfinite()  # the derivative of gelu_new is not where z² overflows
        assert torch.equal(ours.isfinite(), finite)
        error = (ours.double() - truth).abs() / (1 + truth.abs())
        assert error[finite].max() < 2.5e-7
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for ours, other in zip(activated(special, activation), truths(special, activation), strict=True):
        assert torch.equal(ours.isfinite(), other.isfinite())


def test_gelu_is_accurate_in_its_lower_tail(isa):
    z = torch.linspace(-10, 0, 1001)[:-1]
    exact = 0.5 * z.double() * torch.special.erfc(-z.double() * 0.5**0.5)
    assert ((activated(z, "gelu")[0] - exact) / exact).abs().max() < 5e-6


@pytest.mark.parametrize("layout", ["as it is", "transposed", "sliced"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N"), [(0, 5), (1, 9), (13, 70), (3, 17000)])
def test_gated(isa, M, N, dtype, activation, layout):
    dh, g, u = (laid_out(torch.randn(M, N).to(dtype), layout) for _ in range(3))
    if M == 0:
        assert gated.gated(g, u, activation).shape == (M, N)
        return
    assert_matches("h", gated.gated, reference_gated.gated, (g, u, activation))
    ours = lambda dh, *rest: gated.gated_gradients(dh.clone(), *rest)
    reference = lambda dh, *rest: reference_gated.gated_gradients(dh.clone(), *rest)
    assert_matches("h dg du", ours, reference, (dh, g, u, activation), times=3)


def test_gated_gradients_in_the_memory_of_dh_count_as_a_write():
    dh, g, u = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    before = dh._version
    _, dg, _ = gated.gated_gradients(dh, g, u, "silu")
    assert (dg.data_ptr(), dh._version > before) == (dh.data_ptr(), True)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "linear"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N", "R"), [*SIZES, (20, 96, 256)])
def test_the_way_up_from_a_bottleneck(isa, M, N, R, dtype, activation):
    s, bias, weight, up_bias = torch.randn(M, R), torch.randn(R), torch.randn(N, R), torch.randn(N, dtype=dtype)
    for shift, up_shift, residual, out in (
        (bias, up_bias, torch.randn(M, N, dtype=dtype), dtype),
        (None, None, None, dtype),
        (None, up_bias, laid_out(torch.randn(M, N), "transposed"), dtype),
        (bias, None, laid_out(torch.randn(M, N).to(dtype), "sliced"), torch.float32),
    ):
        arguments = (s, shift, weight, up_shift, activation, 0.7, residual)
        ours, same = (f(*arguments, out) for f in (bottleneck_adapter.up_project, reference_adapter.up_project))
        exact = reference_adapter.up_project(*map(double, arguments), torch.float64)
        assert_as_accurate("y", ours, same, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N", "R"), SIZES)
def test_gradients_of_the_way_up(isa, M, N, R, dtype, layout):
    dy = laid_out(torch.randn(M, N).to(dtype), layout)
    s, bias, weight = torch.randn(M, R), torch.randn(R), torch.randn(N, R)
    functions = bottleneck_adapter.up_project_gradients, reference_adapter.up_project_gradients
    for shift, need_weight, need_bias in ((bias, True, True), (None, False, True), (bias, True, False)):
        arguments = (dy, s, shift, weight, "gelu", 0.7, need_weight, need_bias)
        assert_matches("dz dweight dup_bias", *functions, arguments, times=3)


@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_the_number_of_threads(isa):
    w, dy, u = (torch.randn(300, 700, dtype=torch.bfloat16) for _ in range(3))
    weight, a, b, g = nf4.quantize(w), torch.randn(16, 700), torch.randn(300, 16), torch.rand(700)

    def results():
        yield from (dora.dora_norm(t, a, b, 1.0) for t in (w, laid_out(w, "transposed"), weight))
        yield from dora.dora_gradients(dy, u, g, True)
        yield gated.gated(dy, u, "gelu")
        yield from bottleneck_adapter.up_project_gradients(dy, b, None, a.t(), "silu", 1.0, True, True)
        yield bottleneck_adapter.up_project(b, None, a.t(), None, "silu", 1.0, u, u.dtype)

    two = list(results())
    torch.set_num_threads(1)
    assert all(torch.equal(ours, other) for ours, other in zip(two, results(), strict=True))
