"""Which measured configuration or route serves a launch: the nearest table's nearest bucket, a dict lookup once found.

The nearest architecture that knows a kernel serves it (`arches.nearness`), and of its tables, bucket by bucket, this
process's (`autotune`) before those of the folder PEFT_OPS_TABLES before the shipped ones. What is found depends on the
tables, the architecture's name and shapes, never on clocks or the number of multiprocessors. No table says how many
parts a reduction has: that is `configs.splits` of the grid, which follows from the shape and the block sizes.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch

from .arches import fits, nearness, same_major
from .table_files import LOGGER, Choice, Entry, Table, parsed, read_tables

SHIPPED = Path(__file__).parent / "tables"
NEAR = 2.0  # how many doublings of out and k together a route's choice holds for

Rungs = tuple[tuple[int, Any], ...]  # (rows up to which, what serves them), ascending
at_first_use: Callable[..., None] | None = None  # `autotune` puts itself here where PEFT_OPS_AUTOTUNE=1
_overrides: dict[tuple[int, str], Any] = {}
_of_process: dict[str, dict] = {}
_files: list[Table] | None = None
_orders: dict[str, list[Table]] = {}
_ladders: dict[tuple, tuple[tuple[int, Rungs], ...]] = {}
_routes: dict[tuple, Rungs] = {}
_said: set[tuple] = set()


def config(
    kernel: str, arch: str, dtype: torch.dtype, rows: int, rank: int, design: dict[str, int]
) -> dict[str, int]:  # fmt: skip
    """The measured configuration for `rows` rows and a rank of `rank` (0: none), else `design`.

    One that was measured at a rank serves lower ones, never a higher, which needs more registers and shared memory.
    """
    if _overrides and (threading.get_ident(), kernel) in _overrides:
        return {**design, **_overrides[threading.get_ident(), kernel]}
    if torch.compiler.is_compiling():
        for most_rank, rungs in _traced_ladder(kernel, arch, dtype, tuple(design)):
            if rank <= most_rank:
                return dict(_rung(rungs, rows))
        return design
    if at_first_use is not None:
        at_first_use(kernel, arch, dtype, rows, rank, design)
    found = _ladders.get((kernel, arch, dtype))
    ladder = _ladder(kernel, arch, dtype, tuple(design)) if found is None else found
    for most_rank, rungs in ladder:
        if rank <= most_rank:
            return _rung(rungs, rows)
    return design


def route(name: str, arch: str, dtype: torch.dtype, out: int, k: int, rows: int) -> Any:
    """The measured choice of a route for x [rows, k] and a weight [out, k]; None where nothing near was measured."""
    if _overrides and (threading.get_ident(), f"route {name}") in _overrides:
        return _overrides[threading.get_ident(), f"route {name}"]
    if torch.compiler.is_compiling():
        rungs = _traced_choices(name, arch, dtype, int(out), int(k)) if _traced_has_route(name, arch) else ()
    else:
        found = _routes.get((name, arch, dtype, out, k))
        rungs = _choices(name, arch, dtype, out, k) if found is None else found
    return _rung(rungs, rows) if rungs else None


@contextlib.contextmanager
def using(name: str, value: Any) -> Iterator[None]:
    """For launches of this thread: a kernel's configuration (what it does not say stays as designed), or the choice of
    "route <name>"."""
    key = threading.get_ident(), name
    before = _overrides.get(key)
    _overrides[key] = value
    try:
        yield
    finally:
        del _overrides[key]
        if before is not None:
            _overrides[key] = before


def bucket(rows: int) -> int:
    """The power of two that covers rows."""
    return 1 << max(0, rows - 1).bit_length()


def has_bucket(kernel: str, arch: str, dtype: torch.dtype, rows: int, rank: int, keys: tuple[str, ...]) -> bool:
    """Whether a table of this very architecture has this very bucket."""
    tables = (table for table in _order(arch) if table.arch == arch)
    entries = (entry for table in tables for entry in _usable(table, kernel, arch, keys))
    return any((e.dtype, bucket(e.rows), e.rank) == (dtype, bucket(rows), rank) for e in entries)


def add(arch: str, kernel: str, entry: dict) -> None:
    """An entry, as files have it, for the rest of this process."""
    raw = _of_process.setdefault(arch, {"arch": arch, "kernels": {}})
    raw["kernels"].setdefault(kernel, []).append(entry)
    for found in (_orders, _ladders):
        found.clear()


def forget() -> None:
    """Read the files again at the next lookup, and know nothing of what this process measured."""
    global _files
    _files = None
    for kept in (_of_process, _orders, _ladders, _routes, _said):
        kept.clear()


def _rung(rungs: Rungs, rows: int) -> Any:
    for most, served in rungs:
        if rows <= most:
            return served
    return rungs[-1][1]


def _order(arch: str) -> list[Table]:
    """The tables that may serve an architecture, the nearest first."""
    global _files
    if _files is None:
        own = os.environ.get("PEFT_OPS_TABLES")
        _files = [*(read_tables(Path(own), shipped=False) if own else []), *read_tables(SHIPPED, shipped=True)]
    if arch not in _orders:
        tables = [*(parsed(raw, "this process") for raw in _of_process.values()), *_files]
        keys = [(nearness(arch, table.arch), position) for position, table in enumerate(tables)]
        _orders[arch] = [tables[key[1]] for key in sorted(key for key in keys if key[0] is not None)]
        names = ", ".join(table.name for table in _orders[arch]) or "design: there is no table"
        _say(LOGGER.debug, (arch,), f"{arch}: launch configurations of {names}")
    return _orders[arch]


def _ladder(kernel: str, arch: str, dtype: torch.dtype, keys: tuple[str, ...]) -> tuple[tuple[int, Rungs], ...]:
    """((rank up to which, rungs), ...), ascending; empty where no table knows the kernel."""
    ladder: tuple[tuple[int, Rungs], ...] = ()
    for _, tables in groupby(_order(arch), key=lambda table: table.arch):
        found = [entry for table in reversed(list(tables)) for entry in _usable(table, kernel, arch, keys)]
        entries = _of_dtype(found, dtype)
        if entries:
            ranks = sorted({entry.rank for entry in entries})
            ladder = tuple((r, _rungs([(e.rows, e.config) for e in entries if e.rank == r])) for r in ranks)
            break
    _ladders[kernel, arch, dtype] = ladder
    return ladder


def _choices(name: str, arch: str, dtype: torch.dtype, out: int, k: int) -> Rungs:
    """What the nearest shape of weight takes; of GPUs, only one of the same major version says how kernels compare."""
    rungs: Rungs = ()
    for _, tables in groupby(_order(arch), key=lambda table: table.arch):
        found = [
            c for table in reversed(list(tables)) for c in table.routes.get(name, []) if same_major(table.arch, arch)
        ]
        choices = _of_dtype(found, dtype)
        near = min(choices, key=lambda choice: _apart(choice, out, k), default=None)
        if near is not None and _apart(near, out, k) <= NEAR:
            rungs = _rungs([(c.rows, c.choice) for c in choices if (c.out, c.k) == (near.out, near.k)])
            break
    _routes[name, arch, dtype, out, k] = rungs
    return rungs


def _has_route(name: str, arch: str) -> bool:
    return any(table.routes.get(name) for table in _order(arch))


@torch.compiler.assume_constant_result
def _traced_ladder(kernel: str, arch: str, dtype: torch.dtype, keys: tuple[str, ...]) -> tuple[tuple[int, Rungs], ...]:
    """_ladder for torch.compile, which runs it while it traces: no guard on dictionaries that it fills or returns."""
    ladder = _ladder(kernel, arch, dtype, keys)
    return tuple((rank, tuple((most, tuple(found.items())) for most, found in rungs)) for rank, rungs in ladder)


_traced_choices = torch.compiler.assume_constant_result(_choices)
_traced_has_route = torch.compiler.assume_constant_result(_has_route)


def _apart(choice: Choice, out: int, k: int) -> float:
    """In doublings; a side that one of them does not give is left out."""
    return sum(abs(math.log2(a / b)) for a, b in ((choice.out, out), (choice.k, k)) if a and b)


def _of_dtype(found: list, dtype: torch.dtype) -> list:
    """Those for this dtype; one 16-bit dtype stands in for the other."""
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}.get(dtype)
    return [item for item in found if item.dtype == dtype] or [item for item in found if item.dtype == other]


def _rungs(measured: list[tuple[int, Any]]) -> Rungs:
    """Each bucket serves the rows whose own is nearer to it than to the next; halfway the smaller does."""
    last = {bucket(rows): served for rows, served in measured}
    buckets = sorted(last)
    logs = [rows.bit_length() - 1 for rows in buckets]
    limits = [1 << (low + high) // 2 for low, high in pairwise(logs)]
    return tuple(zip([*limits, 1 << 62], (last[rows] for rows in buckets), strict=True))


def _usable(table: Table, kernel: str, arch: str, keys: tuple[str, ...]) -> list[Entry]:
    """Entries that say what the kernel's design says, no more and no less, and that fit this architecture."""
    usable = []
    for entry in table.kernels.get(kernel, []):
        wrong = sorted(set(keys) ^ set(entry.config))
        fit = fits(entry.shared, table.arch, arch)
        if not wrong and fit:
            usable.append(entry)
        elif wrong or table.arch == arch:
            why = f"given or missing: {', '.join(wrong)}" if wrong else f"{entry.shared} bytes of shared memory"
            _say(
                LOGGER.warning,
                (table.name, kernel, str(entry)),
                f"{table.name}: {kernel} {entry.config} is dropped: {why}",
            )
    return usable


def _say(log: Callable[[str], None], about: tuple, what: str) -> None:
    """Once for every `about`."""
    if about not in _said:
        _said.add(about)
        log(what)
