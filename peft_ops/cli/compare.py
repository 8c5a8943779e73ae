"""`peft-ops compare`: every method from the same base, on the same batches, under the same budget."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import trainable_parameters
from . import embedded
from .compare_charts import draw_costs, draw_curves
from .data import Split, batch, pack, read_documents
from .device import pick_device, pick_dtype
from .display import make_console, progress
from .errors import UserError
from .files import write_json
from .finetune import EMBEDDED, OWN_MODEL, embedded_folder, identity, sequence_length, starting_from
from .measure import base_bits, checkpoint_bytes, peak_memory, saved_for_backward
from .methods import METHODS, Method, Settings
from .models import load_model
from .report import environment, summary
from .tokenizer import BYTE_VOCABULARY
from .training import History, Options, Trainer


@dataclass(frozen=True)
class Outcome:
    """What one method took and gave.

    saved_bytes: for the backward of one batch, parameters excluded. peak_bytes: of a training step, weights included.
    checkpoint_bytes: of what is saved after training. held_out_*: nats per token, never learnt.
    """

    method: str
    trainable: int
    share: float
    base_bits: float
    saved_bytes: int
    peak_bytes: int
    checkpoint_bytes: int
    seconds_per_step: float
    held_out_before: float
    held_out_after: float
    history: History


def run(args: Namespace) -> int:
    """The command; returns its exit code."""
    console = make_console()
    device, dtype = pick_device(args.device), pick_dtype(args.dtype, args.device)
    defaults = OWN_MODEL if args.model else EMBEDDED
    args.batch_size = args.batch_size or defaults.batch_size
    folder = args.model or embedded_folder(args, console, device, dtype)
    model, tokenizer = load_model(folder, dtype)
    virtual = defaults.settings.virtual_tokens
    length = sequence_length(model, args.sequence_length, defaults.sequence_length, virtual)
    data = pack(
        read_documents(args.data) if args.data else embedded.python_source(), tokenizer, length, 0.05, args.seed
    )
    settings = starting_from(defaults.settings, None, tokenizer, data)
    unit = "byte" if tokenizer.vocabulary == BYTE_VOCABULARY else "token"
    finished = Finished(args.out / "unfinished.json", identity(args, folder, dtype, data))
    for name in args.methods or METHODS:
        if name in finished.outcomes:
            console.print(f"{name}: taken over from the interrupted comparison")
            continue
        try:
            finished.add(train(METHODS[name], folder, data, settings, args, device, dtype, console))
        except UserError as error:  # one method that this model cannot take, or that diverges, does not end the others
            console.print(f"[bold red]{name} left out[/]: {error}", soft_wrap=True)
    outcomes = list(finished.outcomes.values())
    if not outcomes:
        raise UserError("no method could be trained on this model")
    console.print(table(outcomes, args.steps, unit))
    labelled = [(METHODS[outcome.method], outcome) for outcome in outcomes]
    charts = {"costs": args.out / "compare.png", "losses": args.out / "losses.png"}
    draw_costs(charts["costs"], labelled, unit)
    draw_curves(charts["losses"], labelled, unit)
    results = {"environment": environment(device, dtype), "steps": args.steps, "methods": [asdict(o) for o in outcomes]}
    write_json(args.out / "compare.json", results)
    finished.file.unlink(missing_ok=True)
    written = ", ".join(map(str, (*charts.values(), args.out / "compare.json")))
    console.print(f"wrote {written}", soft_wrap=True)
    return 0


class Finished:
    """The methods that are done, kept in a file until all are: an interrupted comparison goes on with the next one."""

    def __init__(self, file: Path, identity: dict[str, Any]) -> None:
        self.file, self.identity = file, identity
        self.outcomes: dict[str, Outcome] = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if kept["identity"] == identity:
            outcomes = [Outcome(**o | {"history": History(**o["history"])}) for o in kept["methods"]]
            self.outcomes = {outcome.method: outcome for outcome in outcomes}

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.method] = outcome
        write_json(self.file, {"identity": self.identity, "methods": [asdict(o) for o in self.outcomes.values()]})


def train(
    method: Method, folder: Path, data: Split, settings: Settings, args: Namespace, device: torch.device,
    dtype: torch.dtype, console: Console,
) -> Outcome:  # fmt: skip
    """One method from the common base, on the common batches."""
    torch.manual_seed(args.seed)
    model, _ = load_model(folder, method.base_dtype(dtype))
    method.apply(model, settings).to(device)
    lr = method.lr if args.model else method.embedded_lr
    options = Options(
        steps=args.steps, batch_size=args.batch_size, lr=lr, seed=args.seed, dtype=dtype,
        layerwise=method.layerwise, lora_plus=method.lora_plus,
        warmup=max(1, args.steps // 20), evaluate_every=max(1, args.steps // 4),
    )  # fmt: skip
    count, bits = trainable_parameters(model), base_bits(model)
    model.train()
    saved = saved_for_backward(model, batch(data.train, options.batch_size, options.seed, 0).to(device), dtype)
    peak = peak_memory(model, data, options)
    with progress(console, method.name, args.steps) as observer:
        history = Trainer(model, data, options, observer).run()
    losses: dict[str, Any] = summary(history)
    return Outcome(
        method.name, count.trainable, count.share, bits, saved, peak, checkpoint_bytes(model), history=history, **losses
    )  # fmt: skip


def table(outcomes: list[Outcome], steps: int, unit: str) -> Table:
    """A row per method, a line between families."""
    shown = Table(title=f"{steps} steps of each method from the same base, on the same batches", title_style="bold")
    columns = (
        "method", "trained\nparameters", "share", "saved for\nbackward", "peak\nmemory", "time per\nstep",
        f"loss before\n(nats/{unit})", "loss\nafter", "checkpoint",
    )  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    family = METHODS[outcomes[0].method].family
    for o in outcomes:
        method = METHODS[o.method]
        if method.family != family:
            shown.add_section()
            family = method.family
        shown.add_row(
            method.label, f"{o.trainable:,}", f"{o.share:.2%}", megabytes(o.saved_bytes), megabytes(o.peak_bytes),
            f"{1e3 * o.seconds_per_step:.0f} ms", f"{o.held_out_before:.3f}", f"{o.held_out_after:.3f}",
            megabytes(o.checkpoint_bytes),
        )  # fmt: skip
    return shown


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes < 1e6 else f"{nbytes / 1e6:,.1f} MB"
