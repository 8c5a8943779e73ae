"""The report in pictures: how much faster or slower, where under the roof, and what it costs in memory."""

from collections.abc import Iterator
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.contenders import COMPILED, FLOOR, GRAPH, counterpart, is_ours, is_peer
from benchmarks.results import by_op, ceilings_of, contenders, shape_name
from benchmarks.targets import Rows

COLOURS = {
    "peft-ops": "black", "peft-ops fused": "tab:red", FLOOR: "tab:gray", "PEFT": "tab:orange",
    "PEFT + bitsandbytes": "tab:orange", "PEFT + Liger": "tab:olive", "Liger": "tab:olive", "addmm": "tab:blue",
    "LoRA": "tab:blue", "bitsandbytes": "tab:green", "eager": "tab:orange", "eager float32": "tab:brown",
    "joined SDPA": "tab:orange", "SDPA without prefix": "tab:gray", "chunked torch": "tab:blue", "logits": "tab:orange",
    "TRL": "tab:green", "cut-cross-entropy": "tab:purple", "full fine-tuning": "tab:gray",
}  # fmt: skip
ROW, HEAD, WIDTH, DPI = 0.21, 1.15, 7.0, 100  # inches of a row, of what surrounds a panel, of a panel; dots per inch
TICKS = [m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5)]


def draw(results: dict, out: Path) -> list[str]:
    """Writes the pictures that these results have something for; their names."""
    ops = by_op(results)
    made = {"speed.png": speed(ops), "roofline.png": roofline(ops, ceilings_of(results)), "memory.png": memory(ops)}
    for name, figure in made.items():
        if figure:
            figure.suptitle(f"{results['machine_info']['device']}: {figure.get_suptitle()}", fontsize=12)
            figure.savefig(out / name, dpi=DPI, metadata={"Software": None})
            pyplot.close(figure)
    return [name for name, figure in made.items() if figure]


def columns(heights: list[float]) -> Iterator[tuple[int, int]]:
    """(first, end) of two columns of panels, about equally tall."""
    half, end = sum(heights) / 2, 0
    for i in range(len(heights)):
        if sum(heights[: i + 1]) - heights[i] / 2 <= half:
            end = i + 1
    yield from ((0, end), (end, len(heights))) if end < len(heights) else ((0, end),)


def panels(heights: list[float], title: str) -> tuple[pyplot.Figure, list[Axes]]:
    """A figure with a panel of each height, in two columns where there is more than one."""
    parts = list(columns(heights)) if len(heights) > 1 else [(0, len(heights))]
    height = max(sum(heights[a:b]) for a, b in parts) + 0.5
    figure, made = pyplot.figure(figsize=(WIDTH * len(parts), height), layout="constrained"), []
    figure.suptitle(title)
    for part, (a, b) in zip(figure.subfigures(1, len(parts), squeeze=False)[0], parts, strict=True):
        unused = height - 0.5 - sum(heights[a:b])
        ratios = [*heights[a:b], *([unused] if unused > 0.1 else [])]
        axes = part.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        made += axes[: b - a].tolist()
        for axis in axes[b - a :]:
            axis.axis("off")
    return figure, made


def style(name: str) -> dict:
    """Colour by project, shape by the way it runs; graphs are hollow."""
    plain = name.removesuffix(GRAPH).removesuffix(COMPILED)
    colour = COLOURS.get(plain, "tab:pink")
    marker = "D" if name.endswith(COMPILED) else "o"
    return {"marker": marker, "color": colour, "markerfacecolor": "none" if name.endswith(GRAPH) else colour}


def speed(ops: dict[str, Rows]) -> pyplot.Figure | None:
    """A panel per op, a line per shape, a dot per contender at its time over ours."""
    shown = {op: {row: cells for row, cells in rows.items() if len(relative(cells)) > 1} for op, rows in ops.items()}
    shown = {op: rows for op, rows in shown.items() if rows}
    if not shown:
        return None
    title = "time over that of peft-ops (a graph's over its graph); right of 1 is slower"
    figure, axes = panels([HEAD + ROW * len(rows) for rows in shown.values()], title)
    for panel, (op, rows) in zip(axes, shown.items(), strict=True):
        dots(panel, op, rows)
    return figure


def relative(cells: dict[str, dict]) -> dict[str, float]:
    """Times over ours; ours itself once."""
    ours = {name: counterpart(name, cells) for name in cells}
    return {name: cells[name]["median"] / cells[base]["median"] for name, base in ours.items() if base}


def dots(panel: Axes, op: str, rows: Rows) -> None:
    lines = [relative(cells) for cells in rows.values()]
    for name in contenders(rows):
        points = [(line[name], y) for y, line in enumerate(lines) if name in line]
        if points and not (is_ours(name) and all(x == 1 for x, _ in points)):
            panel.plot(
                *zip(*points, strict=True), linestyle="none", label=name, markersize=5.5, zorder=3, **style(name)
            )
    panel.axvline(1.0, color="black", linewidth=1.4)
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.9), max(high, 1.1))
    number_ticks(panel)
    panel.set_yticks(range(len(rows)), map(shape_name, rows), fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.axvspan(panel.get_xlim()[0], 1.0, color="tab:red", alpha=0.05)
    panel.grid(axis="both", alpha=0.25)
    panel.set_title(op, fontsize=10, fontweight="bold", loc="left", pad=20)
    legend_above(panel)


def number_ticks(panel: Axes) -> None:
    low, high = panel.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_xticks(ticks[:: ceil(len(ticks) / 12)] if len(ticks) > 12 else ticks)
    panel.set_xticklabels([f"{tick:g}×" for tick in panel.get_xticks()], fontsize=8)
    panel.minorticks_off()


def legend_above(panel: Axes) -> None:
    handles, names = panel.get_legend_handles_labels()
    if names:
        where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        panel.legend(
            handles, names, fontsize=8, ncols=len(names), frameon=False, handletextpad=0.1, columnspacing=1.0, **where
        )


def roofline(ops: dict[str, Rows], ceilings: dict[str, float]) -> pyplot.Figure | None:
    """Operations per second over operations per byte: ours filled, the fastest peer hollow, under the measured roof."""
    points = {op: found for op, rows in ops.items() if (found := list(under_roof(rows)))}
    if not points or not ceilings:
        return None
    figure, panel = pyplot.subplots(figsize=(11, 7), layout="constrained")
    figure.suptitle("operations per second against the ceilings measured in the same run")
    intensities = [intensity for found in points.values() for intensity, _, _ in found]
    copy, matmul = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    ends = [min(intensities) / 2, matmul / copy, max(*intensities, 2 * matmul / copy) * 2]
    panel.plot(ends, [min(copy * x, matmul) for x in ends], color="black", linewidth=1.5)
    panel.annotate(f"copy {copy / 1e9:,.4g} GB/s", (ends[0] * 1.3, copy * ends[0] * 1.3), (-4, 10), textcoords="offset points",
                   fontsize=9)  # fmt: skip
    panel.annotate(f"bfloat16 matmul {matmul / 1e12:.3g} TFLOP/s", (ends[2], matmul), (-4, 5), textcoords="offset points",
                   fontsize=9, ha="right")  # fmt: skip
    colours = matplotlib.colormaps["tab20"].colors
    for i, (op, found) in enumerate(points.items()):
        colour = colours[2 * i % 20 + 2 * i // 20]
        for intensity, ours, peer in found:
            panel.plot([intensity] * 2, [ours, peer or ours], color=colour, linewidth=0.8, alpha=0.6)
            panel.plot(intensity, ours, "o", color=colour, markersize=6)
            if peer:
                panel.plot(intensity, peer, "o", color=colour, markersize=6, markerfacecolor="none")
        panel.plot([], [], "o", color=colour, label=op)
    panel.set(
        xscale="log", yscale="log", xlabel="operations per byte that the op must move", ylabel="operations per second"
    )
    panel.grid(alpha=0.25)
    handles = [*panel.get_legend_handles_labels()[0], Line2D([], [], linestyle="none", marker="o", color="gray", label="peft-ops"),
               Line2D([], [], linestyle="none", marker="o", color="gray", markerfacecolor="none", label="fastest peer")]  # fmt: skip
    panel.legend(handles=handles, fontsize=8, loc="lower right")
    return figure


def under_roof(rows: Rows) -> Iterator[tuple[float, float, float | None]]:
    """(operations per byte, operations per second of ours, of the fastest peer) of every row."""
    for cells in rows.values():
        own = [cell for name, cell in cells.items() if is_ours(name) and "flops" in cell]
        peers = [cell["median"] for name, cell in cells.items() if is_peer(name)]
        if own:
            flops = own[0]["flops"]
            fastest = min(cell["median"] for cell in own)
            yield flops / own[0]["least_bytes"], flops / fastest, flops / min(peers) if peers else None


def memory(ops: dict[str, Rows]) -> pyplot.Figure | None:
    """Bars side by side: bytes saved and peak memory of training steps, tokens per second of whole ones."""
    shown = []
    for op, rows in ops.items():
        if not op.endswith(("backward", "step")):
            continue
        largest = {row: cells for row, cells in rows.items() if row[2] == max(r[2] for r in rows)}
        for key, unit, what in (("saved_bytes", 1e6, "saved for backward, MB"), ("peak_bytes", 1e6, "peak memory, MB"),
                                ("tokens_per_s", 1, "tokens per second")):  # fmt: skip
            if sum(key in cell for cells in largest.values() for cell in cells.values()) > 1:
                shown.append((f"{op}: {what}", largest, key, unit))
    if not shown:
        return None
    heights = [HEAD + ROW * sum(1 + sum(key in c for c in cells.values()) for cells in rows.values()) * 0.75
               for _, rows, key, _ in shown]  # fmt: skip
    figure, axes = panels(heights, "memory of a training step, at the most rows measured")
    for panel, (title, rows, key, unit) in zip(axes, shown, strict=True):
        bars(panel, title, rows, key, unit)
    return figure


def bars(panel: Axes, title: str, rows: Rows, key: str, unit: float) -> None:
    y, ticks, named, most = 0.0, [], set(), max(c.get(key, 0) for cells in rows.values() for c in cells.values()) / unit
    for cells in rows.values():
        names = [name for name in contenders(rows) if key in cells.get(name, {})]
        ticks.append(y + (len(names) - 1) / 2)
        for name in names:
            value, look = cells[name][key] / unit, style(name)
            hatch = "////" if name.endswith(COMPILED) else None
            panel.barh(y, value, 0.85, color=look["markerfacecolor"], edgecolor="white" if hatch else look["color"], hatch=hatch,
                       linewidth=0.6, label=None if name in named else name)  # fmt: skip
            panel.annotate(f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}", (value, y), (3, 0), textcoords="offset points",
                           va="center", fontsize=7)  # fmt: skip
            named.add(name)
            y += 1
        y += 0.8
    panel.set_xlim(0, most * 1.12 or 1)
    panel.set_yticks(ticks, map(shape_name, rows), fontsize=8)
    panel.set_ylim(y - 1.2, -0.8)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", alpha=0.25)
    panel.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=20)
    legend_above(panel)
