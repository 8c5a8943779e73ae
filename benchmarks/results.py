"""A results file of pytest-benchmark: what of it is kept, and its cases by op, row and contender."""

import json
import re
from pathlib import Path

from benchmarks.contenders import COMPILED, FLOOR, GRAPH, is_ours
from benchmarks.targets import Rows

RESULTS = Path(__file__).parent / "results"
EMPTIED, WARM = "caches emptied before every sample", "warm caches"
_STATS = (
    "min", "q1", "median", "q3", "max", "iqr", "rounds", "mean", "stddev", "ops", "iterations", "outliers", "total",
)  # fmt: skip
_CASE = ("group", "name", "fullname", "params", "param", "extra_info")


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def trimmed(results: dict, revision: str | None = None) -> dict:
    """What a reader needs, without samples, host name and paths: still loadable by `--benchmark-compare`."""
    commit = {key: results["commit_info"].get(key) for key in ("id", "time", "dirty")}
    if revision:
        commit = {"id": revision, "time": None, "dirty": None}
    machine = {key: value for key, value in results["machine_info"].items() if key not in ("cpu", "processor", "node")}
    benchmarks = [
        {key: case[key] for key in _CASE}
        | {"stats": {key: case["stats"][key] for key in _STATS if key in case["stats"]}}
        for case in results["benchmarks"]
    ]
    return {"machine_info": machine, "commit_info": commit, "datetime": results["datetime"],
            "version": results["version"], "left_out": results.get("left_out", []),
            "benchmarks": benchmarks}  # fmt: skip


def by_op(results: dict) -> dict[str, Rows]:
    """op -> (N, K, M, variant) -> contender -> {"median", "iqr", "saved_bytes", ...}; rows in order of their sizes."""
    ops: dict = {}
    for case in results["benchmarks"]:
        info = case["extra_info"]
        row = (info["N"], info["K"], info["M"], info["variant"])
        ops.setdefault(info["op"], {}).setdefault(row, {})[info["contender"]] = case["stats"] | info
    return {op: dict(sorted(rows.items())) for op, rows in ops.items()}


def contenders(rows: Rows) -> list[str]:
    """Ours first, then the floor, peers as the suite has them, compiled ones, graphs."""
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    return sorted(names, key=lambda name: (GRAPH in name, COMPILED in name, not is_ours(name), FLOOR not in name))


def shape_name(row: tuple) -> str:
    """A row in words."""
    n, k, m, variant = row
    return " ".join(filter(None, (f"M={m}" if m else "", f"{n}×{k}", variant)))


def ceilings_of(results: dict) -> dict[str, float]:
    return results["machine_info"].get("ceilings") or {}


def caches_of(results: dict) -> str:
    """EMPTIED or WARM; results from before it was written down are warm on a CPU."""
    machine = results["machine_info"]
    return machine.get("caches") or (EMPTIED if "multiprocessors" in machine else WARM)


def floor_seconds(cell: dict, ceilings: dict[str, float]) -> float | None:
    """The least time of a case on this machine: its bytes at the copy rate or its operations at the matmul rate."""
    if not ceilings or "flops" not in cell:
        return None
    at_copy = cell["least_bytes"] / ceilings["copy_bytes_per_s"]
    return max(at_copy, cell["flops"] / ceilings["matmul_flops_per_s"])
