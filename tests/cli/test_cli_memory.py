"""Memory on a CPU is counted to the byte, with native code and compiled models as they run."""

import shutil
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ops import _backend, nf4
from peft_ops.cli.memory import CPUMemory, peak_of
from peft_ops.ops import nf4_linear

pytestmark = pytest.mark.unpoisoned
native = pytest.mark.skipif(
    _backend.implementation("nf4", torch.empty(0)).__name__ != "peft_ops.kernels.cpu.nf4",
    reason="native code does not serve",
)


def test_a_known_pattern_to_the_byte():
    before, other = torch.zeros(1000), torch.zeros(500)
    with CPUMemory() as memory:
        before.add_(1)  # was there before
        a = torch.empty(1000)
        view = a[10:]
        del a, other  # the view holds the first; the second counts nothing, so freeing it frees nothing
        b = torch.empty(300, dtype=torch.float64)
        del view
        c = torch.empty(100, dtype=torch.uint8)
        del b, c
    assert memory.peak == 4000 + 2400


def test_what_an_earlier_count_saw_was_there_before():
    with CPUMemory() as first:
        kept = torch.empty(1000)
    with CPUMemory() as second:
        del kept
        torch.empty(10)
    assert (first.peak, second.peak) == (4000, 40)


def test_nothing_is_counted_below_the_truth_when_storages_grow():
    t = torch.empty(1000)
    with CPUMemory() as memory:
        t.resize_(3000)
        t.resize_(5000)  # both are there while one is copied
    assert memory.peak == 4 * (3000 + 5000)


def test_forward_and_backward():
    """exp's and cos's outputs and dy are there when the backward begins; it makes three more, one after the other."""
    x = torch.zeros(10_000, requires_grad=True)
    step = lambda: torch.autograd.grad(x.exp().cos(), x, torch.ones(10_000))
    assert 4 * 40_000 <= peak_of(step) <= 6 * 40_000
    chunked = lambda: torch.autograd.grad(checkpoint(lambda t: t.exp().cos().sum(), x, use_reentrant=False), x)
    assert 3 * 40_000 <= peak_of(chunked) <= 6 * 40_000


@native
def test_native_code_runs_and_counts():
    weight = nf4.quantize(torch.randn(512, 256))
    chosen = []

    def call():
        chosen.append(_backend.implementation("nf4", torch.empty(0)).__name__)
        nf4.dequantize(weight, torch.bfloat16)

    assert peak_of(call) == 512 * 256 * 2
    assert chosen == ["peft_ops.kernels.cpu.nf4"]


@native
def test_the_workspace_of_native_code_counts_whatever_ran_before():
    weight, x = nf4.quantize(torch.randn(512, 256)), torch.randn(64, 256)
    call = lambda: nf4_linear(x, weight, None)
    call()
    first, again = peak_of(call), peak_of(call)
    assert first == again >= 4 * (512 * 256 + 64 * 512)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_model_stays_compiled():
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), torch.randn(1000, 32)
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(torch.compiler.is_compiling())
            return graph(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
    step = torch.no_grad()(lambda: compiled(x))
    assert peak_of(step) >= 4 * 1000 * (64 + 32)
    assert calls == [False, False]


def test_memory_that_another_thread_frees_counts_to_the_end():
    held = []

    def free():
        held.clear()

    with CPUMemory() as memory:
        held.append(torch.empty(1000))
        thread = threading.Thread(target=free)
        thread.start()
        thread.join()
        torch.empty(500)
    assert memory.peak == 6000


def test_errors_come_through_and_nothing_is_held():
    held = []

    def call():
        t = torch.empty(1000)
        held.append(weakref.ref(t))
        assert peak_of is None, "as it is"

    with pytest.raises(AssertionError, match="as it is"):
        peak_of(call)
    assert peak_of(lambda: torch.empty(1000)) == 4000
    with CPUMemory() as memory:
        t = torch.empty(1000)
        held.append(weakref.ref(t))
        del t
    assert held[1]() is None
    assert memory.peak == 4000
