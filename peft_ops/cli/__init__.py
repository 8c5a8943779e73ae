"""The command line: `peft-ops finetune | compare | rlhf | check`.

Exit codes: 0 done, 1 a check failed, 2 something for the user to put right (one line on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from .errors import InterruptedRunError, UserError, require

_NEEDS = {
    "finetune": ("transformers", "rich", "matplotlib"),
    "compare": ("transformers", "rich", "matplotlib"),
    "rlhf": ("transformers", "rich", "matplotlib"),
    "check": ("rich",),
}

# Of transformers and its libraries, before they are imported: no second progress bar, no warning about forks.
_ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `peft-ops`."""
    args = parser().parse_args(argv)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        require(*_NEEDS[args.command])
        return import_module(f".{args.command}", __name__).run(args)
    except (UserError, OSError) as error:
        print(f"peft-ops {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except InterruptedRunError as stop:
        print(f"peft-ops {args.command}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"peft-ops {args.command}: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    from .embedded import Recipe
    from .methods import METHODS

    top = argparse.ArgumentParser(prog="peft-ops", description="Fused kernels for parameter-efficient fine-tuning.")
    top.add_argument("--version", action="version", version=f"peft-ops {version('peft-ops')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="finetune | compare | rlhf | check")

    command = commands.add_parser("finetune", help="fine-tune a causal language model")
    command.set_defaults(recipe=Recipe())
    _material(command)
    add, names = command.add_argument, ", ".join(METHODS)
    add("--method", choices=METHODS, default="lora", metavar="METHOD", help=f"one of {names} (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/METHOD)")
    add("--restart", action="store_true", help="start over where the folder holds a run, instead of going on with it")
    _how(command)

    command = commands.add_parser("compare", help="every method from the same base, side by side")
    command.set_defaults(recipe=Recipe())
    _material(command)
    add = command.add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"some of {names} (default: all)")
    add("--out", type=Path, default=Path("runs/compare"), help="folder of results (default: %(default)s)")
    add("--steps", type=_at_least(1), default=60, help="of each method (default: %(default)s)")
    add("--batch-size", type=_at_least(1), help="sequences per step (default: 8; 4 with --model)")
    add("--sequence-length", type=_at_least(1), help="in tokens (default: 128; with --model 512, or what it takes)")
    _machine(command)

    command = commands.add_parser("rlhf", help="reward model, DPO, PPO and GRPO on the embedded model and real code")
    command.set_defaults(recipe=Recipe())
    _rlhf(command)
    _machine(command)

    command = commands.add_parser("check", help="hold every op on this machine's devices against the reference")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    command.add_argument("--device", action="append", help="only this device (may be given again)")
    return top


def _material(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", type=Path, metavar="DIR", help="a transformers causal LM (default: a small embedded one)")
    add(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, or .jsonl with the field text, or prompt and completion (default: Python's standard library)",
    )


def _how(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--steps", type=_at_least(1), help="of the optimizer (default: 240; 200 with --model)")
    add("--batch-size", type=_at_least(1), help="sequences computed at once (default: 8; 4 with --model)")
    add("--accumulation", type=_at_least(1), default=1, help="batches per step (default: %(default)s)")
    add("--sequence-length", type=_at_least(1), help="in tokens (default: 128; with --model 512, or what it takes)")
    add(
        "--held-out",
        type=_within(0, 0.5),
        default=0.05,
        help="share of the data to measure on, 64 sequences at most (default: %(default)s)",
    )
    add(
        "--lr",
        type=_within(0, 1),
        help="peak learning rate (default: by method; with --model 2e-4, full 2e-5)",
    )
    add("--warmup", type=_within(0, 1), default=0.05, help="share of the steps (default: %(default)s)")
    add("--weight-decay", type=_within(0, 1), default=0.0, help="default: %(default)s")
    add(
        "--clip", type=_within(0, float("inf")), default=1.0, help="largest norm of the gradient (default: %(default)s)"
    )
    add("--optim", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: of bitsandbytes, on a GPU")
    add("--r", type=_at_least(1), help="rank of the adapters (default: 8; 16 with --model)")
    add("--lora-alpha", type=_within(0, float("inf")), help="default: 2 r")
    add("--lora-dropout", type=_within(0, 1), help="default: 0")
    add("--target-modules", nargs="+", metavar="NAME", help="default: all-linear; one NAME may be a regular expression")
    add("--layers", type=_at_least(1), metavar="N", help="trained at the top, or frozen below (default: a quarter)")
    add("--virtual-tokens", type=_at_least(1), metavar="N", help="of prompts and prefixes (default: 16)")
    add("--bottleneck", type=_at_least(1), metavar="M", help="features in the middle of adapters (default: 64)")
    add("--init-text", metavar="TEXT", help="what prompts and prefixes start as (default: the start of the data)")
    add("--gradient-checkpointing", action="store_true", help="compute activations again instead of keeping them")
    add("--checkpoint-every", type=_at_least(1), default=50, metavar="N", help="steps (default: %(default)s)")
    add("--evaluate-every", type=_at_least(1), metavar="N", help="steps (default: a sixth of them)")
    _machine(command)


def _rlhf(command: argparse.ArgumentParser) -> None:
    from .rlhf_plan import ALL, PLANS

    add = command.add_argument
    add("--stage", choices=(*PLANS, ALL), default=ALL, help="with those before it that it needs (default: %(default)s)")
    add(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".jsonl with the fields prompt, chosen and rejected (default: pairs from Python's standard library)",
    )
    add("--method", choices=("lora", "qlora"), default="lora", help="of every adapter (default: %(default)s)")
    add("--r", type=_at_least(1), default=8, help="rank of the adapters (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/rlhf"), metavar="DIR", help="folder of the run (default: %(default)s)")
    add("--restart", action="store_true", help="start the stages over that are asked for")
    add("--steps", type=_at_least(1), help=_by_stage("steps"))
    add("--batch-size", type=_at_least(1), help=f"pairs, or prompts, of a step; {_by_stage('batch_size')}")
    add("--lr", type=_within(0, 1), help=f"peak learning rate; {_by_stage('lr')}")
    add("--beta", type=_within(1e-6, 100), help=f"of DPO; {_by_stage('beta')}")
    add("--kl-coef", type=_within(0, 100), help=f"weight of the KL to the sft adapter; {_by_stage('kl_coef')}")
    add("--group-size", type=_at_least(2), help=f"samples of a prompt; {_by_stage('group_size')}")
    add("--max-new-tokens", type=_at_least(1), help=f"of a sample; {_by_stage('max_new_tokens')}")
    add("--checkpoint-every", type=_at_least(1), default=20, metavar="N", help="steps (default: %(default)s)")


def _by_stage(option: str) -> str:
    from .rlhf_plan import PLANS, taken

    values = {name: taken(name, plan)[option] for name, plan in PLANS.items() if option in taken(name, plan)}
    return f"default: {', '.join(f'{name} {value:g}' for name, value in values.items())}"


def _machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=_at_least(0), default=0, help="default: %(default)s")
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    command.add_argument("--dtype", choices=("fp32", "bf16"), help="to compute in (default: bf16 where it is fast)")


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return integer


def _within(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not low <= (value := float(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be between {low:g} and {high:g}, got {text}")
        return value

    return number
