"""Times of calls: device time between events with a cold L2 cache, or wall time where there is no GPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

LEAST_BUFFER = 1 << 28  # bytes that are read before a sample; twice the L2 cache where that is more


def medians(calls: Sequence[Callable], device: torch.device, samples: int) -> list[float]:
    """Median microseconds of each; one sample of every call at a time, so that a drifting clock meets all alike.

    On a GPU a buffer is read before each sample: nothing is served from L2, and the host is ahead of the device, so
    that no sample holds the gap before a launch.
    """
    if device.type != "cuda":
        return [statistics.median(taken) for taken in _rounds(calls, samples, _wall)]
    with torch.cuda.device(device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        buffer = torch.ones(max(2 * l2, LEAST_BUFFER) // 4, device=device)
        reads = _reads(calls, buffer)

        def sample(call: Callable) -> tuple[torch.cuda.Event, torch.cuda.Event]:
            for _ in range(reads):
                buffer.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            return start, end

        taken = _rounds(calls, samples, sample)
        torch.cuda.synchronize(device)
        return [statistics.median(start.elapsed_time(end) * 1e3 for start, end in events) for events in taken]


def _rounds(calls: Sequence[Callable], samples: int, sample: Callable) -> list[list]:
    taken: list[list] = [[] for _ in calls]
    for _ in range(samples):
        for kept, call in zip(taken, calls, strict=True):
            kept.append(sample(call))
    return taken


def _wall(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _reads(calls: Sequence[Callable], buffer: torch.Tensor) -> int:
    """How often to read the buffer for the host to queue the slowest call meanwhile."""
    buffer.sum()  # loads its kernel
    host = 0.0
    for call in calls:
        torch.cuda.synchronize(buffer.device)
        host = max(host, _wall(call))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    buffer.sum()
    end.record()
    torch.cuda.synchronize(buffer.device)
    return 1 + min(64, int(2 * host / (start.elapsed_time(end) * 1e3)))
