"""Every fine-tuning method under its name on the command line: its config, its options, its learning rates."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import (
    AdapterConfig,
    FullConfig,
    LoRAConfig,
    PartialConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    PTuningV2Config,
    QLoRAConfig,
    adapt,
)  # fmt: skip
from ..tuning.config import MethodConfig
from .errors import UserError, as_user_error


@dataclass(frozen=True)
class Settings:
    """What the options of a method say.

    r, lora_alpha, lora_dropout, target_modules: of the LoRA family; lora_alpha None is 2 r.
    layers: trained at the top, or frozen at the bottom; None is a quarter of them.
    virtual_tokens: n of prompts and prefixes. init_ids: token ids of the text that they start as, repeated or cut to n.
    bottleneck: m of adapters.
    """

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    layers: int | None = None
    virtual_tokens: int = 16
    bottleneck: int = 64
    init_ids: tuple[int, ...] = ()


LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules")
TEXT_OPTIONS = ("virtual_tokens", "init_text")
TASK = "CAUSAL_LM"


@dataclass(frozen=True)
class Method:
    """name, label: on the command line, and in tables and charts. family: methods that are compared with each other.

    config: of the settings and the model, which it may read. lr, embedded_lr: peak learning rates for a model of the
    user's and for the embedded one. options: those of the command line that it takes. trains_base: weights of the base
    are trained, which are then held in float32. layerwise: layers join one after another during the run.
    lora_plus: the learning rate of B over that of A.
    """

    name: str
    label: str
    family: str
    config: Callable[[Settings, nn.Module], MethodConfig]
    lr: float
    embedded_lr: float
    options: tuple[str, ...] = ()
    trains_base: bool = False
    layerwise: bool = False
    lora_plus: float | None = None

    def apply(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Adapt `model` in place; UserError where the settings do not fit it."""
        with as_user_error():
            return adapt(model, self.config(settings, model))

    def base_dtype(self, compute: torch.dtype) -> torch.dtype:
        """A frozen base is held in the dtype that is computed in; weights that are trained, in float32."""
        return torch.float32 if self.trains_base else compute


def _lora(settings: Settings, kind: type[LoRAConfig] = LoRAConfig, **fields: Any) -> LoRAConfig:
    alpha = 2 * settings.r if settings.lora_alpha is None else settings.lora_alpha
    return kind(
        r=settings.r, lora_alpha=alpha, lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules or "all-linear", task_type=TASK, **fields,
    )  # fmt: skip


def _loftq(settings: Settings, model: nn.Module) -> LoRAConfig:
    return _lora(settings, QLoRAConfig, init_lora_weights="loftq", loftq_iter=4)


def _layers(settings: Settings, model: Any) -> int:
    return settings.layers or max(1, model.config.get_text_config().num_hidden_layers // 4)


def _full(settings: Settings, model: nn.Module) -> FullConfig:
    return FullConfig(task_type=TASK)


def _top(settings: Settings, model: nn.Module) -> PartialConfig:
    return PartialConfig(num_top_layers=_layers(settings, model), final_norm=True, task_type=TASK)


def _above(settings: Settings, model: Any) -> PartialConfig:
    head = not model.config.tie_word_embeddings  # else it is the frozen input embedding
    return PartialConfig(
        frozen_bottom_layers=_layers(settings, model), final_norm=True, head=head, task_type=TASK
    )  # fmt: skip


def _start(settings: Settings) -> list[int]:
    return [settings.init_ids[i % len(settings.init_ids)] for i in range(settings.virtual_tokens)]


def _prompt(settings: Settings, model: nn.Module) -> PromptTuningConfig:
    return PromptTuningConfig(
        num_virtual_tokens=settings.virtual_tokens, prompt_tuning_init="TEXT", prompt_tuning_init_text="the start",
        tokenizer=lambda text: _start(settings), task_type=TASK,
    )  # fmt: skip


def _p_tuning(settings: Settings, model: nn.Module) -> PTuningConfig:
    n = settings.virtual_tokens
    return PTuningConfig(num_virtual_tokens=n, encoder_reparameterization_type="LSTM", task_type=TASK)


def _prefix(settings: Settings, model: nn.Module) -> PrefixTuningConfig:
    n = settings.virtual_tokens
    return PrefixTuningConfig(num_virtual_tokens=n, init_token_ids=_start(settings), task_type=TASK)


def _p_tuning_v2(settings: Settings, model: nn.Module) -> PTuningV2Config:
    return PTuningV2Config(num_virtual_tokens=settings.virtual_tokens, dropout=0.1, task_type=TASK)


def _adapter(form: Callable[..., AdapterConfig]) -> Callable[[Settings, nn.Module], AdapterConfig]:
    return lambda settings, model: form(bottleneck=settings.bottleneck, task_type=TASK)


M = ("bottleneck",)
FULL, PROMPTS, ADAPTERS, LORA = "full and partial", "prompts", "adapters", "LoRA"
# Learning rates for a model of the user's are those of the papers and of common practice; for the embedded model, those
# with the lowest held-out loss after 60 steps of some that were tried, a factor of two or three apart.
_ALL = (
    Method("full", "full", FULL, _full, 2e-5, 1.5e-3, trains_base=True),
    Method("layer-by-layer", "layer by layer", FULL, _full, 2e-5, 3e-3, trains_base=True, layerwise=True),
    Method("frozen-bottom", "bottom frozen", FULL, _above, 2e-5, 3e-3, ("layers",), trains_base=True),
    Method("top-layers", "top layers", FULL, _top, 2e-5, 6e-3, ("layers",), trains_base=True),
    Method("prompt-tuning", "prompt tuning", PROMPTS, _prompt, 3e-2, 3e-2, TEXT_OPTIONS),
    Method("p-tuning", "P-tuning", PROMPTS, _p_tuning, 1e-3, 1e-2, ("virtual_tokens",)),
    Method("prefix-tuning", "prefix-tuning", PROMPTS, _prefix, 5e-3, 0.9, TEXT_OPTIONS),
    Method("p-tuning-v2", "P-tuning v2", PROMPTS, _p_tuning_v2, 5e-3, 0.9, ("virtual_tokens",)),
    Method("adapter", "adapters (Houlsby)", ADAPTERS, _adapter(AdapterConfig.houlsby), 3e-4, 9e-3, M),
    Method("adapter-pfeiffer", "adapters (Pfeiffer)", ADAPTERS, _adapter(AdapterConfig.pfeiffer), 3e-4, 9e-3, M),
    Method("adapter-parallel", "adapters (parallel)", ADAPTERS, _adapter(AdapterConfig.parallel), 3e-4, 3e-3, M),
    Method("lora", "LoRA", LORA, lambda s, m: _lora(s), 2e-4, 7e-3, LORA_OPTIONS),
    Method("rslora", "rsLoRA", LORA, lambda s, m: _lora(s, use_rslora=True), 1e-4, 6e-3, LORA_OPTIONS),
    Method("lora-plus", "LoRA+", LORA, lambda s, m: _lora(s), 1e-4, 1.8e-3, LORA_OPTIONS, lora_plus=16.0),
    Method("dora", "DoRA", LORA, lambda s, m: _lora(s, use_dora=True), 2e-4, 7e-3, LORA_OPTIONS),
    Method("pissa", "PiSSA", LORA, lambda s, m: _lora(s, init_lora_weights="pissa_niter_16"), 1e-4, 3e-3, LORA_OPTIONS),
    Method("qlora", "QLoRA", LORA, lambda s, m: _lora(s, QLoRAConfig), 2e-4, 7e-3, LORA_OPTIONS),
    Method("loftq", "LoftQ", LORA, _loftq, 1e-4, 6e-3, LORA_OPTIONS),
)
METHODS = {method.name: method for method in _ALL}


def settings_of(method: Method, given: dict[str, Any], defaults: Settings) -> Settings:
    """The options that were given (None: not given), else the defaults.

    Raises UserError: an option that the method does not take.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in method.options:
            takes = ", ".join(flag(option) for option in method.options) or "none of its own"
            raise UserError(f"{flag(name)} is no option of --method {method.name} (it takes {takes})")
    return replace(defaults, **{name: value for name, value in given.items() if name != "init_text"})


def flag(name: str) -> str:
    """An option as it is written: lora_alpha -> --lora-alpha."""
    return f"--{name.replace('_', '-')}"
