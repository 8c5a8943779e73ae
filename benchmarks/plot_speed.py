"""Speed-ups: a panel per op, its shapes from left to right, a point per contender at its time over ours."""

import re
from itertools import groupby

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.contenders import counterpart, is_ours
from benchmarks.plots import grid, style, title_and_legend
from benchmarks.results import contenders
from benchmarks.targets import Rows

NARROW = 9  # shapes that fit a panel of one column
TICKS = [m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5)]
Place = tuple[str, int]  # weight and case, rows of x


def figure(ops: dict[str, Rows]) -> pyplot.Figure | None:
    shown = {op: rows for op, rows in ops.items() if any(len(relative(cells)) > 1 for cells in rows.values())}
    if not shown:
        return None
    widths = [1 if len(places(rows)) <= NARROW else 2 for rows in shown.values()]
    title = "speed-up of peft-ops, time of the other over ours: below 1 ours loses (solid p = 0, dashed p = 0.1)"
    made, panels = grid(widths, title)
    for panel, (op, rows) in zip(panels, shown.items(), strict=True):
        points(panel, rows)
        title_and_legend(panel, op)
    return made


def relative(cells: dict[str, dict]) -> dict[str, float]:
    """Times over ours; a graph's over our graph's."""
    ours = {name: counterpart(name, cells) for name in cells}
    return {name: cells[name]["median"] / cells[base]["median"] for name, base in ours.items() if base}


def place(row: tuple) -> Place:
    """Where a row stands from left to right: dropout shares a place."""
    n, k, m, variant = row
    parts = re.split(", " if "," in variant else " ", variant)
    return "\n".join([f"{n}×{k}", *(part for part in parts if part and not part.startswith("p="))]), m


def places(rows: Rows) -> list[Place]:
    return list(dict.fromkeys(map(place, rows)))


def points(panel: Axes, rows: Rows) -> None:
    where = {found: x for x, found in enumerate(places(rows))}
    for name in contenders(rows):
        label = name
        for dropout in (False, True):
            lines = {
                place(row): relative(cells).get(name) for row, cells in rows.items() if ("p=0.1" in row[3]) is dropout
            }
            lines = {found: ratio for found, ratio in lines.items() if ratio is not None}
            if not lines or (is_ours(name) and set(lines.values()) == {1.0}):
                continue
            look = style(name) | {"linestyle": "--" if dropout else "-", "linewidth": 0.9, "markersize": 4}
            for _, run in groupby(lines, key=lambda found: found[0]):
                group = list(run)
                panel.plot([where[f] for f in group], [lines[f] for f in group], label=label, zorder=3, **look)
                label = None
    axes(panel, where)


def axes(panel: Axes, where: dict[Place, int]) -> None:
    panel.axhline(1.0, color="black", linewidth=1.4)
    panel.set_yscale("log")
    low, high = (min(panel.get_ylim()[0], 0.85), max(panel.get_ylim()[1], 1.2))
    panel.set_ylim(low, high)
    panel.axhspan(low, 1.0, color="tab:red", alpha=0.06)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.set_xlim(-0.6, len(where) - 0.4)
    panel.set_xticks(range(len(where)), [f"{m}" if m else "" for _, m in where], fontsize=7)
    for name, run in groupby(where, key=lambda found: found[0]):
        group = [where[found] for found in run]
        if group[0]:
            panel.axvline(group[0] - 0.5, color="gray", linewidth=0.6)
        middle = (group[0] + group[-1]) / 2
        panel.annotate(name, (middle, 0), (0, -16), xycoords=("data", "axes fraction"), textcoords="offset points",
                       ha="center", va="top", fontsize=7)  # fmt: skip
    panel.grid(axis="y", alpha=0.3)
