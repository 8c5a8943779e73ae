"""What is measured of one call: time on the device's own clock, bytes kept for backward, peak memory."""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from benchmarks import machine
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU
from benchmarks.variants import captured

try:
    from peft_ops.cli.memory import peak_of
except ImportError:  # benchmarks.compare, a revision from before it
    peak_of = None

ON_CPU_S, ON_GPU_S, LEAST_ROUNDS, MOST_ON_CPU, MOST_ON_GPU = 0.6, 0.12, 5, 100, 50
COLD_S = 0.02  # calls on a CPU that take longer than this are not worth emptying the caches for
QUIET_S = 90.0  # that a process spends at most on waiting for cores of its own
WARM = False  # --warm: on a CPU caches stay as the last call left them
LONG_S = 2.0  # a call that takes this long is measured three times, the first of which warms up


class DeviceInstant:
    """A timer for pytest-benchmark: `end - start` are the seconds between two points in the stream of a GPU."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "DeviceInstant") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) * 1e-3


class ColdQueue:
    """Run before every sample on a GPU: reads a buffer of twice the L2 cache, often enough that the host is ahead.

    The sample then finds none of its inputs in L2, and no gap between its kernels that a slow launch would leave.
    """

    def __init__(self, host_s: float):
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.buffer = torch.ones(max(2 * device.L2_cache_size, 1 << 28) // 4, device="cuda")
        read_s = timed(self.buffer.sum, DeviceInstant)
        self.reads = 1 + min(64, int(2 * host_s / read_s))

    def __call__(self) -> None:
        for _ in range(self.reads):
            self.buffer.sum()


class ColdCaches:
    """Run before every sample on a CPU: its threads read a buffer of twice the last-level caches.

    The sample then finds none of its inputs there, as a layer finds none of its weight in a model larger than they are;
    its code it does find, where a rehearsal on a copy of the layer has called it again, as the layer before it would.
    """

    def __init__(self):
        self.buffer = torch.ones(2 * machine.last_level_cache_bytes() // 4)
        self.read_s = timed(self)

    def __call__(self) -> None:
        self.buffer.sum()


class Quiet:
    """Run before every sample on a CPU: waits while a small product takes a third longer than it has taken before.

    On a rented machine two cores may for seconds be the threads of one: everything then takes up to twice its time.
    """

    def __init__(self):
        self.a, self.b = (torch.ones(shape, dtype=DTYPE, device="cpu") for shape in ((256, 1024), (1024, 1024)))
        self.best_s, self.left_s = math.inf, QUIET_S

    def __call__(self) -> None:
        while True:
            now_s = min(timed(lambda: self.a @ self.b) for _ in range(2))
            self.best_s = min(self.best_s, now_s)
            if now_s < 1.33 * self.best_s or self.left_s <= 0.0:
                return
            time.sleep(0.1)
            self.left_s -= 0.1


cold_caches, quiet = functools.cache(ColdCaches), functools.cache(Quiet)  # one for all cases


def prepared(*steps: Callable | None) -> None:
    for step in steps:
        if step is not None:
            step()


def timed(call: Callable, timer: Callable = time.perf_counter) -> float:
    """Seconds of one call, after one that warms up."""
    call()
    start = timer()
    call()
    return timer() - start


def host_time(call: Callable) -> float:
    """Seconds until a call has returned, its work still queued on the GPU."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    torch.cuda.synchronize()
    return host_s


def sample(benchmark, call: Callable, on_gpu: bool, rehearsal: Callable | None = None) -> None:
    """Feeds pytest-benchmark: device times on a GPU (the marker of conftest.py sets its timer), wall times on a CPU.

    rehearsal: on a CPU called before every sample, after the caches were emptied: the same code on other memory.
    """
    if benchmark.disabled:
        benchmark.pedantic(call)
        return
    setup, budget, most, emptying_s = None, ON_CPU_S, MOST_ON_CPU, 0.0
    if on_gpu:
        for _ in range(3):  # compilation, autotuning, handles
            call()
        host_s = host_time(call)
        benchmark.extra_info["host_s"] = host_s
        setup, budget, most = ColdQueue(host_s), ON_GPU_S, MOST_ON_GPU
    once = timed(call, DeviceInstant if on_gpu else time.perf_counter)
    if not on_gpu:
        setup = functools.partial(prepared, quiet())
    if not on_gpu and not WARM and once < COLD_S:
        setup = functools.partial(prepared, quiet(), cold_caches(), rehearsal)
        emptying_s = cold_caches().read_s + (once if rehearsal else 0.0)
    rounds = 3 if once > LONG_S else max(LEAST_ROUNDS, min(most, int(budget / (once + emptying_s))))
    benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=0 if once > LONG_S else 2)


def measure_step(
    benchmark, layer: nn.Module, rows: int, features: int, backward: bool, graph: bool, training: bool | None = None
) -> None:
    """Time, peak memory and bytes saved of `layer` on a random x [rows, features]: inference, or a training step;
    `training` without `backward`: a step's forward."""
    training = backward if training is None else training
    leaves = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in leaves:
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(rows, features, device=DEVICE, dtype=DTYPE, requires_grad=training)
    with torch.no_grad():
        dy = torch.randn_like(layer(x))

    def step(layer=layer, x=x, leaves=leaves, dy=dy):
        if backward:
            return torch.autograd.grad(layer(x), [x, *leaves], dy)
        with torch.set_grad_enabled(training):
            return layer(x)

    step()  # compiled here, if it is
    if backward:
        owned = [x, *layer.parameters(), *layer.buffers()]
        benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: layer(x), owned)
    benchmark.extra_info["peak_bytes"] = peak_bytes(step)
    rehearsal = None
    if not (ON_GPU or WARM or benchmark.disabled):
        other = copy.deepcopy(layer)
        others = [parameter for parameter in other.parameters() if parameter.requires_grad]
        rehearsal = functools.partial(step, other, x.detach().clone().requires_grad_(training), others, dy.clone())
        rehearsal()
    sample(benchmark, captured(step) if graph else step, ON_GPU, rehearsal)


def saved_bytes(call: Callable, exclude: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps after call() beyond the storages of `exclude` (x and parameters), each storage once."""
    owned = {t.untyped_storage().data_ptr() for t in exclude}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call()  # kept alive: a storage that is freed could lend its address to another
    del output
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in owned)


def peak_bytes(call: Callable) -> int:
    """Most memory that a call holds at once beyond what was there before it; on a CPU without the scratch that C++ code
    takes for itself (`CPUMemory`)."""
    if not torch.cuda.is_available():
        return peak_of(call) if peak_of else 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def total_peak_bytes(call: Callable, held: Iterable[torch.Tensor]) -> int:
    """Most memory in use during a call: on a GPU all that is allocated, on a CPU `held` and what the call makes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values()) + peak_bytes(call)
