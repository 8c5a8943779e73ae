"""Case 28: torch.compile captures forward and backward of every op with its Triton kernels, without a graph break.

A stub driver stands in for the GPU, so nothing is launched: what is held is the capture, by AOTAutograd, with the
kernels seen as kernels.
"""

import json

import functorch.compile
import pytest
import torch
import torch._dynamo.backends.common
import torch.utils._triton
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from peft_ops import _backend, nf4, ops
from peft_ops.kernels import configs, measured
from resources import target


class NoBinaries:
    @staticmethod
    def load_binary(name, binary, shared, device):
        return None, None, 0, 0, 1024

    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 1 << 20}


class NoLauncher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args):
        pass


class StubDriver(DriverBase):
    """A GPU for which kernels are compiled and on which none runs."""

    utils, launcher_cls = NoBinaries, NoLauncher
    is_active = classmethod(lambda cls: True)

    def __init__(self):
        self.target = target("sm_90")

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        return lambda fn, quantiles=None, **kwargs: [1.0] * 3

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def set_current_device(self, device):
        pass


@pytest.fixture
def captured(monkeypatch):
    """Names of the Triton kernels in the graphs that a compiled function was captured as."""
    names = []

    def record(graph_module, example_inputs):
        kernels = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table
        for node in graph_module.graph.nodes:
            if "kernel_idx" in node.kwargs:
                names.append(kernels.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
        return functorch.compile.make_boxed_func(graph_module.forward)

    monkeypatch.setattr(_backend, "_FORCED", _backend.TRITON)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(driver, "_active", StubDriver())
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    yield names, lambda function: torch.compile(function, backend=backend, fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_linear(captured, base, p):
    names, compiled = captured
    x, w = torch.randn(200, 64, requires_grad=True), torch.randn(32, 64)
    weight = nf4_weight(w) if base == "nf4" else w
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    compiled(lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 0.5, p))(x, a, b).sum().backward()
    forward, backward = {"_down_project_kernel"}, {"_low_rank_gradients_kernel", "_down_project_da_kernel"}
    assert forward | backward | {"_low_rank_update_kernel"} <= set(names)
    assert names.count("_low_rank_update_kernel") == 2  # y and dx


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("route", "kernel"), [("few rows", "_linear_few_rows_kernel"), ("tma", "_linear_low_rank_kernel")]
)
def test_routes(captured, monkeypatch, route, kernel):
    """Descriptors are not traced: the fused kernel stands in."""
    names, compiled = captured
    configs = _backend.implementation("linear_low_rank", torch.empty(0)).configs
    monkeypatch.setattr(configs, "linear_route", lambda *_: route)
    x, w = torch.randn(8, 64, dtype=torch.float16, requires_grad=True), torch.randn(32, 64, dtype=torch.float16)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    compiled(lambda x, a, b: ops.lora_linear(x, w, None, a, b, 0.5))(x, a, b).sum().backward()
    assert names.count(kernel) == 2


@pytest.mark.unpoisoned
def test_few_rows_over_nf4(captured):
    names, compiled = captured
    x, weight = torch.randn(8, 64, requires_grad=True), nf4_weight(torch.randn(32, 64))
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    compiled(lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 0.5))(x, a, b).sum().backward()
    assert names[:3] == ["_down_project_kernel", "_nf4_linear_kernel", "_sum_splits_low_rank_kernel"]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dora_linear(captured, base, p):
    names, compiled = captured
    x, w, m = torch.randn(200, 64, requires_grad=True), torch.randn(32, 64), torch.rand(32, requires_grad=True)
    weight = nf4_weight(w) if base == "nf4" else w
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    compiled(lambda x, a, b, m: ops.dora_linear(x, weight, None, a, b, m, 0.5, p))(x, a, b, m).sum().backward()
    forward = {"_nf4_dora_norm_kernel" if base == "nf4" else "_dora_norm_kernel", "_dora_update_kernel"}
    backward = {"_dora_gradients_kernel", "_low_rank_gradients_kernel", "_low_rank_update_kernel"}
    assert forward | backward | {"_down_project_kernel", "_down_project_da_kernel"} <= set(names)


def projection(N, K, base, p, R=4):
    """A layer with an adapter, and its trained tensors."""
    w, a, b = torch.randn(N, K), torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    return ops.Projection(nf4_weight(w) if base == "nf4" else w, None, a, b, 0.5, p)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_projections(captured, base, p):
    """One S, one update of dx and one da for all that share x."""
    names, compiled = captured
    x, projections = torch.randn(200, 64, requires_grad=True), [projection(N, 64, base, p) for N in (64, 32, 32)]
    ys = compiled(lambda x, qs: ops.lora_projections(x, qs))(x, projections)
    sum(y.sum() for y in ys).backward()
    assert names.count("_down_project_kernel") == names.count("_down_project_da_kernel") == 1
    assert names.count("_low_rank_gradients_kernel") == 3
    assert names.count("_low_rank_update_kernel") == 4  # three y and dx


@pytest.mark.unpoisoned
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gated_mlp(captured, base, p):
    names, compiled = captured
    x = torch.randn(200, 64, requires_grad=True)
    projections = [projection(*size, base, p) for size in ((128, 64), (128, 64), (64, 128))]
    compiled(lambda x, qs: ops.gated_mlp(x, *qs))(x, projections).sum().backward()
    assert names.count("_gated_kernel") == names.count("_gated_gradients_kernel") == 1
    assert names.count("_down_project_kernel") == names.count("_down_project_da_kernel") == 2  # of x and of h
    assert names.count("_low_rank_update_kernel") == 5  # g, u, y, dh and dx


@pytest.mark.unpoisoned
def test_lora_embedding(captured):
    names, compiled = captured
    x, weight = torch.randint(0, 64, (200,)), torch.randn(64, 32)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    compiled(lambda a, b: ops.lora_embedding(x, weight, a, b, 0.5))(a, b).sum().backward()
    assert names.count("_low_rank_update_kernel") == names.count("_low_rank_gradients_kernel") == 1


@pytest.mark.unpoisoned
@pytest.mark.parametrize("shuffle", [False, True])
def test_nf4_linear(captured, monkeypatch, shuffle):
    """With the inline PTX of NVIDIA too."""
    names, compiled = captured
    configs = _backend.implementation("nf4_linear", torch.empty(0)).configs
    monkeypatch.setattr(configs, "nf4_shuffle", lambda device: shuffle)
    weight, x = nf4_weight(torch.randn(32, 64)), torch.randn(200, 64, requires_grad=True)
    compiled(lambda x: ops.nf4_linear(x, weight, None))(x).sum().backward()
    assert sum(name.startswith("_nf4") for name in names) >= 2


@pytest.mark.unpoisoned
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_bottleneck_adapter(captured, residual):
    """y and dx are one kernel each, whatever the residual."""
    names, compiled = captured
    x, other = torch.randn(200, 64, requires_grad=True), torch.randn(200, 64, requires_grad=True)
    parameters = [torch.randn(*shape, requires_grad=True) for shape in ((8, 64), (8,), (64, 8), (64,))]

    def call(x, other, *parameters):
        return ops.bottleneck_adapter(x, *parameters, "gelu", 0.5, {"x": x, "other": other, None: None}[residual])

    compiled(call)(x, other, *parameters).sum().backward()
    assert names.count("_down_project_kernel") == 2  # s and dh
    assert names.count("_up_project_kernel") == 2  # y and dx
    for name in ("_bottleneck_gradient_kernel", "_up_project_gradients_kernel", "_down_project_da_kernel"):
        assert names.count(name) == 1


@pytest.mark.unpoisoned
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_tables_are_read_while_tracing(captured, base, tmp_path, monkeypatch):
    """Rows that change pass from bucket to bucket, and with them from route to route."""
    config = configs.designed("down_project", "default", torch.bfloat16)
    entries = [dict(dtype="bfloat16", rows=m, rank=16, config=config | {"BLOCK_M": m}, shared=0) for m in (16, 128)]
    fused = dict(dtype="bfloat16", rows=16, out=32, k=64, choice="fused")
    routes = {"linear": [fused, fused | dict(rows=128, choice="vendor")], "nf4_linear": [fused]}
    table = {"format": 1, "arch": "default", "kernels": {"down_project": entries}, "routes": routes}
    (tmp_path / "default.json").write_text(json.dumps(table))
    monkeypatch.setenv("PEFT_OPS_TABLES", str(tmp_path))
    measured.forget()
    names, compiled = captured
    w, (a, b) = torch.randn(32, 64).bfloat16(), (torch.randn(4, 64), torch.randn(32, 4))
    weight = nf4_weight(w.float()) if base == "nf4" else w
    call = compiled(lambda x: ops.lora_linear(x, weight, None, a, b, 0.5, 0.0))
    seen = []
    for rows in (10, 11, 200):
        call(torch.randn(rows, 64).bfloat16())
        seen.append(set(names))
        names.clear()
    if base == "dense":
        assert seen[0] == {"_down_project_kernel", "_linear_low_rank_kernel"}
        assert seen[2] == {"_down_project_kernel", "_low_rank_update_kernel"}
    else:
        assert "_nf4_linear_kernel" in seen[0] & seen[2]
    measured.forget()


def nf4_weight(w):
    """Quantised by the reference: the stub would leave the bytes unwritten."""
    packed, absmax = _backend.implementation("nf4", w.double()).nf4_quantize(w, 64)
    return nf4.NF4Weight(packed.view(w.shape[0], -1), absmax.view(w.shape[0], -1), 64, w.shape, w.dtype)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("head", ["frozen", "LoRA", "trained"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_linear_logprob(captured, base, head):
    names, compiled = captured
    hidden, w, targets = torch.randn(200, 64, requires_grad=True), torch.randn(300, 64), torch.randint(300, (200,))
    weight = nf4_weight(w) if base == "nf4" else w.requires_grad_(head == "trained")
    a, b = (torch.randn(*shape, requires_grad=True) if head == "LoRA" else None for shape in ((4, 64), (300, 4)))
    call = lambda hidden, targets: ops.linear_logprob(hidden, weight, None, targets, a, b, reference_hidden=hidden)
    compiled(call)(hidden, targets).logp.sum().backward()
    assert {"_logprob_kernel", "_logprob_gradient_kernel", "_add_product_kernel"} <= set(names)
    assert ("_down_project_da_kernel" in names) == (head == "LoRA")


@pytest.mark.unpoisoned
@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_prefix_attention(captured, p, n):
    """A short prefix has its gradients and dq in one launch, a long one in two."""
    names, compiled = captured
    q, k, v = (torch.randn(2, 4, 40, 16, requires_grad=True) for _ in range(3))
    pk, pv = (torch.randn(4, n, 16, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 40, 40) < 0.5
    compiled(lambda *t: ops.prefix_attention(*t, mask=mask, prefix_dropout_p=p))(q, k, v, pk, pv).sum().backward()
    both = ["_prefix_merge_kernel", "_prefix_gradients_kernel"]
    assert sorted(names) == sorted(both if n == 5 else [*both, "_prefix_dq_kernel"])
