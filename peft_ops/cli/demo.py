"""`peft-ops demo`: LoRA, QLoRA and full fine-tuning of the embedded model, side by side."""

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import trainable_parameters
from . import embedded
from .data import Split, batch, pack
from .device import pick_device, pick_dtype
from .display import make_console, progress
from .files import write_json
from .finetune import EMBEDDED, EMBEDDED_LR, embedded_folder
from .measure import base_bits, saved_for_backward
from .models import METHODS, Method, load_model
from .report import LOOKS, draw_losses, environment, figure, label_losses, save_figure, smoothed, summary
from .tokenizer import byte_tokenizer
from .training import History, Options, Trainer


@dataclass(frozen=True)
class Outcome:
    """What one method took and gave. saved_bytes: for the backward of one batch, parameters excluded."""

    method: str
    trainable: int
    share: float
    saved_bytes: int
    base_bits: float
    seconds_per_step: float
    held_out_before: float
    held_out_after: float
    history: History


def run(args: Namespace) -> int:
    """The command; returns its exit code."""
    console = make_console()
    device, dtype = pick_device(args.device), pick_dtype(args.dtype, args.device)
    folder = embedded_folder(args, console, device, dtype)
    data = pack(embedded.python_source(), byte_tokenizer(), args.recipe.sequence_length, 0.05, args.seed)
    outcomes = [train(name, folder, data, args, device, dtype, console) for name in METHODS]
    console.print(table(outcomes, args.steps))
    chart(args.out / "demo.png", outcomes)
    results = {"environment": environment(device, dtype), "methods": [asdict(o) for o in outcomes]}
    write_json(args.out / "demo.json", results)
    console.print(f"wrote {args.out / 'demo.png'} and {args.out / 'demo.json'}", soft_wrap=True)
    return 0


def train(
    name: str, folder: Path, data: Split, args: Namespace, device: torch.device, dtype: torch.dtype, console: Console
) -> Outcome:
    """One method from the common base, on the common batches."""
    adapter = {} if name == "full" else {"r": EMBEDDED.r, "lora_alpha": 2 * EMBEDDED.r, "target_modules": "all-linear"}
    method = Method(name, adapter)
    torch.manual_seed(args.seed)
    model, _ = load_model(folder, method.base_dtype(dtype))
    method.apply(model).to(device)
    options = Options(
        steps=args.steps, batch_size=EMBEDDED.batch_size, lr=EMBEDDED_LR[name], seed=args.seed, dtype=dtype,
        warmup=max(1, args.steps // 20), evaluate_every=max(1, args.steps // 6),
    )  # fmt: skip
    count, bits = trainable_parameters(model), base_bits(model)
    model.train()
    saved = saved_for_backward(model, batch(data.train, options.batch_size, options.seed, 0).to(device), dtype)
    with progress(console, name, args.steps) as observer:
        history = Trainer(model, data, options, observer).run()
    return Outcome(name, count.trainable, count.share, saved, bits, history=history, **summary(history))


def table(outcomes: list[Outcome], steps: int) -> Table:
    """A row per method."""
    shown = Table(title=f"English bytes to Python source, {steps} steps each from the same base", title_style="bold")
    columns = (
        "method", "trainable\nparameters", "share", "saved for\nbackward", "base bits\nper weight", "time\nper step",
        "held-out loss\nbefore", "held-out loss\nafter",
    )  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for o in outcomes:
        shown.add_row(
            LOOKS[o.method].name, f"{o.trainable:,}", f"{o.share:.2%}", f"{o.saved_bytes / 1e6:.1f} MB",
            f"{o.base_bits:.2f}", f"{1e3 * o.seconds_per_step:.0f} ms", f"{o.held_out_before:.3f}",
            f"{o.held_out_after:.3f}",
        )  # fmt: skip
    return shown


def chart(path: Path, outcomes: list[Outcome]) -> None:
    """The three loss curves, and what each method keeps in memory beside its weights."""
    drawn, (losses, memory) = figure(11, 4.8, columns=2, widths=(2.4, 1.0))
    for o in outcomes:
        draw_losses(losses, o.history, o.method)
    losses.set_title("Fine-tuning on Python source (faint: every step, bold: running mean)")
    label_losses(losses, "byte")
    shown = [
        loss for o in outcomes for loss in (*smoothed(o.history.losses), *(loss for _, loss in o.history.held_out))
    ]
    losses.set_ylim(min(shown) - 0.2, max(shown) + 0.2)

    megabytes: list[Any] = [o.saved_bytes / 1e6 for o in outcomes]
    bars = memory.bar(
        [LOOKS[o.method].name for o in outcomes], megabytes, color=[LOOKS[o.method].color for o in outcomes]
    )
    memory.bar_label(bars, fmt="%.1f", padding=2)
    memory.set_title("Saved for backward")
    memory.set_ylabel("MB per batch, parameters excluded")
    memory.spines[["top", "right"]].set_visible(False)
    save_figure(drawn, path)
