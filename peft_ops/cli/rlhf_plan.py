"""The stages of RLHF: what each needs, and how it runs unless something else is asked for."""

from argparse import Namespace
from dataclasses import dataclass, fields, replace

from .errors import UserError
from .methods import flag


@dataclass(frozen=True)
class Plan:
    """The options of a stage; OPTIONS says which of them it takes.

    batch_size: pairs, or prompts, of a step. beta: of DPO. kl_coef: weight of the KL to the reference, in PPO's rewards
    and GRPO's loss.
    """

    steps: int
    batch_size: int
    lr: float
    beta: float = 0.1
    kl_coef: float = 0.05
    group_size: int = 8
    max_new_tokens: int = 48


PLANS = {
    "sft": Plan(steps=160, batch_size=16, lr=7e-3),
    "reward": Plan(steps=120, batch_size=16, lr=3e-3),
    "dpo": Plan(steps=80, batch_size=16, lr=3e-3),
    "ppo": Plan(steps=40, batch_size=32, lr=1e-3, kl_coef=0.1),
    "grpo": Plan(steps=30, batch_size=16, lr=2e-3, max_new_tokens=32),
}
_COMMON = ("steps", "batch_size", "lr")
OPTIONS = {
    "sft": _COMMON, "reward": _COMMON, "dpo": (*_COMMON, "beta"), "ppo": (*_COMMON, "kl_coef", "max_new_tokens"),
    "grpo": (*_COMMON, "kl_coef", "group_size", "max_new_tokens"),
}  # fmt: skip
NEEDS = {"sft": (), "reward": ("sft",), "dpo": ("sft",), "ppo": ("sft", "reward"), "grpo": ("sft",)}
ALL = "all"


def asked(stage: str) -> list[str]:
    """The stages that --stage names."""
    return list(PLANS) if stage == ALL else [stage]


def order(stage: str) -> list[str]:
    """What --stage names and what it needs, in the order in which they run."""
    wanted = asked(stage)
    return [name for name in PLANS if name in wanted or any(name in NEEDS[one] for one in wanted)]


def taken(stage: str, plan: Plan) -> dict[str, float]:
    """What the stage takes of a plan."""
    return {name: getattr(plan, name) for name in OPTIONS[stage]}


def plans(args: Namespace) -> dict[str, Plan]:
    """A plan for every stage, with the options that were given for those that are asked for.

    Raises UserError: an option that none of them takes.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Plan) if getattr(args, f.name) is not None}
    stages = asked(args.stage)
    for option in given:
        if all(option not in OPTIONS[name] for name in stages):
            takes = ", ".join(map(flag, OPTIONS[args.stage]))
            raise UserError(f"{flag(option)} is no option of --stage {args.stage} (it takes {takes})")
    asked_for = {
        name: replace(PLANS[name], **{option: given[option] for option in OPTIONS[name] if option in given})
        for name in stages
    }
    return PLANS | asked_for
