"""Files of measured launch configurations and routes, one per architecture: read, checked, written.

The format is described in tables/README.md. What cannot be right is dropped with one warning and never raises: a GPU
with a broken table runs on design values.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
LOGGER = logging.getLogger("peft_ops")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUTES: dict[str, tuple[str, ...] | range] = {  # what may be chosen; a range is one of numbers
    "linear": ("vendor", "few rows", "fused", "tma"),
    "linear_dx": ("vendor", "few rows", "fused", "tma"),
    "nf4_linear": ("fused", "slab"),
    "nf4_linear_dx": ("fused", "slab"),
    "nf4_slab_bytes": range(1 << 20, (1 << 30) + 1),
}
BOUNDS = {"num_warps": (1, 16), "num_stages": (1, 8), "GROUP_M": (1, 64), "elements": (16, 1 << 16)}
BLOCK_BOUNDS = 16, 4096
POWERS_OF_TWO = ("num_warps", "elements")  # and every BLOCK


class Entry(NamedTuple):
    """A configuration measured for operands of dtype, at most `rank` (0: without one) and the bucket of `rows`.

    shared: bytes of shared memory that it was seen to take, None where that is unknown.
    """

    dtype: torch.dtype
    rows: int
    rank: int
    config: dict[str, int]
    shared: int | None


class Choice(NamedTuple):
    """What a route takes for the bucket of `rows` and a weight [out, k]; 0 where it does not matter."""

    dtype: torch.dtype
    rows: int
    out: int
    k: int
    choice: str | int


class Table(NamedTuple):
    """The entries of one file by kernel, and its choices by route."""

    arch: str
    name: str
    kernels: dict[str, list[Entry]]
    routes: dict[str, list[Choice]]


def read_tables(folder: Path, shipped: bool) -> list[Table]:
    """The tables of a folder, in the order of their names; one without meaningful times is no table that ships."""
    tables = []
    for path in sorted(folder.glob("*.json")):
        try:
            raw = read(path)
            if shipped and raw.get("times") != "device":
                raise ValueError("its times were not taken on a device")
            tables.append(parsed(raw, str(path)))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            LOGGER.warning("%s is not used: %s", path, error)
    return tables


def read(path: Path) -> dict[str, Any]:
    """The file as it is; ValueError where it is no table for this architecture's name."""
    raw = json.loads(path.read_text())
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("arch") != path.stem:
        raise ValueError(f"no table of format {FORMAT} for {path.stem}")
    return raw


def write(path: Path, raw: dict[str, Any]) -> None:
    """One entry to a line, so that a change shows what it did; in place of the old file at once."""
    lines = []
    for key, value in raw.items():
        if key in ("kernels", "routes"):
            lists = [f"  {json.dumps(name)}: [\n{_lines(value[name])}\n  ]" for name in sorted(value)]
            lines.append(f' "{key}": {{\n' + ",\n".join(lists) + "\n }")
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.new")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    beside.replace(path)


def _lines(entries: Iterable[dict]) -> str:
    return ",\n".join(f"   {json.dumps(entry)}" for entry in entries)


def put(raw: dict[str, Any], section: str, name: str, given: dict[str, Any]) -> None:
    """An entry or choice in place of the one for the same operands, in the order of these."""
    operands = ("dtype", "rank", "out", "k", "rows")
    key = lambda item: tuple(item.get(operand, 0) for operand in operands)  # noqa: E731
    kept = [item for item in raw[section].get(name, []) if key(item) != key(given)]
    raw[section][name] = sorted([*kept, given], key=key)


def parsed(raw: dict[str, Any], name: str) -> Table:
    """Entries and choices that can be right; the configurations' keys are checked where they are used."""
    kernels = {kernel: _kept(name, kernel, entries, _entry) for kernel, entries in raw.get("kernels", {}).items()}
    routes = {
        route: _kept(name, route, choices, lambda given, route=route: _choice(given, route))
        for route, choices in raw.get("routes", {}).items()
    }
    return Table(raw["arch"], name, kernels, routes)


def _kept(name: str, section: str, given: list, parse) -> list:
    kept = []
    for position, item in enumerate(given):
        try:
            kept.append(parse(item))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            LOGGER.warning("%s: %s[%d] is dropped: %s", name, section, position, error)
    return kept


def _entry(given: dict) -> Entry:
    config, shared = dict(given["config"]), given.get("shared")
    for key, value in config.items():
        least, most = BLOCK_BOUNDS if key.startswith("BLOCK") else BOUNDS.get(key, (0, -1))
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{key}={value}")
        if (key.startswith("BLOCK") or key in POWERS_OF_TWO) and value & (value - 1):
            raise ValueError(f"{key}={value} is no power of two")
    if shared is not None and (type(shared) is not int or shared < 0):
        raise ValueError(f"shared={shared}")
    return Entry(DTYPES[given["dtype"]], _size(given, "rows"), _size(given, "rank"), config, shared)


def _choice(given: dict, route: str) -> Choice:
    if given["choice"] not in ROUTES[route]:
        raise ValueError(f"choice={given['choice']}")
    rows, out, k = (_size(given, key) for key in ("rows", "out", "k"))
    return Choice(DTYPES[given["dtype"]], rows, out, k, given["choice"])


def _size(given: dict, key: str) -> int:
    value = given.get(key, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={value}")
    return value
