"""Memory that operations take on a CPU, as torch's allocator tells its profiler."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


class CPUMemory:
    """While it is on, torch's CPU allocator is recorded; afterwards `peak` is the most bytes that were live at once of
    those allocated since the start.

    What was there before counts nothing, and so does freeing it. Operations run as they do without it: native code,
    compiled models, the backward. The thread that enters is recorded, with what autograd runs for it: memory that
    another thread frees counts as live to the end, what another thread allocates is not seen. Nor is memory that C++
    code takes without torch: oneDNN's and MKL's own, and `Scratch` of kernels/cpu (one or two MiB for a weight
    [4096, 4096]). Not to be nested, nor used under another profiler.
    """

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first use: no lines about it on stderr
        self.peak = 0
        self._profile = profile(use_kineto=True, profile_memory=True)

    def __enter__(self) -> "CPUMemory":
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        assert self._profile.kineto_results is not None
        live: dict[int, int] = {}
        now = 0
        for address, nbytes in _changes(self._profile.kineto_results.experimental_event_tree()):
            now -= live.pop(address, 0)
            if nbytes > 0:
                live[address] = nbytes
                now += nbytes
                self.peak = max(self.peak, now)


def _changes(roots: list[Any]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of all that was allocated and, with negative bytes, freed, in order of time."""
    found, waiting = [], list(reversed(roots))
    while waiting:
        event = waiting.pop()
        waiting.extend(reversed(event.children))
        if event.tag == _EventType.Allocation and event.typed[1].device.type == "cpu":
            found.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    return ((address, nbytes) for _, address, nbytes in sorted(found, key=lambda change: change[0]))


def peak_of(call: Callable[[], Any]) -> int:
    """Most bytes of CPU memory that a call holds at once beyond what was there before it, its result included.

    The call runs in a thread of its own: the workspace that native code keeps for each thread is made, and counts.
    """

    def recorded() -> int:
        with CPUMemory() as memory:
            call()
        return memory.peak

    with CPUMemory():  # kineto is to be set up by the main thread
        pass
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(recorded).result()
