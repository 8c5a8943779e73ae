"""On a CPU the caches are emptied before a sample, of every size that the system tells, unless that is not wanted."""

import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import machine, measure  # noqa: E402


class Pedantic:
    """Of pytest-benchmark's fixture what `sample` uses: a setup before every round."""

    disabled = False

    def __init__(self):
        self.rounds = 0

    def pedantic(self, call, setup=None, rounds=1, warmup_rounds=0):
        self.rounds = rounds
        for _ in range(warmup_rounds + rounds):
            if setup:
                setup()
            call()


@pytest.fixture
def events(monkeypatch):
    """The name of every call and every flush, in order; the caches are small."""
    events = []

    class Flush(measure.ColdCaches):
        def __call__(self):
            super().__call__()
            events.append("flush")

    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda: 1 << 12)
    monkeypatch.setattr(measure, "cold_caches", functools.cache(Flush))
    monkeypatch.setattr(measure, "quiet", lambda: None)
    return events


def test_caches_are_emptied_before_every_sample(events):
    benchmark = Pedantic()
    measure.sample(benchmark, lambda: events.append("call"), on_gpu=False)
    assert benchmark.rounds == measure.MOST_ON_CPU
    assert events[-2 * benchmark.rounds :] == ["flush", "call"] * benchmark.rounds
    assert measure.cold_caches().buffer.nbytes == 2 << 12


def test_a_rehearsal_stands_between_the_two(events):
    benchmark = Pedantic()
    measure.sample(benchmark, lambda: events.append("call"), on_gpu=False, rehearsal=lambda: events.append("rehearsal"))
    assert events[-3 * benchmark.rounds :] == ["flush", "rehearsal", "call"] * benchmark.rounds


def test_warm_samples_and_long_calls_are_left_alone(events, monkeypatch):
    monkeypatch.setattr(measure, "WARM", True)
    measure.sample(Pedantic(), lambda: events.append("call"), on_gpu=False)
    monkeypatch.setattr(measure, "WARM", False)
    monkeypatch.setattr(measure, "COLD_S", 0.0)  # every call is a long one
    measure.sample(Pedantic(), lambda: events.append("call"), on_gpu=False)
    assert set(events) == {"call"}


def test_samples_wait_for_cores_of_their_own(monkeypatch):
    """Not for ever."""
    times, slept = [1.0, 1.0, 1.2, 1.2, 2.0, 2.0, 2.0, 1.9, 1.3, 2.0], []
    monkeypatch.setattr(measure, "timed", lambda call: times.pop(0) if times else 9.0)
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    quiet = measure.Quiet()
    quiet()
    quiet()
    assert not slept
    quiet()
    assert len(slept) == 2
    assert not times
    quiet()
    assert sum(slept) == pytest.approx(measure.QUIET_S, abs=0.2)


def caches(cpus, core, *found):
    for index, (level, size, shared) in enumerate(found):
        folder = cpus / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in {"level": level, "size": size, "shared_cpu_list": shared}.items():
            (folder / name).write_text(f"{text}\n")


def test_last_level_caches_count_once_for_all_cores_that_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {0, 1, 2})
    for core, shared in enumerate(("0-1", "0-1", "2-3")):
        caches(tmp_path, core, (1, "48K", core), (2, "2048K", core), (3, "32768K", shared))
    assert machine.last_level_cache_bytes(tmp_path) == 2 * (32 << 20)
    assert [machine.cache_bytes(size) for size in ("512", "48K", "3M")] == [512, 48 << 10, 3 << 20]


def test_caches_that_cannot_be_read_have_a_size_all_the_same(tmp_path):
    assert machine.last_level_cache_bytes(tmp_path) == machine.UNKNOWN_CACHE
    caches(tmp_path, 0, (3, "unknown", 0))
    assert machine.last_level_cache_bytes(tmp_path) == machine.UNKNOWN_CACHE
    assert machine.last_level_cache_bytes() > 0
