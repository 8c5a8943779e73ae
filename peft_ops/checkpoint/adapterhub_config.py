"""adapter_config.json and head_config.json of AdapterHub, from and to an AdapterConfig."""

from typing import Any

from torch import nn

from ..ops.bottleneck_adapter import known_activation
from ..tuning.bottleneck_config import AdapterConfig
from .format import Tensors

_VERSION = "adapters.1.3.0"  # whose format this is
_SHARED = (
    "mh_adapter", "cross_adapter", "output_adapter", "original_ln_before", "original_ln_after", "residual_before_ln",
    "is_parallel", "non_linearity", "init_weights",
)  # fmt: skip
_OWN = ("train_layer_norms", "modules_to_save", "task_type")  # AdapterHub has nothing of the kind
# Fields of BnConfig that change what an adapter computes and that are not supported: refused where set, never ignored.
_UNSUPPORTED = ("ln_before", "ln_after", "use_gating", "inv_adapter", "phm_layer", "dropout", "stochastic_depth")
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # of activations, in files without a version
HEAD_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def config_to_hub(config: AdapterConfig, model: nn.Module, width: int) -> dict[str, Any]:
    """The fields that AdapterHub writes, and our own under 'peft_ops', which it passes over."""
    adapter = {name: getattr(config, name) for name in _SHARED} | {
        "leave_out": sorted(config.leave_out),
        "reduction_factor": _reduction_factor(width, config.size(width)),
        "scaling": float(config.scaling),
    }
    own = {name: getattr(config, name) for name in _OWN}
    own["modules_to_save"] = None if config.modules_to_save is None else sorted(config.modules_to_save)
    return _about(model) | {"config": adapter, "name": config.name, "peft_ops": own}


def head_to_hub(model: nn.Module) -> dict[str, Any]:
    """head_config.json for the head that a transformers model has by its class."""
    config = getattr(model, "config", None)
    labels = {"label2id": getattr(config, "label2id", None), "num_labels": getattr(config, "num_labels", None)}
    return _about(model) | labels | {"config": None, "name": None}


def config_from_hub(saved: dict[str, Any], head: dict[str, Any], head_tensors: Tensors) -> AdapterConfig:
    """The config of a checkpoint; unknown fields are ignored, as by AdapterHub.

    Raises:
        TypeError, ValueError: another method than bottleneck adapters, a feature that is not supported, a value out of
            its range.
    """
    adapter = saved["config"]
    if adapter.get("architecture") is not None:
        raise ValueError(f"architecture {adapter['architecture']!r} is not supported, only bottleneck adapters are")
    unsupported = [name for name in _UNSUPPORTED if adapter.get(name)]
    unsupported += [f"scaling={adapter['scaling']!r}"] if isinstance(adapter.get("scaling"), str) else []
    unsupported += ["a reduction_factor for each layer"] if isinstance(adapter.get("reduction_factor"), dict) else []
    if unsupported:
        raise ValueError(f"the checkpoint uses {', '.join(unsupported)}, which is not supported")
    fields = {name: adapter[name] for name in (*_SHARED, "scaling", "leave_out", "reduction_factor") if name in adapter}
    if "version" not in saved and fields.get("non_linearity") in _OLD_NAMES:
        fields["non_linearity"] = _OLD_NAMES[fields["non_linearity"]]
    if fields.get("is_parallel"):  # has no say in these, whatever AdapterHub has written
        fields |= {"original_ln_before": False, "residual_before_ln": True}
    own = saved.get("peft_ops") or {"train_layer_norms": False} | _trained_head(head, head_tensors)
    return AdapterConfig(**fields | {name: own[name] for name in _OWN if name in own} | {"name": saved.get("name")})


def differences(saved: AdapterConfig, config: AdapterConfig) -> list[str]:
    """What makes the same weights compute something else: '<field>=<saved>, the model has <own>'."""
    names = [name for name in _SHARED if name not in ("non_linearity", "init_weights")]
    pairs = {name: (getattr(saved, name), getattr(config, name)) for name in (*names, "scaling")}
    pairs["non_linearity"] = known_activation(saved.non_linearity), known_activation(config.non_linearity)
    return [f"{name}={theirs!r}, the model has {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]


def _about(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(config, "name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None),
        "version": _VERSION,
    }


def _trained_head(head: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """AdapterHub trains the head that it saves: {} without one, else the modules and the task."""
    task = next((task for end, task in HEAD_TASKS.items() if str(head.get("model_class")).endswith(end)), None)
    if task is None:
        return {}
    return {"task_type": task, "modules_to_save": sorted({key.split(".")[0] for key in tensors})}


def _reduction_factor(width: int, bottleneck: int) -> float:
    """A number of which AdapterHub makes the same bottleneck again: int(width // it)."""
    factor = width / bottleneck
    return factor if int(width // factor) == bottleneck else width / (bottleneck + 0.5)
