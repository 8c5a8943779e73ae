"""What a run leaves behind: its numbers as JSON, its losses as a chart."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .files import write_file
from .training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Look:
    """Of a method in charts: a colour of Okabe and Ito's, which everyone tells apart, a line and a marker."""

    name: str
    color: str
    line: str
    width: float
    marker: str


# QLoRA's curve lies on LoRA's: a thin dashed line on a wide one shows both.
LOOKS = {
    "lora": Look("LoRA", "#0072b2", "-", 4.0, "o"),
    "qlora": Look("QLoRA", "#e69f00", "--", 2.0, "s"),
    "full": Look("full", "#009e73", "-", 2.0, "^"),
}


def environment(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Where the numbers come from; dtype: what was computed in, where that was one."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    } | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})


def summary(history: History) -> dict[str, float]:
    """The held-out loss before and after, the median time of a step."""
    return {
        "held_out_before": history.held_out[0][1],
        "held_out_after": history.held_out[-1][1],
        "seconds_per_step": median(history.seconds),
    }


def smoothed(values: list[float]) -> list[float]:
    """Gaussian means over neighbours; the standard deviation is a thirtieth of the run."""
    places = torch.arange(len(values), dtype=torch.float64)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / max(1.0, len(values) / 30)) ** 2)
    return (weights @ torch.tensor(values, dtype=torch.float64) / weights.sum(dim=1)).tolist()


def draw_losses(axes: Axes, history: History, method: str) -> None:
    """The loss of every step faint, its running mean bold, the held-out losses as markers."""
    look = LOOKS[method]
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color=look.color, alpha=0.15, linewidth=0.8)
    axes.plot(steps, smoothed(history.losses), look.line, color=look.color, linewidth=look.width, label=look.name)
    axes.plot(
        *zip(*history.held_out, strict=True), look.marker, color=look.color, markeredgecolor="white", markersize=8
    )


def label_losses(axes: Axes, unit: str) -> None:
    """Title, axes, grid and legend of a chart of losses."""
    axes.plot([], [], "o", color="0.4", markeredgecolor="white", markersize=8, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def figure(width: float, height: float, columns: int = 1, widths: tuple[float, ...] = (1.0,)) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(1, columns, width_ratios=widths)


def save_figure(drawn: Any, path: Path) -> None:
    write_file(path, lambda partial: drawn.savefig(partial, dpi=150))


def loss_chart(path: Path, history: History, method: str, unit: str) -> None:
    """The chart of one run."""
    drawn, axes = figure(8, 4.5)
    draw_losses(axes, history, method)
    label_losses(axes, unit)
    save_figure(drawn, path)
