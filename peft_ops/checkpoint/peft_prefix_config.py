"""adapter_config.json of Hugging Face PEFT's PREFIX_TUNING, and where it has the keys and values of a layer."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..tuning.attention_plan import config_of, text_config
from ..tuning.prefix import PrefixAdaptation
from ..tuning.prefix_config import PrefixTuningConfig, PTuningV2Config
from .peft_config import common_fields

_KINDS = {"p_tuning_v2": PTuningV2Config, "prefix_tuning": PrefixTuningConfig}  # the more special first
_SUBMODULES = "num_transformer_submodules"
_STARTS = ("init_weights", "init_token_ids")  # how keys and values began; they are in the file by now


def config_to_peft(adaptation: PrefixAdaptation, model: nn.Module) -> dict[str, Any]:
    """The fields that PEFT writes and, unknown to it, `method`, `places`, `dropout` and `layers`."""
    config, site = adaptation.config, adaptation.sites[0]
    encoder_decoder, layers = config_of(model).is_encoder_decoder, len(adaptation.at(site.place))
    width, hidden = site.heads * site.key_dim, text_config(model).hidden_size
    saved = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _STARTS}
    return (
        saved
        | common_fields(config, model, "PREFIX_TUNING")
        | {
            "encoder_hidden_size": config.encoder_hidden_size or (hidden if config.prefix_projection else width),
            "init_weights": None,
            "layers": layers,
            "method": next(name for name, kind in _KINDS.items() if isinstance(config, kind)),
            "modules_to_save": None if config.modules_to_save is None else sorted(config.modules_to_save),
            "num_attention_heads": site.heads,
            "num_layers": 2 * layers if encoder_decoder else layers,
            _SUBMODULES: 2 if encoder_decoder else 1,
            "places": list(config.places),
            "token_dim": width,
        }
    )


def config_from_peft(saved: dict[str, Any]) -> PrefixTuningConfig:
    """The config of a checkpoint; PEFT's have a prefix in the decoder alone, and fields unknown here are ignored.

    Raises:
        TypeError, ValueError: another method, a value out of its range.
    """
    if saved.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(f"peft_type must be 'PREFIX_TUNING', got {saved.get('peft_type')!r}")
    kind = _KINDS.get(saved.get("method", "prefix_tuning"))
    if kind is None:
        raise ValueError(f"method must be one of {', '.join(_KINDS)}, got {saved['method']!r}")
    known = {f.name: saved[f.name] for f in fields(kind) if saved.get(f.name) is not None and f.name not in _STARTS}
    return kind(**{"places": ("decoder",)} | known)


@dataclass(frozen=True)
class LayerColumns:
    """Where a row of `prompt_embeddings` has the keys and values of the layers.

    A row has 2 · num_layers pieces. With one transformer, layer i has pieces 2i and 2i + 1. With two (encoder-decoder)
    PEFT lays the pieces twice in a row, splits that by four, and takes the first two of each four for the decoder's
    self-attention: layer i has pieces 4i and 4i + 1, counted modulo 2 · num_layers. So with num_layers = L, as PEFT
    writes, the upper half of the layers repeats the lower where L is even; with 2L every layer has its own.
    """

    pieces: int
    layers: int
    step: int

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, 2 · layers · token_dim) from what stands in a file; rows of another form as they are."""
        if rows.ndim != 2 or rows.shape[1] % self.pieces:
            return rows
        pieces = rows.view(len(rows), self.pieces, -1)
        return pieces[:, self._places()].flatten(1)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of gather; pieces that no layer reads are zero."""
        pieces = rows.new_zeros(len(rows), self.pieces, rows.shape[1] // (2 * self.layers))
        pieces[:, self._places()] = rows.view(len(rows), 2 * self.layers, -1)
        return pieces.flatten(1)

    def _places(self) -> list[int]:
        return [(self.step * i + j) % self.pieces for i in range(self.layers) for j in (0, 1)]


def layer_columns(saved: dict[str, Any]) -> LayerColumns:
    """By the fields of an adapter_config.json.

    Raises:
        TypeError, ValueError: num_layers or num_transformer_submodules that are no such counts.
    """
    submodules = saved.get(_SUBMODULES)
    if submodules is None:
        submodules = 2 if saved.get("task_type") == "SEQ_2_SEQ_LM" else 1
    total = _count(saved, "num_layers", None)
    layers = total if saved.get("layers") is None else _count(saved, "layers", total)
    return LayerColumns(2 * total, layers, 2 * _count({_SUBMODULES: submodules}, _SUBMODULES, 2))


def _count(saved: dict[str, Any], name: str, most: int | None) -> int:
    value = saved.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} must be at least 1" + (f" and at most {most}" if most else "") + f", got {value}")
    return value
