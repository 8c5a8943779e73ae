"""What a result depends on besides the code: the device, its clocks, and the versions of everything timed."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch", "triton", "peft", "bitsandbytes", "transformers", "trl", "liger-kernel",
    "cut-cross-entropy", "pytest-benchmark",
)  # fmt: skip
CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_CACHE = 1 << 26  # bytes, where the system does not say
_SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NVIDIA_SMI = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version"


def description() -> dict:
    """device, threads or GPU properties, and versions; None for a package that is not installed."""
    return {"device": device_name(), **_gpu(), "threads": torch.get_num_threads(), "versions": versions()}


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def last_level_cache_bytes(cpus: Path = CPUS) -> int:
    """Of the largest caches of the cores that this process may use, each once however many cores share it."""
    caches = {}
    for core in os.sched_getaffinity(0):
        for cache in (cpus / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, size, shared = (
                    (cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
                )
                caches[int(level), shared] = cache_bytes(size)
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or UNKNOWN_CACHE


def cache_bytes(size: str) -> int:
    """Of what the kernel writes: 32768K."""
    return int(size[:-1]) * _SUFFIX[size[-1]] if size[-1:] in _SUFFIX else int(size)


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    described = {
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
    }
    try:
        query = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader", "-i", "0"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return described
    return described | dict(zip(_NVIDIA_SMI.split(","), map(str.strip, answer.split(",")), strict=False))
