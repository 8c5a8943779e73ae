"""Options and fixtures of the suites: shapes by device, one `measure` that runs a layer and notes what it costs."""

import pytest
import torch
from torch import nn

from benchmarks import machine
from benchmarks.measure import DeviceInstant, peak_bytes, sample, saved_bytes
from benchmarks.shapes import (
    DEVICE,
    DTYPE,
    ON_GPU,
    adapter_shapes,
    attention_shapes,
    decoding_shapes,
    head_shapes,
    large_head_shapes,
    linear_shapes,
    weight_shapes,
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one tiny shape for every case: a dry run of the suite")


def pytest_generate_tests(metafunc):
    config = metafunc.config
    tiny = config.getoption("--quick") or config.getoption("--benchmark-disable")
    for name, shapes in (
        ("shape", linear_shapes), ("adapter_shape", adapter_shapes), ("weight_shape", weight_shapes),
        ("attention_shape", attention_shapes), ("decoding_shape", decoding_shapes), ("head_shape", head_shapes),
        ("large_head_shape", large_head_shapes),
    ):  # fmt: skip
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, shapes(tiny), ids=str)


def pytest_collection_modifyitems(items):
    if ON_GPU:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=DeviceInstant))


def pytest_benchmark_update_machine_info(machine_info):
    for private in ("node", "python_build", "release"):
        machine_info.pop(private, None)
    machine_info.update(machine.description())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def note(benchmark, request):
    """Names the case for the groups of pytest-benchmark and for the report: note(op, shape, variant)."""

    def noted(op, shape, variant):
        benchmark.group = " ".join(filter(None, (op, str(shape), variant)))
        contender = request.node.callspec.params["contender"]
        benchmark.extra_info |= {"op": op, **shape._asdict(), "variant": variant, "contender": contender}

    return noted


@pytest.fixture
def measure(benchmark, note):
    """measure(op, build, shape, p, backward): the layer that `build` makes, forward, or forward and backward."""

    def measured(op, build, shape, p, backward):
        note(op, shape, f"p={p}" if p is not None else "")
        linear = nn.Linear(shape.K, shape.N, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
        layer = build(linear, p or 0.0)
        if p is None and not backward:
            layer.eval()  # bitsandbytes lays weights out for inference then
        leaves = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in leaves:
            nn.init.normal_(parameter, std=0.02)
        x = torch.randn(shape.M, shape.K, device=DEVICE, dtype=DTYPE, requires_grad=backward)
        dy = torch.randn(shape.M, shape.N, device=DEVICE, dtype=DTYPE)

        def step():
            if backward:
                return torch.autograd.grad(layer(x), [x, *leaves], dy)
            with torch.no_grad():
                return layer(x)

        if backward:
            owned = [x, *layer.parameters(), *layer.buffers(), linear.weight]
            benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: layer(x), owned)
        if ON_GPU:
            benchmark.extra_info["peak_bytes"] = peak_bytes(step)
        sample(benchmark, step, ON_GPU)

    return measured
