"""The figures of a run of stages: lines, a table on the screen, a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_file
from .rlhf_folder import Result
from .rlhf_plan import PLANS
from .rlhf_stage import Metrics

if TYPE_CHECKING:
    from rich.table import Table

# {stage: {metric: what it is}}; all of them on what is held out.
MEASURES = {
    "sft": {"loss": "loss of real continuations, nats per byte", "accuracy": "pairs whose real side is likelier"},
    "reward": {"accuracy": "accuracy of pairs", "margin": "score, real minus damaged"},
    "dpo": {"accuracy": "accuracy of pairs, implicit reward", "margin": "implicit reward, real minus damaged"},
    "ppo": {
        "reward": "reward: score of the reward model", "kl": "KL to sft, nats per completion",
        "verified": "verifiable reward, not trained on", "length": "length, tokens",
    },
    "grpo": {
        "reward": "reward: verifiable, 0 to 1", "kl": "KL to sft, nats per completion", "length": "length, tokens",
    },
}  # fmt: skip
HeldOut = Sequence[tuple[int, Metrics]]


def lines(stage: str, held_out: HeldOut) -> list[str]:
    """One for each measure: before and after."""
    (_, before), (_, after) = held_out[0], held_out[-1]
    return [f"{stage}: {text} {before[key]:.3f} -> {after[key]:.3f}" for key, text in MEASURES[stage].items()]


def rows(found: dict[str, Result]) -> list[tuple[str, ...]]:
    """(stage, measure, before, after, steps, seconds), the last two with the first measure of a stage."""
    made: list[tuple[str, ...]] = []
    for stage, result in found.items():
        held_out, steps = result["history"]["held_out"], len(result["history"]["steps"])
        last = (str(steps), f"{result['seconds']:.0f} s")
        for key, text in MEASURES[stage].items():
            made.append((stage, text, f"{held_out[0][1][key]:.3f}", f"{held_out[-1][1][key]:.3f}", *last))
            last = ("", "")
    return made


def table(found: dict[str, Result]) -> Table:
    """A row per measure, a line between stages."""
    from rich.table import Table

    shown = Table(title="Held out, before and after each stage", title_style="bold")
    for column in ("stage", "measure", "before", "after", "steps", "training"):
        shown.add_column(column, justify="left" if column in ("stage", "measure") else "right", no_wrap=True)
    stage = ""
    for row in rows(found):
        if stage not in ("", row[0]):
            shown.add_section()
        shown.add_row("" if row[0] == stage else row[0], *row[1:])
        stage = row[0]
    return shown


def markdown(path: Path, found: dict[str, Result], facts: dict[str, Any]) -> None:
    """The table, what it was measured on, and the options of every stage."""
    where = facts["environment"]
    text = ["# peft-ops rlhf", ""]
    text += [f"{facts['method']} adapters of rank {facts['r']}, seed {facts['seed']}; " + ", ".join(where.values()), ""]
    text += ["![reward, KL and accuracy](rlhf.png)", "", "Held out, before and after each stage:", ""]
    text += ["| stage | measure | before | after | steps | training |", "|---|---|---|---|---|---|"]
    text += [f"| {' | '.join(row)} |" for row in rows(found)]
    text += ["", "| stage | options |", "|---|---|"]
    for name in (name for name in PLANS if name in found):
        text.append(f"| {name} | {', '.join(f'{key} {value:g}' for key, value in found[name]['plan'].items())} |")
    page = "\n".join(text) + "\n"
    write_file(path, lambda partial: partial.write_text(page, encoding="utf-8"))
