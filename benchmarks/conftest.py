"""Options and fixtures of the suites: shapes by device, one `measure` that runs a layer and notes what it costs."""

import gc
import time

import pytest
import torch
from torch import nn

from benchmarks import compare, machine, targets, variants
from benchmarks.ceilings import ceilings
from benchmarks.contenders import GRAPH, is_foreign
from benchmarks.costs import cost
from benchmarks.measure import DeviceInstant, measure_step
from benchmarks.shapes import (
    DEVICE,
    DTYPE,
    ON_GPU,
    adapter_shapes,
    attention_shapes,
    decoding_shapes,
    few_rows_shapes,
    head_shapes,
    large_head_shapes,
    linear_shapes,
    mlp_shapes,
    nf4_shapes,
    qkv_shapes,
    self_attention_shapes,
    step_shapes,
    weight_shapes,
)  # fmt: skip
from benchmarks.variants import GRAPH_ROWS

STARTED, CEILINGS, LEFT_OUT = pytest.StashKey[float](), pytest.StashKey[dict](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one tiny shape for every case: a dry run of the suite")
    parser.addoption("--within", type=float, metavar="SECONDS", help="leave out what has not begun by then")
    parser.addoption("--compare", metavar="REF", help="measure the git revision REF and the working tree in one run")


def pytest_cmdline_main(config):
    if ref := config.getoption("--compare"):
        keyword = ["-k", config.option.keyword] if config.option.keyword else []
        quick = ["--quick"] if config.getoption("--quick") else []
        return compare.main([ref, *keyword, *quick])
    return None


def pytest_configure(config):
    config.stash[STARTED], config.stash[CEILINGS], config.stash[LEFT_OUT] = time.monotonic(), {}, {}
    if tiny(config):
        variants.BACKEND = "aot_eager"


def tiny(config) -> bool:
    return config.getoption("--quick") or config.getoption("--benchmark-disable")


def pytest_generate_tests(metafunc):
    for name, shapes in (
        ("shape", linear_shapes), ("adapter_shape", adapter_shapes), ("weight_shape", weight_shapes),
        ("attention_shape", attention_shapes), ("decoding_shape", decoding_shapes), ("head_shape", head_shapes),
        ("large_head_shape", large_head_shapes), ("mlp_shape", mlp_shapes), ("qkv_shape", qkv_shapes),
        ("step_shape", step_shapes), ("nf4_shape", nf4_shapes), ("few_rows_shape", few_rows_shapes),
        ("self_attention_shape", self_attention_shapes),
    ):  # fmt: skip
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, shapes(tiny(metafunc.config)), ids=str)


def pytest_collection_modifyitems(config, items):
    """Graphs are for few rows; what the targets need comes first, since time may run out."""
    kept = [item for item in items if not (GRAPH in contender_of(item) and rows_of(item) > GRAPH_ROWS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = sorted(
        kept, key=lambda item: targets.importance(item.path.stem, item.originalname, item.callspec.params, ON_GPU)
    )
    for item in items if ON_GPU else ():
        item.add_marker(pytest.mark.benchmark(timer=DeviceInstant))


def contender_of(item) -> str:
    return item.callspec.params["contender"]


def rows_of(item) -> int:
    return max((value.M for value in item.callspec.params.values() if hasattr(value, "M")), default=0)


def pytest_runtest_setup(item):
    limit = item.config.getoption("--within")
    if limit and time.monotonic() - item.config.stash[STARTED] > limit:
        pytest.skip("the time was over")
    if GRAPH in contender_of(item) and not ON_GPU:
        pytest.skip("a CUDA graph needs a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where a peer fails it is left out by name; ours may only run out of memory."""
    try:
        return (yield)
    except Exception as error:
        if is_foreign(contender_of(pyfuncitem)) or isinstance(error, torch.OutOfMemoryError):
            pytest.skip(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.outcome != "passed":
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else f"FAILED: {call.excinfo.exconly()}"
        left_out, key = item.config.stash[LEFT_OUT], (item.path.stem, contender_of(item), reason)
        left_out[key] = left_out.get(key, 0) + 1
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "python_build", "release"):
        machine_info.pop(private, None)
    machine_info.update(machine.description() | {"ceilings": config.stash[CEILINGS]})


def pytest_benchmark_update_json(config, output_json):
    output_json["left_out"] = [
        {"suite": suite, "contender": contender, "reason": reason, "cases": count}
        for (suite, contender, reason), count in config.stash[LEFT_OUT].items()
    ]


@pytest.fixture(scope="session", autouse=True)
def roof(request):
    config = request.config
    if not config.getoption("--benchmark-disable"):
        config.stash[CEILINGS] = ceilings(tiny(config))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    if ON_GPU:
        gc.collect()  # models are cycles
        torch.cuda.empty_cache()


@pytest.fixture
def note(benchmark, request):
    """Names the case for the groups of pytest-benchmark and for the report: note(op, shape, variant)."""

    def noted(op, shape, variant):
        benchmark.group = " ".join(filter(None, (op, str(shape), variant)))
        contender = request.node.callspec.params["contender"]
        benchmark.extra_info |= {"op": op, **shape._asdict(), "variant": variant, "contender": contender}
        if least := cost(op, shape, variant):
            benchmark.extra_info |= least._asdict()

    return noted


@pytest.fixture
def measure_layer(benchmark, note, request):
    """measure_layer(op, build, shape, p, backward): the module that `build(p)` makes, on x [M, K].

    forward_mode="training mode": not inference, but the forward of a training step alone.
    """

    def measured(op, build, shape, p, backward, forward_mode=""):
        note(op, shape, f"p={p}" if p is not None else forward_mode)
        layer = build(p or 0.0)
        if p is None and not backward and not forward_mode:
            layer.eval()  # bitsandbytes lays weights out for inference then
        graph = GRAPH in contender_of(request.node)
        measure_step(benchmark, layer, shape.M, shape.K, backward, graph, training=backward or bool(forward_mode))

    return measured


@pytest.fixture
def measure(measure_layer):
    """measure(op, build, shape, p, backward): the layer that `build(linear, p)` makes of a frozen linear."""

    def measured(op, build, shape, p, backward, forward_mode=""):
        linear = nn.Linear(shape.K, shape.N, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
        measure_layer(op, lambda p: build(linear, p), shape, p, backward, forward_mode)

    return measured
