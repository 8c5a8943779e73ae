"""The keys and values that a model has for a text."""

from collections.abc import Sequence
from typing import Any

import torch

from ..nn.attention_interface import recording, register
from .attention_plan import AttentionSite, config_of

KeysValues = tuple[torch.Tensor, torch.Tensor]  # [heads, n, D], [heads, n, Dv]


@torch.no_grad()
def keys_and_values(model: Any, sites: list[AttentionSite], ids: Sequence[int]) -> dict[str, KeysValues]:
    """{path of an attention module: what it sees of the text}, with rotary positions 0 to n − 1 applied.

    The text goes through the model once, in eval mode; into an encoder-decoder model on both sides. The model is as it
    was afterwards. A model on the meta device has no values to give: {}.

    Raises:
        ValueError: ids outside the vocabulary.
    """
    embeddings = model.get_input_embeddings()
    wrong = [i for i in ids if not 0 <= i < embeddings.num_embeddings]
    if wrong:
        raise ValueError(f"init_token_ids must be below the vocabulary's {embeddings.num_embeddings}, got {wrong}")
    if embeddings.weight.is_meta:
        return {}
    register()
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    configs = {module: module.config for module in modules.values()}
    training = {module: module.training for module in model.modules()}
    text = torch.tensor([list(ids)], device=embeddings.weight.device)
    recorded = {}
    try:
        model.eval()
        for module, config in configs.items():
            module.config, recorded[module] = recording(config)
        model.base_model(input_ids=text, **({"decoder_input_ids": text} if config_of(model).is_encoder_decoder else {}))
    finally:
        for module, config in configs.items():
            module.config = config
        for module, mode in training.items():
            module.training = mode
    found = {path: recorded[module][module] for path, module in modules.items()}
    return {path: (key[0].clone(), value[0].clone()) for path, (key, value) in found.items()}
