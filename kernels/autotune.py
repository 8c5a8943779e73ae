"""Measuring launch configurations: for `python -m benchmarks.tune`, and at first use where PEFT_OPS_AUTOTUNE=1.

Unless that variable is set this module is not even imported. With it, the first launch of a (kernel, dtype, bucket)
that no table of this architecture has is preceded by a measurement on operands of its own, kept for the process and,
where PEFT_OPS_TABLES names a folder, in its file. Nothing is measured while a CUDA graph is captured or torch.compile
traces.
"""

import datetime
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from . import configs, measured, stopwatch, table_files
from .candidates import CANDIDATES
from .problems import PROBLEMS, Operands, Problem
from .table_files import LOGGER

WIDTH = 4096  # K and N of the operands: those of a 7B model
SAMPLES = 7, 25  # of every candidate, then of those that came near the best
NEAR, BETTER = 1.15, 0.98  # near the best; better than the designed configuration, beyond noise
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of another order of summation

Results = list[list[torch.Tensor]]
_LOCK = threading.RLock()
_met: set[tuple] = set()
_measuring = False
_most_shared: dict[tuple, int] = {}


def enable() -> None:
    """Measure at first use from now on."""
    measured.at_first_use = at_first_use


def at_first_use(
    kernel: str, arch: str, dtype: torch.dtype, rows: int, rank: int, design: dict[str, int]
) -> None:  # fmt: skip
    """Called before a launch; a kernel without a problem stays as it is."""
    global _measuring
    key = kernel, arch, dtype, measured.bucket(rows), rank
    if key in _met or rows == 0 or kernel not in PROBLEMS or _capturing(arch):
        return
    with _LOCK:
        if _measuring or key in _met:
            return
        _met.add(key)
        if measured.has_bucket(*key, tuple(design)):
            return
        _measuring = True
        try:
            device = _device(arch)
            entry = measure(kernel, arch, dtype, rows, rank, device=device)
        except Exception as error:  # no memory for operands, or a device that is lost: the launch says so itself
            LOGGER.warning("%s is not tuned for %s, %s: %s", kernel, dtype, key[3], error)
            return
        finally:
            _measuring = False
        measured.add(arch, kernel, entry)
        if os.environ.get("PEFT_OPS_TABLES"):
            keep(Path(os.environ["PEFT_OPS_TABLES"]), arch, device, kernel, entry)


def measure(
    kernel: str, arch: str, dtype: torch.dtype, rows: int, rank: int, *, device: torch.device, width: int = WIDTH,
    samples: tuple[int, int] = SAMPLES, most: int | None = None, revision: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A table's entry: the fastest configuration for the bucket of `rows`, with the times that speak for it.

    Every candidate's results are compared with the designed configuration's: a wrong one is refused and reported, one
    that does not compile or launch is skipped; with `most`, only so many are tried. RuntimeError where the designed one
    gives nothing to compare with.
    """
    rows = measured.bucket(rows)
    module, make = PROBLEMS[kernel]
    design = configs.designed(kernel, arch, dtype, rows)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        problem = make(Operands(device, dtype, rows, rank, width))
        compiled = _compiled(module, kernel, device)
        expected = _results(problem, kernel, design)
        if not all(_tells(t) for results in expected for t in results):
            raise RuntimeError(f"{kernel}: the designed configuration gives zeros or no numbers")
        tried, of_design = [design], (kernel, dtype, rank, str(design))
        shared = [_shared(compiled, _compiled(module, kernel, device), of_design)]
        for candidate in ({**design, **given} for given in CANDIDATES[kernel][:most]):
            compiled = _compiled(module, kernel, device)
            if candidate not in tried and _agrees(problem, kernel, candidate, expected):
                tried.append(candidate)
                key = kernel, dtype, rank, str(candidate)
                shared.append(_shared(compiled, _compiled(module, kernel, device), key))
        del expected
        best, times = _fastest(problem, kernel, tried, device, samples)
    return {
        "dtype": str(dtype).removeprefix("torch."), "rows": rows, "rank": rank, "config": tried[best],
        "shared": shared[best], "default_us": round(times[0], 2), "best_us": round(times[best], 2), "tried": len(tried),
        "width": width, "measured": evidence(device, revision),
    }  # fmt: skip


def keep(folder: Path, arch: str, device: torch.device, kernel: str, entry: dict) -> None:
    """Put an entry into a folder's file for an architecture; what else that holds stays."""
    path = folder / f"{arch}.json"
    try:
        raw = table_files.read(path) if path.exists() else header(arch, device)
        table_files.put(raw, "kernels", kernel, entry)
        table_files.write(path, raw)
    except (OSError, ValueError) as error:
        LOGGER.warning("%s is not written: %s", path, error)


def evidence(device: torch.device, revision: str) -> str:
    """Where and when something was measured, and of which code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return ", ".join(filter(None, (datetime.date.today().isoformat(), name, revision)))


def header(arch: str, device: torch.device) -> dict[str, Any]:
    """Of a new table. Times without a GPU mean nothing, and say so."""
    return {
        "format": table_files.FORMAT, "arch": arch, "times": "device" if device.type == "cuda" else "meaningless",
        "versions": {"torch": torch.__version__, "triton": triton.__version__}, "kernels": {}, "routes": {},
    }  # fmt: skip


def _fastest(
    problem: Problem, kernel: str, tried: list[dict], device: torch.device, samples: tuple[int, int]
) -> tuple[int, dict[int, float]]:
    """(which of `tried`, microseconds of those measured to the end); the first, the design, unless one is better."""
    calls = [partial(_with, kernel, config, problem.calls[0]) for config in tried]
    first = stopwatch.medians(calls, device, samples[0])
    near = [i for i, took in enumerate(first) if i == 0 or took <= NEAR * min(first)]
    second = stopwatch.medians([calls[i] for i in near], device, samples[1])
    times = dict(zip(near, second, strict=True))
    best = min(times, key=times.__getitem__)
    return (best if times[best] < BETTER * times[0] else 0), times


def _with(kernel: str, config: dict, call: Callable) -> Any:
    with measured.using(kernel, config):
        return call()


def _results(problem: Problem, kernel: str, config: dict) -> Results:
    results = []
    for call in problem.calls:
        problem.reset()
        given = _with(kernel, config, call)
        tensors = [t for t in (given if isinstance(given, tuple) else (given,)) if t is not None]
        results.append([t.clone() for t in tensors])
    if results[0][0].is_cuda:
        torch.cuda.synchronize(results[0][0].device)
    return results


def _tells(t: torch.Tensor) -> bool:
    return t.dtype == torch.uint8 or bool(t.isfinite().all() and t.norm() > 0)


def _agrees(problem: Problem, kernel: str, config: dict, expected: Results) -> bool:
    try:
        results = _results(problem, kernel, config)
    except Exception as error:  # too much shared memory, a tile that the compiler refuses, ...
        LOGGER.debug("%s %s is skipped: %s", kernel, config, error)
        return False
    pairs = [(a, b) for ours, truth in zip(results, expected, strict=True) for a, b in zip(ours, truth, strict=True)]
    if all(same(ours, truth) for ours, truth in pairs):
        return True
    LOGGER.warning("%s %s is refused: its results are wrong", kernel, config)
    return False


def same(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether two sums differ by their order at most; codes, not at all."""
    if truth.dtype == torch.uint8:
        return torch.equal(ours, truth)
    error = (ours.double() - truth.double()).norm() / truth.double().norm()
    return bool(error <= TOLERANCE[truth.dtype])


def _compiled(module: ModuleType, kernel: str, device: torch.device) -> dict:
    """What Triton has compiled of a kernel so far; nothing in the interpreter."""
    caches = getattr(getattr(module, f"_{kernel}_kernel"), "device_caches", None)
    return dict(caches[device.index or 0][0]) if caches and device.type == "cuda" else {}


def _shared(before: dict, after: dict, key: tuple) -> int | None:
    """Most shared memory of a configuration's variants, those compiled for another bucket too; None where unknown."""
    new = [after[compiled].metadata.shared for compiled in after.keys() - before.keys()]
    known = [*new, *([_most_shared[key]] if key in _most_shared else [])]
    if not known:
        return None
    _most_shared[key] = max(known)
    return _most_shared[key]


def _device(arch: str) -> torch.device:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    current = torch.device("cuda", torch.cuda.current_device()) if devices else torch.device("cpu")
    return next((d for d in (current, *devices) if configs.arch_of(d) == arch), current)


def _capturing(arch: str) -> bool:
    return arch != "default" and torch.cuda.is_current_stream_capturing()
