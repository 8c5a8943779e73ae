"""Bars side by side: bytes saved and peak memory of training steps, and tokens per second of whole ones."""

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.contenders import COMPILED, GRAPH
from benchmarks.plots import ACROSS, grid, style, title_and_legend
from benchmarks.results import contenders
from benchmarks.targets import Rows

SHOWN = (
    ("saved_bytes", 1e6, "saved, MB"), ("peak_bytes", 1e6, "peak, MB"), ("tokens_per_s", 1, "tokens per second"),
)  # fmt: skip
WEIGHTS = 2  # weights of an op that are shown; the tables have all


def figure(ops: dict[str, Rows]) -> pyplot.Figure | None:
    """At the most rows of x that were measured for each op."""
    panels = []
    for op, rows in ops.items():
        if not op.endswith(("backward", "step")):
            continue
        largest = most_rows(rows)
        for key, unit, what in SHOWN:
            if sum(key in cell for cells in largest.values() for cell in cells.values()) > 1:
                panels.append((f"{op}: {what}", largest, key, unit))
    if not panels:
        return None
    wide = [ACROSS if len(rows) > 8 else 2 if len(rows) > 2 else 1 for _, rows, _, _ in panels]
    order = sorted(range(len(panels)), key=lambda i: wide[i])
    made, axes = grid([wide[i] for i in order], "memory of training steps, and tokens per second of whole ones")
    for i, panel in zip(order, axes, strict=True):
        title, rows, key, unit = panels[i]
        bars(panel, rows, key, unit)
        title_and_legend(panel, title)
    return made


def most_rows(rows: Rows) -> Rows:
    """Those of the largest M, of the first weights."""
    largest = {row: cells for row, cells in rows.items() if row[2] == max(r[2] for r in rows)}
    weights = list(dict.fromkeys(row[:2] for row in largest))[:WEIGHTS]
    return {row: cells for row, cells in largest.items() if row[:2] in weights}


def bars(panel: Axes, rows: Rows, key: str, unit: float) -> None:
    x, ticks, named = 0, [], set()
    for cells in rows.values():
        names = [name for name in contenders(rows) if key in cells.get(name, {}) and GRAPH not in name]
        ticks.append(x + (len(names) - 1) / 2)
        for name in names:
            value, label = cells[name][key] / unit, None if name in named else name
            hatched = {"hatch": "////", "edgecolor": "white"} if name.endswith(COMPILED) else {}
            panel.bar(x, value, 0.9, color=style(name)["color"], label=label, linewidth=0, **hatched)
            number = f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"
            panel.annotate(number, (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=6, rotation=90)
            named.add(name)
            x += 1
        x += 1
    panel.set_ylim(0, panel.get_ylim()[1] * 1.15)
    panel.set_xlim(-1, x - 1)
    panel.set_xticks(ticks, words(rows), fontsize=7)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_axisbelow(True)
    panel.grid(axis="y", alpha=0.3)


def words(rows: Rows) -> list[str]:
    """Of each row, without the sizes where all share them."""
    shared = len(rows) > WEIGHTS and len({row[:3] for row in rows}) == 1
    sizes = [[] if shared else [f"{n}×{k}, M = {m}"] for n, k, m, _ in rows]
    return ["\n".join([*size, *filter(None, row[3].split(", "))]) for size, row in zip(sizes, rows, strict=True)]
