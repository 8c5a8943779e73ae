"""ops.nf4_linear against its formula in float64: on the reference, on the kernels in the interpreter, on a GPU."""

import os
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import _backend, nf4
from peft_ops._backend import implementation
from peft_ops.ops import nf4_linear
from peft_ops.reference import formulas

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = "cpu" in implementation("nf4_linear", torch.empty(0)).__name__
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def problem(M=5, N=37, K=128, dtype=torch.float32, device="cpu", blocksize=64, double_quant=False, bias=True):
    """(x, weight, bias, dy): leaves x and bias, and the gradient of y."""
    weight = nf4.quantize(torch.randn(N, K) * max(K, 1) ** -0.5, blocksize, double_quant).to(device)
    x = torch.randn(M, K).to(device, dtype).requires_grad_()
    b = torch.randn(N).to(device, dtype).requires_grad_() if bias else None
    return x, weight, b, torch.randn(M, N).to(device, dtype)


def run(function, x, weight, bias, dy):
    """{name: tensor}: y, dx and dbias."""
    y = function(x, weight, bias)
    wanted = [t for t in (x, bias) if t is not None and t.requires_grad]
    return dict(zip(("y", "dx", "dbias"), (y, *torch.autograd.grad(y, wanted, dy)), strict=False))


def rounded_formula(dtype):
    """The formula on the weight values that x of `dtype` meets: rounded once to it, in both directions."""

    def function(x, weight, bias):
        w = nf4.dequantize(weight, dtype).to(x.dtype)
        return torch.nn.functional.linear(x, w, bias)

    return function


def assert_accurate(x, weight, bias, dy):
    double = lambda t: None if t is None else t.detach().double().requires_grad_()
    ours = run(nf4_linear, x, weight, bias, dy)
    same_dtype = run(formulas.nf4_linear, x, weight, bias, dy)
    exact = run(rounded_formula(x.dtype), double(x), weight, double(bias), dy.double())
    for name in exact:
        assert_as_accurate(name, ours[name], same_dtype[name], exact[name], times=2.0 if name == "y" else 3.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize", "double_quant"),
    [
        (1, 37, 128, 64, False), (3, 67, 192, 64, True), (17, 131, 64, 32, True), (70, 37, 128, 64, False),
        (3, 37, 256, 256, False), (3, 21, 100, 64, True), (17, 23, 53, 32, False), (2, 7, 1, 64, False),
        (3, 1, 64, 64, True),
    ],
)  # fmt: skip
def test_forward_and_gradients(device, dtype, M, N, K, blocksize, double_quant):
    """Prime sizes, tails, one row and many, blocks that end with the rows of W and blocks that do not."""
    assert_accurate(*problem(M, N, K, dtype, device, blocksize, double_quant))


def test_no_bias_and_frozen_x(device):
    x, weight, bias, dy = problem(bias=False, device=device)
    assert_accurate(x, weight, bias, dy)
    frozen, _, bias, _ = problem(device=device)
    nf4_linear(frozen.detach(), weight, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum(0))
    assert not nf4_linear(frozen.detach(), weight).requires_grad


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 2^15 elements, on every path."""
    paths = ("peft_ops.reference.nf4_linear", "peft_ops.kernels.cpu.nf4_linear")
    for path in paths if NATIVE else paths[:1]:
        monkeypatch.setattr(f"{path}._SLAB", 1 << 15)
    if find_spec("triton"):
        monkeypatch.setattr("peft_ops.kernels.configs.NF4_SLAB_BYTES", 1 << 16)


@pytest.mark.usefixtures("small_slabs")
def test_large_weight_in_slabs():
    """More than one slab in both directions, rows of blocks that cross them, and a bias that is cut with them."""
    for K in (512, 520):
        assert_accurate(*problem(M=70, N=220, K=K))


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("M", "N", "K"), [(5, 37, 128), (70, 220, 512), (70, 37, 520), (0, 37, 128)])
def test_dx_added_in_place(M, N, K, dtype, device):
    """Onto a buffer that other products are in already: whole, in slabs, with few rows, with none."""
    _, weight, _, dy = problem(M, N, K, dtype, device)
    onto = torch.randn(M, K, device=device).to(dtype)
    w = nf4.dequantize(weight, dtype)
    exact, same = onto.double() + dy.double() @ w.double(), onto + dy @ w
    dx = implementation("nf4_linear", dy).nf4_linear_dx_add_(buffer := onto.clone(), dy, weight)
    assert dx is buffer
    if M:
        assert_as_accurate("dx", dx, same, exact, times=3.0)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_dimensions_of_x(device, shape):
    _, weight, bias, _ = problem(K=64, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    dy = torch.randn(*shape[:-1], 37, device=device)
    y = nf4_linear(x, weight, bias)
    y.backward(dy)
    w = nf4.dequantize(weight)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, dy @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(device, shape):
    _, weight, bias, _ = problem(K=64, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = nf4_linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 37)
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize(("N", "K"), [(0, 64), (5, 0)])
def test_weight_without_elements(device, N, K):
    x, weight, bias, dy = problem(3, N, K, device=device)
    y = nf4_linear(x, weight, bias)
    torch.testing.assert_close(y, bias.expand(3, N))
    y.backward(dy)
    assert torch.equal(x.grad, torch.zeros(3, K, device=device))


@pytest.mark.parametrize("M", [3, 20])
def test_strides_of_x_and_of_the_gradient(device, M):
    """Sliced, transposed, and stride-0 (what .sum() sends back)."""
    _, weight, bias, dy = problem(M, device=device)
    wide = torch.randn(2 * M, 400, device=device)
    for x in (wide[::2, 3:131], wide[:M, : 2 * 128 : 2], torch.randn(128, M, device=device).t()):
        for grad in (dy, torch.randn(37, M, device=device).t(), torch.randn(M, 80, device=device)[:, ::2][:, :37],
                     torch.ones((), device=device).expand(M, 37)):  # fmt: skip
            assert_accurate(x.detach().requires_grad_(), weight, bias, grad)


def test_sum_backward(device):
    x, weight, bias, _ = problem(device=device)
    nf4_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, nf4.dequantize(weight).sum(0).expand(5, 128), rtol=1e-5, atol=1e-5)
    assert torch.equal(bias.grad, torch.full((37,), 5.0, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [5, 20])
def test_nan_stays_in_its_row(device, dtype, M):
    x, weight, bias, dy = problem(M, dtype=dtype, device=device)
    clean = run(nf4_linear, x, weight, bias, dy)
    with torch.no_grad():
        x[2, 5], dy[3, 1] = float("nan"), float("inf")
    dirty = run(nf4_linear, x, weight, bias, dy)
    for name, row in (("y", 2), ("dx", 3)):
        others = torch.arange(M, device=device) != row
        assert torch.equal(clean[name][others], dirty[name][others]), name
        assert not dirty[name][row].isfinite().any()


def test_fp16_overflow_is_infinite_where_torch_is():
    x, weight, _, _ = problem(M=3, K=64, dtype=torch.float16, bias=False)
    with torch.no_grad():
        x[1] = 60000.0 * nf4.dequantize(weight, torch.float32)[7].sign()
    ours, torchs = nf4_linear(x, weight), formulas.nf4_linear(x, weight, None)
    assert ours[1, 7].isinf()
    assert torch.equal(ours.isinf(), torchs.isinf())


def test_cancellation(device):
    """Large values that cancel: the sum is of their small differences."""
    x, weight, bias, dy = problem(4, 16, 256, device=device)
    with torch.no_grad():
        x[:, :128] *= 1e4
        x[:, 128:] = -x[:, :128] + torch.randn(4, 128, device=device)
    assert_accurate(x, weight, bias, dy)


@pytest.mark.parametrize("M", [3, 70])
def test_saves_nothing_but_references(device, M):
    """No decoded weight, no x: saved_tensors_hooks see what torch saves, and the graph holds the packed bytes."""
    x, weight, bias, _ = problem(M, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = nf4_linear(x, weight, bias)
    assert saved == []
    assert y.grad_fn is not None


@pytest.mark.parametrize("double_quant", [False, True])
def test_inputs_stay_as_they_were(device, double_quant):
    x, weight, bias, dy = problem(device=device, double_quant=double_quant)
    tensors = {"x": x, "bias": bias, "dy": dy, **weight._tensors()}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    run(nf4_linear, x, weight, bias, dy)
    for name, t in tensors.items():
        assert torch.equal(t.detach(), before[name]), name


@pytest.mark.parametrize("M", [1, 20])
def test_repeats_are_equal(device, M):
    """The same call twice, and one graph walked twice, bit for bit."""
    x, weight, bias, dy = problem(M, device=device)
    first, second = (run(nf4_linear, x, weight, bias, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    y = nf4_linear(x, weight, bias)
    once, twice = (torch.autograd.grad(y, (x, bias), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_double_backward_raises():
    x, weight, bias, dy = problem()
    (dx,) = torch.autograd.grad(nf4_linear(x, weight, bias), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(device, reentrant):
    x, weight, bias, dy = problem(device=device)
    plain = run(nf4_linear, x, weight, bias, dy)
    y = checkpoint(nf4_linear, x, weight, bias, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(x.grad, plain["dx"])
    assert torch.equal(bias.grad, plain["dbias"])


@pytest.mark.parametrize("M", [3, 20])
def test_autocast(device, M):
    """x is cast as by nn.Linear; gradients keep the dtypes of their leaves."""
    x, weight, bias, _ = problem(M, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = nf4_linear(x, weight, bias)
    y.float().square().sum().backward()
    w = nf4.dequantize(weight, torch.bfloat16)
    expected = torch.nn.functional.linear(x.detach().double(), w.double(), bias.detach().double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() / expected.norm() < 8e-3
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    truth = 2 * expected @ w.double()
    assert (x.grad.double() - truth).norm() / truth.norm() < 2e-2


def test_bias_of_another_dtype(device):
    """A float32 bias on a 16-bit x; its gradient is summed in its own dtype."""
    x, weight, _, dy = problem(dtype=torch.bfloat16, device=device, bias=False)
    bias = torch.randn(37, device=device, requires_grad=True)
    y = nf4_linear(x, weight, bias)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(bias.grad, dy.float().sum(0))
    expected = torch.nn.functional.linear(x.double(), nf4.dequantize(weight, x.dtype).double(), bias.double())
    assert (y.double() - expected).norm() / expected.norm() < 8e-3


def test_float64(device):
    x, weight, bias, dy = problem(dtype=torch.float64, device=device)
    ours, exact = run(nf4_linear, x, weight, bias, dy), run(rounded_formula(torch.float64), x, weight, bias, dy)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name])


def test_inference_mode(device):
    x, weight, bias, _ = problem(device=device)
    expected = nf4_linear(x, weight, bias).detach()
    with torch.inference_mode():
        y = nf4_linear(x, weight, bias)
    assert torch.equal(y, expected)
    assert y.is_inference()


def test_function_transforms_take_the_formula():
    x, weight, bias, dy = problem()
    batched = torch.vmap(lambda row: nf4_linear(row, weight, bias))(x)
    torch.testing.assert_close(batched, nf4_linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    grad = torch.func.grad(lambda x: (nf4_linear(x, weight, bias) * dy).sum())(x.detach())
    torch.testing.assert_close(grad, dy @ nf4.dequantize(weight), rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    x, weight, bias, _ = problem()
    with pytest.raises(TypeError, match="weight must be an NF4Weight, got Tensor"):
        nf4_linear(x, torch.zeros(37, 128), bias)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        nf4_linear(torch.zeros(3, 128, dtype=torch.int64), weight, bias)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.complex64"):
        nf4_linear(torch.zeros(3, 128, dtype=torch.complex64), weight, bias)
    with pytest.raises(ValueError, match=r"x must be \[..., 128\] to fit weight \(37, 128\), got \(3, 127\)"):
        nf4_linear(torch.zeros(3, 127), weight, bias)
    with pytest.raises(ValueError, match=r"bias must be \[37\] to fit weight \(37, 128\), got \(36,\)"):
        nf4_linear(x, weight, torch.zeros(36))
    with pytest.raises(ValueError, match=r"weight must be \[out_features, in_features\], got \(64,\)"):
        nf4_linear(x, nf4.quantize(torch.zeros(64)))
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        nf4_linear(x, weight.to("meta"))


@pytest.mark.unpoisoned
@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be traced; tests/aot captures the kernels")
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiles_whole_and_silently(double_quant, monkeypatch):
    """fullgraph, forward and backward, the same bits as the reference, which is what is captured; no warning."""
    monkeypatch.setattr(_backend, "_FORCED", _backend.REFERENCE)
    x, weight, bias, dy = problem(double_quant=double_quant)
    compiled = torch.compile(lambda x, bias: nf4_linear(x, weight, bias), backend="aot_eager", fullgraph=True)
    plain = run(nf4_linear, x, weight, bias, dy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ours = run(lambda x, weight, bias: compiled(x, bias), x, weight, bias, dy)
    assert [str(w.message) for w in caught if "nf4" in str(w.message) or w.category is UserWarning] == []
    for name in plain:
        assert torch.equal(ours[name], plain[name]), name
