"""Bottleneck adapters, what they are and where they go: the fields of AdapterHub's BnConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..nn.bottleneck_adapter import INITS
from ..ops.bottleneck_adapter import known_activation
from .config import MethodConfig, check_choice, check_count

# (original_ln_before, residual_before_ln, original_ln_after) that count the sublayer's own residual exactly once.
_BEHIND = ((True, True, True), (True, False, False), (True, "post_add", False))


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Bottleneck adapters for `adapt`: scaling · (act(x W_downᵀ + b) W_upᵀ + b') added at the sublayers of every block.

    The defaults are Houlsby's; `pfeiffer()` and `parallel()` are the other two forms that have names. A field that
    AdapterHub's BnConfig has means what it means there. h is what a sublayer gives after its dropout, r its residual
    input, LN the LayerNorm behind their sum (BERT; where norms stand before the sublayers, LN is nothing).

    bottleneck: features in the middle; or
    reduction_factor: the model's width over the bottleneck, a number above 0. 64 features where both are None.
    non_linearity: 'gelu' (by erf), 'gelu_new' (by tanh), 'relu', 'leakyrelu', 'swish' or 'silu', 'tanh', 'linear'.
    mh_adapter, cross_adapter, output_adapter: after self-attention, cross-attention, the feed-forward network.
    original_ln_before: False: LN(h + A(h) + r), with A as above. True: the adapter stands behind the sum s = h + r and
        reads n = LN(s); then residual_before_ln and original_ln_after say which of three it is.
    residual_before_ln, original_ln_after: True, True: LN(s + A(n)). False, False: n + A(n). 'post_add', False:
        s + A(n).
    is_parallel: LN(h + A(r) + r); the three fields above stay at their defaults.
    scaling: a number.
    init_weights: 'houlsby' (both weights from a normal of std 1e-3, truncated at two; AdapterHub's has 1e-2), 'bert'
        (normal, std 0.02), 'mam_adapter' (down as nn.Linear's, up zero). Biases zero.
    leave_out: blocks without adapters, counted from 0, the encoder's first.
    train_layer_norms: train every LayerNorm and RMSNorm of the model too.
    name: of the adapter in AdapterHub's files.
    modules_to_save, task_type: see MethodConfig.

    Raises:
        TypeError, ValueError: a value that no adapter can have; no place for one; fields that together would drop the
            sublayer's residual or add it twice.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019; Pfeiffer et al., "AdapterFusion",
    2021; He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022; fields of adapters 1.3.
    """

    bottleneck: int | None = None
    reduction_factor: float | None = None
    non_linearity: str = "gelu"
    mh_adapter: bool = True
    cross_adapter: bool = False
    output_adapter: bool = True
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    is_parallel: bool = False
    scaling: float = 1.0
    init_weights: str = "houlsby"
    leave_out: Collection[int] = ()
    train_layer_norms: bool = True
    name: str = "default"

    @classmethod
    def houlsby(cls, **fields: Any) -> AdapterConfig:
        """After attention and the feed-forward network, before the residual; LayerNorms trained; 64 features."""
        return cls(**fields)

    @classmethod
    def pfeiffer(cls, **fields: Any) -> AdapterConfig:
        """Behind the feed-forward network's residual and LayerNorm: AdapterHub's seq_bn, a sixteenth of the width."""
        form = {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu", "init_weights": "bert"}
        return cls(**_sized(form | {"train_layer_norms": False}, 16, fields))

    @classmethod
    def parallel(cls, **fields: Any) -> AdapterConfig:
        """Beside the feed-forward network, scaled by 4: AdapterHub's par_bn, half of the width."""
        form = {"mh_adapter": False, "is_parallel": True, "scaling": 4.0, "non_linearity": "relu"}
        return cls(**_sized(form | {"init_weights": "mam_adapter", "train_layer_norms": False}, 2, fields))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is not None:
            check_count("bottleneck", self.bottleneck)
            if self.reduction_factor is not None:
                raise ValueError("bottleneck and reduction_factor say the same thing: give one of them")
        else:
            _check_number("reduction_factor", 1 if self.reduction_factor is None else self.reduction_factor)
            if self.reduction_factor is not None and self.reduction_factor <= 0:
                raise ValueError(f"reduction_factor must be above 0, got {self.reduction_factor}")
        _check_number("scaling", self.scaling)
        try:
            known_activation(self.non_linearity)
        except ValueError as error:
            raise ValueError(str(error).replace("activation", "non_linearity", 1)) from error
        check_choice("init_weights", self.init_weights, INITS)
        self._check_flags()
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name must be letters, digits, '_' and '-', got {self.name!r}")
        if isinstance(self.leave_out, str) or not isinstance(self.leave_out, Collection):
            raise TypeError(f"leave_out must be a list of ints, got {self.leave_out!r}")
        for layer in self.leave_out:
            check_count("leave_out", layer, 0)

    def _check_flags(self) -> None:
        for name in ("mh_adapter", "cross_adapter", "output_adapter", "original_ln_before", "original_ln_after",
                     "is_parallel", "train_layer_norms"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_choice("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        if not (self.mh_adapter or self.cross_adapter or self.output_adapter):
            raise ValueError(
                "mh_adapter, cross_adapter and output_adapter are all False: no place for an adapter is left"
            )
        order = (self.original_ln_before, self.residual_before_ln, self.original_ln_after)
        if order not in _BEHIND if self.form == "behind" else not self.original_ln_after:
            given = "original_ln_before={}, residual_before_ln={!r}, original_ln_after={}".format(*order)
            raise ValueError(f"{given} would drop the sublayer's residual or add it twice")

    @property
    def form(self) -> str:
        """'after' the sublayer, 'behind' its residual and LayerNorm, or 'beside' it."""
        return "beside" if self.is_parallel else "behind" if self.original_ln_before else "after"

    def size(self, width: int) -> int:
        """The bottleneck in a model of this width."""
        if self.reduction_factor is None:
            return self.bottleneck or 64
        return max(1, int(width // self.reduction_factor))


def _sized(form: dict[str, Any], reduction_factor: float, fields: dict[str, Any]) -> dict[str, Any]:
    size = {} if fields.get("bottleneck") else {"reduction_factor": reduction_factor}
    return form | size | fields


def _check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
