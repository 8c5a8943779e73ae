"""The report in pictures: how much faster or slower, where under the roof, what a training step costs in memory."""

import textwrap
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.contenders import COMPILED, FLOOR, GRAPH
from benchmarks.results import by_op, ceilings_of

COLOURS = {
    "peft-ops": "black", "peft-ops fused": "tab:red", FLOOR: "tab:gray", "PEFT": "tab:orange",
    "PEFT + bitsandbytes": "tab:orange", "PEFT + Liger": "tab:olive", "Liger": "tab:olive", "addmm": "tab:blue",
    "LoRA": "tab:blue", "bitsandbytes": "tab:green", "eager": "tab:orange", "eager float32": "tab:brown",
    "joined SDPA": "tab:orange", "SDPA": "tab:orange", "bitsandbytes C": "tab:olive",
    "SDPA without prefix": "tab:gray", "chunked torch": "tab:blue", "logits": "tab:orange",
    "TRL": "tab:green", "cut-cross-entropy": "tab:purple", "full fine-tuning": "tab:gray",
}  # fmt: skip
ACROSS, WIDTH, HEIGHT, DPI = 4, 4.6, 2.9, 100  # panels in a row of the grid, inches of one, dots per inch


def draw(results: dict, out: Path) -> list[str]:
    """Writes the pictures that these results have something for; their names."""
    from benchmarks import plot_memory, plot_roofline, plot_speed

    ops = by_op(results)
    made = {
        "speed.png": plot_speed.figure(ops),
        "roofline.png": plot_roofline.figure(ops, ceilings_of(results)),
        "memory.png": plot_memory.figure(ops),
    }
    for name, figure in made.items():
        if figure:
            title = f"{results['machine_info']['device']}: {figure.get_suptitle()}"
            figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 9)), fontsize=13)
            figure.savefig(out / name, dpi=DPI, metadata={"Software": None})
            pyplot.close(figure)
    return [name for name, figure in made.items() if figure]


def grid(widths: list[int], title: str) -> tuple[pyplot.Figure, list[Axes]]:
    """A figure with a panel for each width, which is in columns of the grid; they fill its rows in order."""
    places, row, column = [], 0, 0
    for width in widths:
        if column + width > ACROSS:
            row, column = row + 1, 0
        places.append((row, column, column + width))
        column += width
    across = ACROSS if row else max(ceil(column), 2)
    figure = pyplot.figure(figsize=(WIDTH * across, HEIGHT * (row + 1) + 0.5), layout="constrained")
    figure.suptitle(title)
    figure.get_layout_engine().set(hspace=0.16, wspace=0.04)
    cells = figure.add_gridspec(row + 1, across)
    return figure, [figure.add_subplot(cells[r, a:b]) for r, a, b in places]


def style(name: str) -> dict:
    """Colour by project, marker by the way it runs; graphs are hollow."""
    plain = name.removesuffix(GRAPH).removesuffix(COMPILED)
    colour = COLOURS.get(plain, "tab:pink")
    marker = "D" if name.endswith(COMPILED) else "o"
    return {"marker": marker, "color": colour, "markerfacecolor": "none" if name.endswith(GRAPH) else colour}


def title_and_legend(panel: Axes, title: str) -> None:
    """Above the panel, without a say in the width of its column."""
    panel.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=18).set_in_layout(False)
    handles, names = panel.get_legend_handles_labels()
    where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.1, "frameon": False}
    spacing = {"handlelength": 1.0, "handletextpad": 0.3, "columnspacing": 0.7}
    panel.legend(handles, names, fontsize=7, ncols=len(names), **spacing, **where).set_in_layout(False)
