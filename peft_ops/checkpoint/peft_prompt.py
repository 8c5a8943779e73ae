"""Prompt tuning and P-tuning in the format of Hugging Face PEFT, and beside it the encoder that PEFT drops.

adapter_model.safetensors holds `prompt_embeddings` [n, d] and trained heads; adapter_training.safetensors, which PEFT
does not look at, the encoder of P-tuning. A template, which PEFT does not have, is marked so that PEFT refuses it.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuning.adaptation import Adaptation
from ..tuning.config import MethodConfig
from ..tuning.prompt import PromptAdaptation
from ..tuning.prompt_config import PromptConfig, PromptTuningConfig, PTuningConfig
from ..tuning.trained import get_tensor
from .files import json_writer, read_safetensors, tensor_writer
from .format import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME, Tensors, Writers, existing
from .peft_config import common_fields, jsonable

_PREFIX, _EMBEDDINGS, _ENCODER = "base_model.", "prompt_embeddings", "encoder."
_TEMPLATE = "P_TUNING_TEMPLATE"
_KINDS: dict[str, type[PromptConfig]] = {"PROMPT_TUNING": PromptTuningConfig, "P_TUNING": PTuningConfig}


class PeftPrompt:
    """A checkpoint.format.Format."""

    def writes(self, config: MethodConfig) -> bool:
        return isinstance(config, PromptConfig)

    def recognises(self, saved: dict[str, Any]) -> bool:
        return saved.get("peft_type") in _KINDS or saved.get("peft_ops_method") == _TEMPLATE

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        assert isinstance(adaptation, PromptAdaptation)
        embeddings = adaptation.embeddings(model)
        heads = {_PREFIX + name: get_tensor(model, name) for name in adaptation.trained}
        encoder = {_ENCODER + name: get_tensor(model, full) for name, full in _encoder_names(model, adaptation).items()}
        return {
            WEIGHTS_NAME: tensor_writer({_EMBEDDINGS: embeddings, **heads}),
            TRAINING_NAME: tensor_writer({_EMBEDDINGS: embeddings, **encoder}) if encoder else None,
            CONFIG_NAME: json_writer(_config_to_peft(model, adaptation)),
        }

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        try:
            config = _config_from_peft(saved)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{folder / CONFIG_NAME}: {error}") from error
        tensors = read_safetensors(existing(folder / WEIGHTS_NAME))
        if _EMBEDDINGS in tensors and saved.get("num_transformer_submodules") == 2:
            tensors[_EMBEDDINGS] = tensors[_EMBEDDINGS][
                : config.num_virtual_tokens
            ]  # PEFT gives the encoder these alone
        if not isinstance(config, PTuningConfig):
            return config, tensors
        if not (folder / TRAINING_NAME).is_file():
            return replace(config, ejected=True), tensors
        training = read_safetensors(folder / TRAINING_NAME)
        if not torch.equal(training.pop(_EMBEDDINGS, torch.empty(0)), tensors.get(_EMBEDDINGS, torch.empty(0))):
            raise ValueError(f"{folder}: {TRAINING_NAME} and {WEIGHTS_NAME} are of two different saves")
        return config, tensors | training

    def fit(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig, tensors: Tensors) -> Tensors:
        for name in ("template", "pseudo_token_id"):
            ours, theirs = (getattr(c, name, None) for c in (adaptation.config, config))
            if jsonable(ours) != jsonable(theirs):
                raise ValueError(f"{name} of the checkpoint is {theirs!r}, the model was adapted with {ours!r}")
        return tensors

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        assert isinstance(adaptation, PromptAdaptation)
        n, d = adaptation.config.num_virtual_tokens, adaptation.dimension
        heads = {_PREFIX + name: get_tensor(model, name).shape for name in adaptation.trained}
        encoder = {_ENCODER + name: shape for name, shape in adaptation.encoder_shapes(model).items()}
        return {_EMBEDDINGS: torch.Size((n, d))} | heads | encoder

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        assert isinstance(adaptation, PromptAdaptation)
        encoder = _encoder_names(model, adaptation)
        for name, full in encoder.items():
            get_tensor(model, full).copy_(tensors[_ENCODER + name])
        if not encoder:
            adaptation.tokens(model).get_parameter("encoder.embedding").copy_(tensors[_EMBEDDINGS])
        for name in adaptation.trained:
            get_tensor(model, name).copy_(tensors[_PREFIX + name])


def _encoder_names(model: nn.Module, adaptation: PromptAdaptation) -> dict[str, str]:
    """{name in the encoder: name in the model} of an adapted model; nothing where a table is all there is."""
    path = adaptation.path_of_tokens
    return {name: f"{path}.encoder.{name}" for name in adaptation.encoder_shapes(model)}


def _config_to_peft(model: nn.Module, adaptation: PromptAdaptation) -> dict[str, Any]:
    config = adaptation.config
    kind = next(name for name, cls in _KINDS.items() if isinstance(config, cls))
    names = [f.name for f in fields(config) if f.name not in ("tokenizer", "ejected")]
    saved = {name: jsonable(getattr(config, name)) for name in names}
    if isinstance(config, PromptTuningConfig):
        saved["prompt_tuning_init"] = "RANDOM"  # PEFT does not know all of ours, and would look for a tokenizer
    if isinstance(config, PTuningConfig):
        saved["encoder_hidden_size"] = adaptation.hidden_size
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    shape = {
        "token_dim": adaptation.dimension,
        "num_layers": getattr(text, "num_hidden_layers", None),
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_transformer_submodules": 1,
    }
    saved |= shape | common_fields(config, model, kind)
    if isinstance(config, PTuningConfig) and config.template is not None:
        del saved["peft_type"]
        saved["peft_ops_method"] = _TEMPLATE
    return saved


def _config_from_peft(saved: dict[str, Any]) -> PromptConfig:
    """Unknown fields are ignored, as in PEFT; where to load a tokenizer from too: nothing is initialised again."""
    cls = _KINDS[saved.get("peft_type", "P_TUNING")]
    known = {f.name: saved[f.name] for f in fields(cls) if saved.get(f.name) is not None and f.init}
    if cls is PromptTuningConfig:
        known = {k: v for k, v in known.items() if k in ("num_virtual_tokens", "modules_to_save", "task_type")}
    if known.get("modules_to_save"):
        known["modules_to_save"] = list(dict.fromkeys(known["modules_to_save"]))
    return cls(**known)
