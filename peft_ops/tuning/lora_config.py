"""LoRA and QLoRA, what to adapt and how: the fields of Hugging Face PEFT's LoraConfig, with its defaults."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from ..nf4 import BLOCKSIZES
from ..nn.lora_linear import check_adapter_arguments
from .config import MethodConfig, check_choice, check_names, check_regex, matches_end

# Fields of PEFT that change what a layer computes and that are not supported: refused where set, never ignored.
UNSUPPORTED = (
    "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
    "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """LoRA for `adapt`; every field means what it means in PEFT.

    r, lora_alpha, lora_dropout: rank, alpha (scaling is alpha / r), dropout of x on its way into lora_A.
    target_modules: names matched exactly or as the last components of a module's path; or a regular expression that
        matches the whole path; or 'all-linear' (every nn.Linear and Conv1D but the output head); None takes the
        default of the model's `config.model_type`. They name nn.Linear, Conv1D or nn.Embedding.
    exclude_modules: the same forms; wins over target_modules.
    rank_pattern, alpha_pattern: {regular expression of a path's end: value}; the first that matches wins.
    layers_to_transform, layers_pattern: index or indices of the layers to adapt, and the name of the list they are in.
    use_rslora: scaling is alpha / sqrt(r).
    use_dora: a magnitude per output is trained beside the direction (Liu et al., 2024); of linear layers only.
    bias: which biases are trained: 'none', 'all', or 'lora_only' (those of the adapted layers).
    fan_in_fan_out: taken from the layers (True for Conv1D); here for PEFT's sake.
    init_lora_weights: True (A as nn.Linear's weight, B zero), 'gaussian' (A from N(0, 1/r²)), or False (B not zero).
    modules_to_save, task_type: see MethodConfig.

    Raises:
        TypeError, ValueError: a value that no adapter can have; a field of PEFT's that is not supported and is set.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    use_rslora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: Collection[str] | None = None
    trainable_token_indices: Collection[int] | dict | None = None
    layer_replication: Collection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter_arguments(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        for name in UNSUPPORTED:
            if getattr(self, name, None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; leave it unset")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name))
        if not isinstance(self.layers_pattern, str):
            for pattern in self.layers_pattern or ():  # PEFT reads them as regular expressions
                check_regex("layers_pattern", pattern)
        _check_pattern("rank_pattern", self.rank_pattern)
        _check_pattern("alpha_pattern", self.alpha_pattern)
        for key, r in self.rank_pattern.items():
            _named(f"rank_pattern[{key!r}]", check_adapter_arguments, r, 1, 0.0)
        for key, alpha in self.alpha_pattern.items():
            _named(f"alpha_pattern[{key!r}]", check_adapter_arguments, 1, alpha, 0.0)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        indices = () if layers is None else (layers,) if isinstance(layers, int) else layers
        if not isinstance(indices, Collection) or not all(isinstance(i, int) for i in indices):
            raise TypeError(f"layers_to_transform must be an int or a list of ints, got {layers!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} cannot be used where target_modules is a string")
        if self.layers_pattern and layers is None:
            raise ValueError("layers_pattern needs layers_to_transform")

    def rank(self, path: str) -> int:
        """r of the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """lora_alpha of the layer at `path`."""
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha)

    def scaling(self, path: str) -> float:
        """What multiplies B A at `path`."""
        return self.alpha(path) / (math.sqrt(self.rank(path)) if self.use_rslora else self.rank(path))


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """LoRA over a base whose linear layers, all but the output head, are quantised to NF4.

    blocksize: weights per scale, a power of two from 32 to 4096.
    double_quant: keep the scales in 8 bits too.

    Source: Dettmers et al., "QLoRA", 2023.
    """

    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize!r}")


def _by_pattern(patterns: dict, path: str, default):
    return next((value for pattern, value in patterns.items() if matches_end(pattern, path)), default)


def _check_pattern(name: str, value) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dict from regular expressions to numbers, got {value!r}")
    for key in value:
        check_regex(name, key)


def _named(name: str, check, *args) -> None:
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
