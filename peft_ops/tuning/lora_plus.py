"""LoRA+: a higher learning rate for B than for A."""

from typing import Any

from torch import nn

from .optimizer import trained_parameters


def lora_plus_groups(
    model: nn.Module, lr: float, loraplus_lr_ratio: float = 16.0, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of an adapted model, those of PEFT's create_loraplus_optimizer.

    lr: of lora_A and of what else is trained whole. lora_B and everything one-dimensional (biases, magnitudes) get
    lr · loraplus_lr_ratio, the one-dimensional without weight decay; adapters of embeddings get lr_embedding.
    A group without parameters is left out.

    Raises:
        ValueError: a ratio below 1, learning rates that are not positive; the model is not adapted.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, section 4; ratio 16 is theirs.
    """
    for name, value, least in (("lr", lr, 0.0), ("lr_embedding", lr_embedding, 0.0)):
        if not value > least:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not loraplus_lr_ratio >= 1.0:
        raise ValueError(f"loraplus_lr_ratio must be at least 1, got {loraplus_lr_ratio}")
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "embedding": {"lr": lr_embedding, "weight_decay": weight_decay},
        "B": {"lr": lr * loraplus_lr_ratio, "weight_decay": weight_decay},
        "B, no decay": {"lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in trained_parameters(model).items():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("lora_embedding_"):
            members["embedding"].append(parameter)
        elif parameter.dim() == 1:
            members["B, no decay"].append(parameter)
        else:
            members["B" if leaf == "lora_B" else "A"].append(parameter)
    return [{"params": members[name], **group} for name, group in groups.items() if members[name]]
