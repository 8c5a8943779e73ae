"""What a run leaves behind: its numbers as JSON, its losses as a chart."""

from __future__ import annotations

import platform
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .files import write_file
from .training import History

if TYPE_CHECKING:
    from .methods import Method


# Of a family of methods in charts: colours of Okabe and Ito, which everyone tells apart.
FAMILY_COLORS = {"full and partial": "#009e73", "prompts": "#cc79a7", "adapters": "#e69f00", "LoRA": "#0072b2"}


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


def figure(width: float, height: float, columns: int = 1, widths: tuple[float, ...] = (1.0,)) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, drawn.subplots(1, columns, width_ratios=widths)


def save_figure(drawn: Any, path: Path) -> None:
    write_file(path, lambda partial: drawn.savefig(partial, dpi=150))


def loss_chart(path: Path, history: History, method: Method, unit: str) -> None:
    """The chart of one run: the loss of every step faint, its running mean bold, the held-out losses as markers."""
    drawn, axes = figure(8, 4.5)
    steps, color = range(1, len(history.losses) + 1), FAMILY_COLORS[method.family]
    axes.plot(steps, history.losses, color=color, alpha=0.2, linewidth=0.8)
    axes.plot(steps, smoothed(history.losses), color=color, linewidth=2.5, label=method.label)
    held_out = zip(*history.held_out, strict=True)
    axes.plot(*held_out, "o", color=color, markeredgecolor="white", markersize=8, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(drawn, path)
