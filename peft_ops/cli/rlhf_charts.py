"""The chart of `peft-ops rlhf`: reward, KL to the reference, accuracy of pairs."""

from pathlib import Path
from typing import Any

from .report import figure, save_figure, smoothed
from .rlhf_folder import Result

_COLORS = {"reward": "#009e73", "dpo": "#cc79a7", "ppo": "#0072b2", "grpo": "#d55e00"}  # of Okabe and Ito
_LABELS = {"reward": "reward model", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}


def draw(path: Path, found: dict[str, Result]) -> None:
    """Every step faint, its running mean bold, what is held out as markers; panels of stages not run say so.

    Accuracies of a step are those of few pairs: of them the held-out ones are joined, and there is no mean.
    """
    drawn, (rewards, divergence, accuracy) = figure(15, 4.4, columns=3, widths=(1.25, 1, 1))
    _draw_rewards(rewards, found)
    _draw_lines(divergence, found, ("ppo", "grpo"), "kl")
    divergence.set_title("KL to the reference (sft)", fontsize=11)
    divergence.set_ylabel("nats per completion")
    _draw_lines(accuracy, found, ("reward", "dpo"), "accuracy", joined=True)
    accuracy.set_title("Accuracy of preference pairs", fontsize=11)
    accuracy.set_ylabel("share in the right order")
    accuracy.set_ylim(0.28, 1.02)
    accuracy.axhline(0.5, color="0.5", linewidth=1, linestyle=":", label="chance")
    for ax in (divergence, accuracy):
        ax.spines[["top", "right"]].set_visible(False)
        if ax.has_data():
            ax.legend(frameon=False, fontsize=9, loc="best")
    save_figure(drawn, path)


def _draw_rewards(ax: Any, found: dict[str, Result]) -> None:
    """PPO's on the left axis, GRPO's on the right: they are in different units."""
    right = ax.twinx()
    for axis, stage, unit in ((ax, "ppo", "score of the reward model"), (right, "grpo", "verifiable reward (0 to 1)")):
        _draw_lines(axis, found, (stage,), "reward")
        axis.set_ylabel(f"{_LABELS[stage]}: {unit}", color=_COLORS[stage])
        axis.tick_params(axis="y", colors=_COLORS[stage])
        axis.spines["top"].set_visible(False)
    right.grid(visible=False)
    handles = [handle for axis in (ax, right) for handle in axis.get_legend_handles_labels()[0]]
    if handles:
        ax.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    ax.set_title("Reward", fontsize=11)


def _draw_lines(ax: Any, found: dict[str, Result], stages: tuple[str, ...], key: str, joined: bool = False) -> None:
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    missing = [_LABELS[stage] for stage in stages if stage not in found]
    if len(missing) == len(stages):
        ax.text(0.5, 0.5, f"{' and '.join(missing)}: not run", transform=ax.transAxes, ha="center", color="0.5")
    for stage in (stage for stage in stages if stage in found):
        history, color = found[stage]["history"], _COLORS[stage]
        values = [metrics[key] for metrics in history["steps"]]
        places = range(1, len(values) + 1)
        ax.plot(places, values, color=color, alpha=0.22, linewidth=0.9)
        if not joined:
            ax.plot(places, smoothed(values), color=color, linewidth=2.2, label=f"{_LABELS[stage]}, in training")
        held_out = [(step, metrics[key]) for step, metrics in history["held_out"]]
        ax.plot(
            *zip(*held_out, strict=True), "o-" if joined else "o", color=color, markeredgecolor="white", markersize=8,
            label=f"{_LABELS[stage]}, held out",
        )  # fmt: skip
