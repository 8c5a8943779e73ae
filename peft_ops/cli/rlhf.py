"""`peft-ops rlhf`: supervised fine-tuning, reward model, DPO, PPO and GRPO, as adapters over one frozen base."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from .. import adapt
from . import embedded
from .device import pick_device, pick_dtype
from .display import make_console, progress
from .files import write_json
from .finetune import embedded_folder
from .methods import METHODS, Settings, flag
from .models import load_model
from .report import environment
from .rlhf_charts import draw
from .rlhf_data import Pairs, python_pairs, read_pairs
from .rlhf_folder import forget, read_result, results, write_result
from .rlhf_online import GRPO, PPO
from .rlhf_plan import NEEDS, Plan, asked, order, plans, taken
from .rlhf_preference import DPO, SFT, Reward
from .rlhf_report import lines, markdown, table
from .rlhf_stage import Shared, Stage
from .rlhf_trainer import StageTrainer
from .run_folder import RunFolder
from .tokenizer import byte_tokenizer
from .training import Options

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (SFT, Reward, DPO, PPO, GRPO)}
_TRAIN, _HELD_OUT = 4096, 256  # pairs


def run(args: Namespace) -> int:
    """The command; returns its exit code."""
    console = make_console()
    device, dtype = pick_device(args.device), pick_dtype(args.dtype, args.device)
    planned, wanted = plans(args), asked(args.stage)
    pairs = pairs_of(args)  # before the minute that the base takes
    folder = embedded_folder(args, console, device, dtype)
    shared = prepare(args, folder, pairs, device, dtype)
    facts = identity(args, folder, dtype, shared)
    console.print(
        f"{args.method} adapters over one base; {len(shared.pairs.train):,} pairs to learn from, "
        f"{len(shared.pairs.held_out)} of other files held out"
    )
    fingerprints: dict[str, str] = {}
    for name in order(args.stage):
        if name in wanted and args.restart:
            forget(args.out / name)
        finished = None if name in wanted else read_result(args.out / name)
        if name not in wanted:
            console.print(f"{name}: {'taken from the folder' if finished else 'runs first'}, {args.stage} needs it")
        plan = Plan(**finished["plan"]) if finished else planned[name]
        parents = {need: fingerprints[need] for need in NEEDS[name]}
        trainer = StageTrainer(STAGES[name](shared, plan, options_of(args, plan, dtype)))
        run_stage(
            args.out / name, trainer, facts | {flag(k): v for k, v in taken(name, plan).items()} | parents, console
        )
        fingerprints[name] = trainer.fingerprint()
        write_result(args.out / name, name, plan, fingerprints[name], parents, trainer.history)
    report(args, console, environment(device, dtype))
    return 0


def pairs_of(args: Namespace) -> Pairs:
    """Those of --data, or of the standard library."""
    if args.data:
        return read_pairs(args.data, embedded.POSITIONS, byte_tokenizer(), args.seed)
    return python_pairs(embedded.python_source(), _TRAIN, _HELD_OUT, args.seed)


def prepare(args: Namespace, folder: Path, pairs: Pairs, device: torch.device, dtype: torch.dtype) -> Shared:
    """The frozen base with the adapter that is to become sft, and the pairs."""
    model, tokenizer = load_model(folder, dtype)
    settings = Settings(r=args.r)
    torch.manual_seed(args.seed)
    adapt(model, METHODS[args.method].config(settings, model), adapter_name="sft")
    model.to(device).eval()  # the adapters have no dropout
    others = METHODS["lora"].config(settings, model)  # the base is in 4 bits already where it is to be
    return Shared(model, tokenizer, pairs, others, device)  # type: ignore[arg-type]


def identity(args: Namespace, folder: Path, dtype: torch.dtype, shared: Shared) -> dict[str, Any]:
    """What all stages of a folder have in common."""
    facts = {"--seed": args.seed, "--method": args.method, "--r": args.r, "--dtype": str(dtype)}
    return facts | {"--data": shared.pairs.fingerprint(), "base model": folder.name}


def options_of(args: Namespace, plan: Plan, dtype: torch.dtype) -> Options:
    return Options(
        steps=plan.steps, batch_size=plan.batch_size, lr=plan.lr, warmup=max(1, plan.steps // 20), seed=args.seed,
        dtype=dtype, evaluate_every=-(-plan.steps // 4), checkpoint_every=args.checkpoint_every,
    )  # fmt: skip


def run_stage(folder: Path, trainer: StageTrainer, facts: dict[str, Any], console: Any) -> None:
    """To its end, from where it was interrupted; then its adapter is written."""
    name, steps = trainer.stage.name, trainer.options.steps
    run_folder = RunFolder(folder, facts)
    resumed = run_folder.resume(trainer)
    if resumed and trainer.done == steps:
        console.print(f"{name}: finished before, {steps} steps")
    else:
        if resumed:
            console.print(f"{name}: resumed from {run_folder.file} after step {trainer.done} of {steps}")
        with run_folder.stopping_cleanly(), progress(console, name, steps, trainer.done) as observer:
            trainer.observer = observer
            trainer.run(run_folder.after_step)
    trainer.stage.save(folder)
    for line in lines(name, trainer.history.held_out):
        console.print(f"[bold]{line}[/]", soft_wrap=True)


def report(args: Namespace, console: Any, where: dict[str, str]) -> None:
    """The table on the screen; report.json, report.md and the chart of all finished stages in the folder."""
    found, out = results(args.out), args.out
    console.print(table(found))
    draw(out / "rlhf.png", found)
    stages = {name: result | {"measured": lines(name, result["history"]["held_out"])} for name, result in found.items()}
    facts = {"method": args.method, "seed": args.seed, "r": args.r, "environment": where}
    write_json(out / "report.json", facts | {"stages": stages})
    markdown(out / "report.md", found, facts)
    written = ", ".join(str(out / name) for name in ("rlhf.png", "report.md", "report.json"))
    console.print(f"wrote {written}", soft_wrap=True)
