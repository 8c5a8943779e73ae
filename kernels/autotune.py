"""Measuring launch configurations: for `python -m benchmarks.tune`, and at first use where PEFT_OPS_AUTOTUNE=1.

Unless that variable is set this module is not even imported. With it, the first launch of a (kernel, dtype, bucket)
that no table of this architecture has is preceded by a measurement on operands of its own, kept for the process and,
where PEFT_OPS_TABLES names a folder, in its file. Nothing is measured while a CUDA graph is captured or torch.compile
traces.
"""

import datetime
import os
import threading
from pathlib import Path
from typing import Any

import torch
import triton

from . import configs, measured, stopwatch, table_files
from .candidates import CANDIDATES
from .problems import PROBLEMS, Operands
from .table_files import LOGGER
from .trials import Trials, tells

WIDTH = 4096  # K and N of the operands: those of a 7B model
SAMPLES = 7, 25  # of every candidate, then of those that came near the best
NEAR, BETTER = 1.15, 0.98  # near the best; better than the designed configuration, beyond noise
ALL, TIMED, VARIANTS = slice(None), slice(1), slice(1, None)  # calls of a problem

_LOCK = threading.RLock()
_met: set[tuple] = set()
_measuring = False


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
    that does not compile or launch is skipped; the fastest must do so for all variants of the operands. With `most`,
    only so many are tried. RuntimeError where the designed one gives nothing to compare with.
    """
    rows = measured.bucket(rows)
    module, make = PROBLEMS[kernel]
    design = configs.designed(kernel, arch, dtype, rows)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        problem = make(Operands(device, dtype, rows, rank, width))
        trials = Trials(kernel, module, problem, device, (dtype, rank))
        expected = trials.results(design, ALL)
        if not tells(expected):
            raise RuntimeError(f"{kernel}: the designed configuration gives zeros or no numbers")
        tried = [design]
        for candidate in ({**design, **given} for given in CANDIDATES[kernel][:most]):
            if candidate not in tried and trials.agree(candidate, expected, TIMED):
                tried.append(candidate)
        times = _times(trials, tried, device, samples)
        faster = sorted((i for i in times if times[i] < BETTER * times[0]), key=times.__getitem__)
        best = next((i for i in faster if trials.agree(tried[i], expected, VARIANTS)), 0)
    return {
        "dtype": str(dtype).removeprefix("torch."), "rows": rows, "rank": rank, "config": tried[best],
        "shared": trials.shared(tried[best]), "default_us": round(times[0], 2), "best_us": round(times[best], 2),
        "tried": len(tried), "width": width, "measured": evidence(device, revision),
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


def _times(
    trials: Trials, tried: list[dict], device: torch.device, samples: tuple[int, int]
) -> dict[int, float]:  # fmt: skip
    """Microseconds of the design, which is the first, and of those that are near the best."""
    calls = [trials.timed(config) for config in tried]
    first = stopwatch.medians(calls, device, samples[0])
    near = [i for i, took in enumerate(first) if i == 0 or took <= NEAR * min(first)]
    return dict(zip(near, stopwatch.medians([calls[i] for i in near], device, samples[1]), strict=True))


def _device(arch: str) -> torch.device:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    current = torch.device("cuda", torch.cuda.current_device()) if devices else torch.device("cpu")
    return next((d for d in (current, *devices) if configs.arch_of(d) == arch), current)


def _capturing(arch: str) -> bool:
    return arch != "default" and torch.cuda.is_current_stream_capturing()
