"""The roofline: operations per second over operations per byte, under the ceilings measured in the same run."""

from collections.abc import Iterator

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D

from benchmarks.contenders import is_ours, is_peer
from benchmarks.targets import Rows


def figure(ops: dict[str, Rows], ceilings: dict[str, float]) -> pyplot.Figure | None:
    """A filled point for ours and a hollow one for the fastest peer in every row, a colour per op."""
    points = {op: found for op, rows in ops.items() if (found := list(under_roof(rows)))}
    if not points or not ceilings:
        return None
    made, panel = pyplot.subplots(figsize=(13, 8), layout="constrained")
    made.suptitle("operations per second against the ceilings measured in the same run")
    copy, matmul = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    intensities = [intensity for found in points.values() for intensity, _, _ in found]
    ends = [min(intensities) / 1.5, matmul / copy, max(*intensities, 2 * matmul / copy) * 1.5]
    roof = f"copy {copy / 1e9:,.4g} GB/s, bfloat16 matmul {matmul / 1e12:.3g} TFLOP/s"
    panel.plot(ends, [min(copy * x, matmul) for x in ends], color="black", linewidth=1.5, label=roof)
    colours = matplotlib.colormaps["tab20"].colors
    for i, (op, found) in enumerate(points.items()):
        look = {"color": colours[(2 * i + 2 * i // 20) % 20], "markersize": 5}
        for intensity, ours, peer in found:
            panel.plot([intensity] * 2, [ours, peer or ours], color=look["color"], linewidth=0.7, alpha=0.5)
            panel.plot(intensity, ours, "o", **look)
            if peer:
                panel.plot(intensity, peer, "o", markerfacecolor="none", markeredgewidth=0.8, **look)
        panel.plot([], [], "o", label=op, **look)
    panel.set(xscale="log", yscale="log")
    panel.set(xlabel="operations per byte that the op must move", ylabel="operations per second")
    panel.grid(alpha=0.25)
    dot = {"linestyle": "none", "marker": "o", "color": "gray"}
    whose = [
        Line2D([], [], label="peft-ops", **dot),
        Line2D([], [], label="fastest peer", markerfacecolor="none", **dot),
    ]
    panel.legend(handles=[*panel.get_legend_handles_labels()[0], *whose], fontsize=8, loc="lower right")
    return made


def under_roof(rows: Rows) -> Iterator[tuple[float, float, float | None]]:
    """(operations per byte, operations per second of ours, of the fastest peer) of every row."""
    for cells in rows.values():
        own = [cell for name, cell in cells.items() if is_ours(name) and "flops" in cell]
        peers = [cell["median"] for name, cell in cells.items() if is_peer(name)]
        if own:
            flops = own[0]["flops"]
            fastest = min(cell["median"] for cell in own)
            yield flops / own[0]["least_bytes"], flops / fastest, flops / min(peers) if peers else None
