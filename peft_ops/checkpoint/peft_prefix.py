"""Prefix-tuning and P-tuning v2 in the format of Hugging Face PEFT, with a file beside it for training to go on."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.prefix import ProjectedPrefix
from ..tuning.adaptation import Adaptation
from ..tuning.config import MethodConfig
from ..tuning.prefix import ENCODERS, PrefixAdaptation
from ..tuning.prefix_config import PrefixTuningConfig
from ..tuning.trained import get_tensor
from .files import json_writer, read_safetensors, tensor_writer
from .format import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME, Tensors, Writers, existing, listed
from .peft_prefix_config import config_from_peft, config_to_peft, layer_columns

_ROWS = "prompt_embeddings"  # (n, 2 · L · token_dim): a virtual token's K₀, V₀, K₁, V₁, ...
_BASE = "base_model."  # before the names of trained heads: PEFT wraps no second time here


class PeftPrefix:
    """A checkpoint.format.Format.

    Keys and values stand in `prompt_embeddings` as PEFT has them, whatever encoder made them. Where encoder and
    cross-attention have prefixes too, which PEFT does not know, the keys are `prompt_embeddings.<place>`, so that PEFT
    refuses the file. An encoder goes into adapter_training.safetensors under the names of PEFT's PrefixEncoder.
    """

    def writes(self, config: MethodConfig) -> bool:
        return isinstance(config, PrefixTuningConfig)

    def recognises(self, saved: dict[str, Any]) -> bool:
        return saved.get("peft_type") == "PREFIX_TUNING"

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        assert isinstance(adaptation, PrefixAdaptation)
        saved = config_to_peft(adaptation, model)
        tensors = {}
        for place, suffix in _suffixes(adaptation.places).items():
            rows = [row for site in adaptation.at(place) for row in adaptation.prefix(model, site).rows()]
            tensors[_ROWS + suffix] = torch.cat(rows, 1)
        if _ROWS in tensors:
            tensors[_ROWS] = layer_columns(saved).spread(tensors[_ROWS])
        tensors |= {_BASE + name: get_tensor(model, name) for name in adaptation.trained}
        encoders = _encoders(model, adaptation) if adaptation.config.prefix_projection else None
        return {
            WEIGHTS_NAME: tensor_writer(tensors),
            TRAINING_NAME: None if encoders is None else tensor_writer(encoders),
            CONFIG_NAME: json_writer(saved),
        }

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        """Where there is no encoder to train on (PEFT saves none) the config is that of an ejected one.

        Raises, besides what files and fields do:
            ValueError: an encoder that gives other keys and values than those beside it.
        """
        tensors = read_safetensors(existing(folder / WEIGHTS_NAME))
        try:
            config = config_from_peft(saved)
            if _ROWS in tensors:
                tensors[_ROWS] = layer_columns(saved).gather(tensors[_ROWS])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{folder / CONFIG_NAME}: {error}") from error
        training = folder / TRAINING_NAME
        _check_floating(folder / WEIGHTS_NAME, {key: t for key, t in tensors.items() if key.startswith(_ROWS)})
        if not (config.prefix_projection and training.is_file()):
            return dataclasses.replace(config, prefix_projection=False), tensors
        encoders = read_safetensors(training)
        _check_floating(training, encoders)
        for suffix in (key.removeprefix(_ROWS) for key in tensors if key.startswith(_ROWS)):
            if not _gives(encoders, suffix, tensors[_ROWS + suffix]):
                raise ValueError(
                    f"{training} does not belong to {WEIGHTS_NAME}: its encoder gives other keys and values; remove "
                    "it to go on from the keys and values themselves"
                )
        return config, tensors | encoders

    def fit(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig, tensors: Tensors) -> Tensors:
        """What the tensors mean must be the same in the model."""
        assert isinstance(adaptation, PrefixAdaptation)
        assert isinstance(config, PrefixTuningConfig)
        for name in ("num_virtual_tokens", "prefix_projection"):
            ours, theirs = getattr(adaptation.config, name), getattr(config, name)
            if ours != theirs:
                raise ValueError(f"{name} of the checkpoint differs: {theirs}, the model was adapted with {ours}")
        return tensors

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        assert isinstance(adaptation, PrefixAdaptation)
        shapes = adaptation.shapes(model)
        expected = {_BASE + name: shapes[name] for name in adaptation.trained}
        for place, suffix in _suffixes(adaptation.places).items():
            sites, n = adaptation.at(place), adaptation.config.num_virtual_tokens
            width = sum(site.heads * (site.key_dim + site.value_dim) for site in sites)
            expected[_ROWS + suffix] = torch.Size((n, width))
            if adaptation.config.prefix_projection:
                first = shapes[f"{ENCODERS}.{place}.linear.weight"]
                expected[f"embedding.weight{suffix}"] = torch.Size((n, first[1]))
                expected[f"transform.0.weight{suffix}"] = first
                expected[f"transform.0.bias{suffix}"] = first[:1]
                expected[f"transform.2.weight{suffix}"] = torch.Size((width, first[0]))
                expected[f"transform.2.bias{suffix}"] = torch.Size((width,))
        return expected

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        assert isinstance(adaptation, PrefixAdaptation)
        for name in adaptation.trained:
            get_tensor(model, name).copy_(tensors[_BASE + name])
        for place, suffix in _suffixes(adaptation.places).items():
            if adaptation.config.prefix_projection:
                for key, tensor in _encoder(model, adaptation, place).items():
                    _copy_parts(tensor, tensors[key + suffix])
                continue
            sites = adaptation.at(place)
            parts = tensors[_ROWS + suffix].chunk(2 * len(sites), dim=1)
            for site, k, v in zip(sites, parts[::2], parts[1::2], strict=True):
                adaptation.prefix(model, site).set_rows(k, v)


def _suffixes(places: list[str]) -> dict[str, str]:
    """{place: what the keys of its tensors end with}: nothing where PEFT has the same."""
    return {place: "" if places == ["decoder"] else f".{place}" for place in places}


def _encoder(model: nn.Module, adaptation: PrefixAdaptation, place: str) -> dict[str, list[torch.Tensor]]:
    """{name of PEFT's PrefixEncoder: what it consists of here}: the second linear layer lies in pieces."""
    encoder = adaptation.encoder(model, place)
    parts = [adaptation.prefix(model, site) for site in adaptation.at(place)]
    second = [part.linear for part in parts if isinstance(part, ProjectedPrefix)]
    return {
        "embedding.weight": [encoder.embedding.weight],
        "transform.0.weight": [encoder.linear.weight],
        "transform.0.bias": [encoder.linear.bias],
        "transform.2.weight": [linear.weight for linear in second],
        "transform.2.bias": [linear.bias for linear in second],
    }


def _encoders(model: nn.Module, adaptation: PrefixAdaptation) -> Tensors:
    return {
        key + suffix: torch.cat(parts)
        for place, suffix in _suffixes(adaptation.places).items()
        for key, parts in _encoder(model, adaptation, place).items()
    }


def _copy_parts(parts: list[torch.Tensor], whole: torch.Tensor) -> None:
    for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.copy_(piece)


def _check_floating(file: Path, tensors: Tensors) -> None:
    wrong = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise ValueError(f"{file} does not fit the model; not floating point: {listed(wrong)}")


def _gives(encoders: Tensors, suffix: str, rows: torch.Tensor) -> bool:
    """Whether the encoder computes these rows; True where shapes do not fit, which is told otherwise."""
    names = ("embedding.weight", "transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias")
    try:
        embedding, w0, b0, w2, b2 = (encoders[f"{name}{suffix}"].double() for name in names)
        given = torch.tanh(embedding @ w0.t() + b0) @ w2.t() + b2
    except (KeyError, RuntimeError):
        return True
    return given.shape != rows.shape or bool((given - rows.double()).norm() <= 0.02 * given.norm())
