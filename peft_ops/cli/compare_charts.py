"""The two charts of `peft-ops compare`: what methods take and give, and how they learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import Method
from .report import FAMILY_COLORS, figure, save_figure, smoothed

if TYPE_CHECKING:
    from .compare import Outcome

Row = tuple[Method, "Outcome"]


def draw_costs(path: Path, rows: list[Row], unit: str) -> None:
    """A row per method, a column per measure; colours are families."""
    measures = (
        ("Trained parameters\n(log scale)", lambda o: o.trainable, "{:,.0f}", True),
        ("Saved for backward\n(MB per batch)", lambda o: o.saved_bytes / 1e6, "{:.1f}", False),
        ("Peak memory\n(MB)", lambda o: o.peak_bytes / 1e6, "{:.0f}", False),
        ("Time per step\n(ms)", lambda o: 1e3 * o.seconds_per_step, "{:.0f}", False),
        ("Checkpoint\n(MB, log scale)", lambda o: o.checkpoint_bytes / 1e6, "{:.2f}", True),
    )
    drawn, axes = figure(16, 1.6 + 0.36 * len(rows), columns=6, widths=(1.4, 1, 1, 1, 1, 1))
    colors, places = [FAMILY_COLORS[method.family] for method, _ in rows], list(range(len(rows)))
    _draw_gains(axes[0], [outcome for _, outcome in rows], colors, unit)
    for ax, (title, value, form, log) in zip(axes[1:], measures, strict=True):
        values: list[Any] = [value(outcome) for _, outcome in rows]
        bars = ax.barh(places, values, color=colors, log=log)
        ax.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(*((min(values) / 3, max(values) * 40) if log else (0, max(values) * 1.3)))
    for column, ax in enumerate(axes):
        ax.set_yticks(places, [method.label for method, _ in rows] if column == 0 else [""] * len(rows))
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", labelsize=8)
    save_figure(drawn, path)


def _draw_gains(ax: Any, outcomes: list[Outcome], colors: list[str], unit: str) -> None:
    """From the held-out loss before training (grey) to that after it."""
    for place, (outcome, color) in enumerate(zip(outcomes, colors, strict=True)):
        before, after = outcome.held_out_before, outcome.held_out_after
        ax.plot([before, after], [place, place], color=color, linewidth=2, alpha=0.5)
        ax.plot([before], [place], "o", color="0.6", markersize=5)
        ax.plot([after], [place], "o", color=color, markersize=8)
        at = (min(before, after), place)
        ax.annotate(f"{after:.3f}", at, (-8, -3), textcoords="offset points", fontsize=8, ha="right")
    shown = [loss for o in outcomes for loss in (o.held_out_before, o.held_out_after)]
    ax.set_xlim(min(shown) - 0.25 * (max(shown) - min(shown) + 0.01), max(shown) + 0.05)
    ax.set_title(f"Held-out loss, before (grey) and after\n(nats per {unit})", fontsize=10)
    ax.grid(axis="x", alpha=0.25)


def draw_curves(path: Path, rows: list[Row], unit: str) -> None:
    """A panel per family on common axes: the running mean of the training loss, held-out losses as markers."""
    families = list(dict.fromkeys(method.family for method, _ in rows))
    drawn, axes = figure(4.2 * len(families), 4.2, columns=len(families), widths=(1.0,) * len(families))
    panels = [axes] if len(families) == 1 else list(axes)
    shown: list[float] = []
    for family, ax in zip(families, panels, strict=True):
        members = [row for row in rows if row[0].family == family]
        for number, (method, outcome) in enumerate(members):
            color, marker = _PALETTE[number % len(_PALETTE)], "os^DvpX"[number % 7]
            curve, held_out = smoothed(outcome.history.losses), outcome.history.held_out
            ax.plot(range(1, len(curve) + 1), curve, color=color, linewidth=1.8, label=method.label)
            ax.plot(*zip(*held_out, strict=True), marker, color=color, markeredgecolor="white", markersize=6)
            shown += [*curve, *(loss for _, loss in held_out)]
        ax.set_title(family, fontsize=11)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    for ax in panels:
        ax.set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    panels[0].set_ylabel(f"loss (nats per {unit}; markers: held out)")
    save_figure(drawn, path)


_PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # of Okabe and Ito
