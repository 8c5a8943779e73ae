"""Hugging Face TRL's trainers on our log-prob op, and on one copy of the weights.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` for log-probabilities, of a forward that they put on
the model at construction. It reads the output head's weight alone: an adapter on the head is left out, a 4-bit head
fails. The functions here go over a trainer after it was made.
"""

import warnings
from typing import Any, TypeVar

import torch

from ..nf4 import NF4Weight
from ..nn import Head, head_of
from .head_statistics import STATISTICS, head_statistics
from .reference_model import ReferenceModel as ReferenceModel

# What a trainer reads of an output, of itself and for what it logs.
OUTPUTS = {
    "SFTTrainer": ("log_probs", "entropy", "is_top1"),
    "DPOTrainer": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "KTOTrainer": ("log_probs", "entropy", "mean_logits"),
    "GRPOTrainer": ("log_probs", "entropy"),
    "RLOOTrainer": ("log_probs", "entropy"),
}
_KNOWN = ("log_probs", "entropy", *STATISTICS)
_T = TypeVar("_T")


def use_fused_head(
    model_or_trainer: _T, temperature: float | None = None, outputs: tuple[str, ...] | None = None
) -> _T:
    """Make `fused_lm_head=True` go through ops.linear_logprob and the head as it is at each call; returns its argument.

    Called again, it replaces what it put there before; remove_fused_head takes it out. Other calls of the model, and so
    `generate`, are left as they are.

    Args:
        model_or_trainer: a transformers causal LM, or a TRL trainer that was made of one (call this after the trainer
            was made: it puts a forward of its own there).
        temperature: divides the logits. None is the trainer's, 1 for a model.
        outputs: fields of TRL's FusedCausalLMOutput to fill, among 'log_probs', 'entropy', 'mean_logits', 'is_top1',
            'log_sum_sq_probs'; None is what the trainer reads, log-probs and entropy for a model. The last three cost a
            second pass of the head, without gradients.

    Raises:
        ImportError: no TRL that calls models so (1.16 does).
        TypeError: the output head is of a kind that the op cannot take.
        ValueError: a trainer that computes no log-probs so; an unknown output; a temperature that is not positive;
            cast_lm_head_to_fp32 with an adapted head.

    Source: TRL 1.16, trl/trainer/utils.py, for the arguments and the fields.
    """
    trainer = model_or_trainer if hasattr(model_or_trainer, "accelerator") else None
    model: Any = model_or_trainer if trainer is None else _model_of(trainer)
    if trainer is not None:
        outputs = _outputs_of(trainer) if outputs is None else outputs
        temperature = getattr(trainer, "temperature", 1.0) if temperature is None else temperature
        _check_settings(trainer, model)
    temperature = 1.0 if temperature is None else temperature
    outputs = ("log_probs", "entropy") if outputs is None else tuple(outputs)
    if unknown := set(outputs) - set(_KNOWN):
        raise ValueError(f"outputs: {sorted(unknown)} not known; there are {', '.join(_KNOWN)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    _output_class()
    head_of(model)
    if isinstance(_forward_of(model), FusedForward):
        remove_fused_head(model)
    entropy_bonus = bool(getattr(trainer, "_entropy_bonus_enabled", False))
    model.forward = FusedForward(model, temperature, outputs, entropy_bonus)
    return model_or_trainer


def remove_fused_head(model_or_trainer: _T) -> _T:
    """Give the model the forward back that it had before use_fused_head, TRL's own where a trainer had put it there.

    Raises:
        ValueError: there is none to remove, or something wrapped the forward since (mixed precision does).
    """
    model: Any = _model_of(model_or_trainer) if hasattr(model_or_trainer, "accelerator") else model_or_trainer
    ours = _forward_of(model)
    if not isinstance(ours, FusedForward):
        raise ValueError("the model's forward is not one of use_fused_head, or was wrapped since")
    del model.forward
    if ours.was_set:
        model.forward = ours.previous
    return model_or_trainer


def use_reference(trainer: _T, beta: float | None = None) -> _T:
    """Make the reference of a TRL trainer its own model with the adapters off; returns the trainer.

    For DPO and KTO, `ref_model=ReferenceModel(model)` at construction does the same. GRPO and RLOO take no reference
    and load a second model where beta is not 0: leave beta at 0 there, and give it here.

    Raises:
        ValueError: a trainer without a reference; beta is 0, so none is used; sync_ref_model, which would move a
            reference that has no weights of its own; a model without a base to go back to.
    """
    held: Any = trainer
    if not hasattr(held, "ref_model"):
        raise ValueError(f"a {type(held).__name__} has no reference")
    if getattr(held.args, "sync_ref_model", False):
        raise ValueError("sync_ref_model=True needs a reference with weights of its own")
    if not (held.beta if beta is None else beta):
        raise ValueError("beta is 0, so no reference is used: give the one that is meant, use_reference(trainer, beta)")
    held.ref_model = ReferenceModel(_model_of(held))
    if beta is not None:
        held.beta = held.args.beta = beta
    return trainer


class FusedForward:
    """A model's forward with `fused_lm_head=True`; copied with the model, it is the copy's."""

    def __init__(self, model: Any, temperature: float, outputs: tuple[str, ...], entropy_bonus: bool = False) -> None:
        self.model, self.temperature, self.outputs, self.entropy_bonus = model, temperature, outputs, entropy_bonus
        self.was_set, self.previous = "forward" in vars(model), model.forward
        self.__wrapped__ = type(model).forward  # whose signature `generate` reads

    def __call__(
        self, *args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As TRL's add_fused_lm_head has it: log-probs [B, T - 1] of labels [B, T], [B, T] of shift_labels."""
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.previous(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        out = self.model.base_model(*args, **{**kwargs, "use_cache": False})
        hidden, targets = out.last_hidden_state, shift_labels
        if targets is None:
            if labels is None:
                raise ValueError("fused_lm_head=True needs labels or shift_labels")
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        fields = self._per_token(head_of(self.model), hidden, targets)
        mask = fields["label_mask"]
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux = -fields["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            aux = _router_loss(out, config, kwargs.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux
        return _output_class()(loss=loss, aux_loss=aux, **fields)

    def _per_token(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
        if not isinstance(head.weight, NF4Weight):
            hidden = hidden.to(head.weight.dtype)
        mask = targets != -100
        rows = mask if mask.any() else torch.ones_like(mask)  # with none to score: zeros that still have a gradient
        h, t = hidden[rows], targets[rows]
        token = head.log_probs(h, t, self.temperature, entropy="entropy" in self.outputs)
        found = {"log_probs": token.logp}
        if token.entropy is not None:
            if self.entropy_bonus and token.logp.requires_grad and not token.entropy.requires_grad:
                raise NotImplementedError("entropy_coef: the entropy of ops.linear_logprob has no gradient here")
            found["entropy"] = token.entropy
        found.update(head_statistics(head, h, t, self.temperature, self.outputs))
        fields = {name: v.new_zeros(mask.shape).masked_scatter(rows, v) for name, v in found.items()}
        return {**{name: v.masked_fill(~mask, 0) for name, v in fields.items()}, "label_mask": mask}


def _router_loss(out: Any, config: Any, attention_mask: torch.Tensor | None) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)


def _output_class() -> Any:
    try:
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise ImportError("this needs TRL >= 1.16 (pip install 'trl>=1.16')") from error
    return FusedCausalLMOutput


def _forward_of(model: Any) -> Any:
    return vars(model).get("forward")


def _model_of(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _outputs_of(trainer: Any) -> tuple[str, ...]:
    for cls in type(trainer).__mro__:
        if cls.__name__ in OUTPUTS:
            weighted = getattr(trainer, "use_weighting", False)  # WPO
            return OUTPUTS[cls.__name__] + (("log_sum_sq_probs",) if weighted else ())
    raise ValueError(
        f"a {type(trainer).__name__} is not known to read log-probs: {', '.join(OUTPUTS)} do. "
        "For another, give the model, the temperature and the outputs"
    )


def _check_settings(trainer: Any, model: Any) -> None:
    if getattr(trainer.args, "cast_lm_head_to_fp32", False) and head_of(model).lora_a is not None:
        raise ValueError("cast_lm_head_to_fp32=True puts a forward on lm_head that leaves its adapter out")
    if getattr(trainer.args, "disable_dropout", False) and any(getattr(m, "lora_dropout", 0) for m in model.modules()):
        warnings.warn(
            "disable_dropout=True reaches nn.Dropout alone, not lora_dropout: adapt the model with lora_dropout=0",
            stacklevel=3,
        )
