"""Prompt tuning and P-tuning in a model: where virtual tokens enter, how they start, how an encoder is dropped."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..nn.prompt_encoder import PromptEncoder, PromptTable
from .adaptation import Adaptation
from .config import MethodConfig
from .prompt_config import PromptConfig, PromptTuningConfig, PTuningConfig
from .trained import saved_modules, tensors_within
from .virtual_tokens import VirtualTokens, argument_names

CHILD = "virtual_tokens"  # the name of the VirtualTokens in the stack


@dataclass
class PromptAdaptation(Adaptation):
    """stack: path of the layers whose input the virtual tokens enter ("" is the model). dimension: d of an embedding.

    positions: how many the model has a table of, or None. texts: ids of tokens to start from, a list per text.
    """

    method: ClassVar[str] = "a method of virtual tokens"
    config: PromptConfig
    stack: str = ""
    dimension: int = 0
    positions: int | None = None
    texts: list[list[int]] | None = None

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> PromptAdaptation:
        """Raises:
        TypeError: the model has no input embedding, or its layers cannot be fed embeddings.
        ValueError: more virtual tokens than positions; a text to start from that has no tokens.
        """
        assert isinstance(config, PromptConfig)
        stack = find_stack(model)
        embedding = stack.get_input_embeddings()  # type: ignore[operator]
        positions = position_count(model)
        if positions is not None and config.num_virtual_tokens >= positions:
            raise ValueError(
                f"num_virtual_tokens={config.num_virtual_tokens} leaves no room for text: "
                f"the model has {positions} positions"
            )
        names, saved = saved_modules(model, config)
        config = replace(config, modules_to_save=names or None)
        path = next(path for path, module in model.named_modules() if module is stack)
        texts = init_texts(config) if isinstance(config, PromptTuningConfig) else None
        trained = tensors_within(model, saved)
        return cls(config, trained, stack=path, dimension=embedding.embedding_dim, positions=positions, texts=texts)

    def install(self, model: nn.Module) -> None:
        stack, config = model.get_submodule(self.stack), self.config
        embedding = stack.get_input_embeddings()  # type: ignore[operator]
        pseudo = config.pseudo_token_id if isinstance(config, PTuningConfig) and config.template is not None else None
        decoder = _decoder_over(model, stack)
        tokens = VirtualTokens(
            self._encoder(embedding), config.num_virtual_tokens, self.positions, pseudo,
            argument_names(stack), None if decoder is None else argument_names(decoder),
        )  # fmt: skip
        stack.add_module(CHILD, tokens.train(stack.training))
        if pseudo is not None:
            embedding.register_forward_pre_hook(tokens.hide_ids)
            embedding.register_forward_hook(tokens.replace)
            return
        stack.register_forward_pre_hook(tokens.before, with_kwargs=True)
        stack.register_forward_hook(tokens.after)
        if decoder is not None:
            decoder.register_forward_pre_hook(tokens.longer_memory, with_kwargs=True)

    def _encoder(self, embedding: nn.Module) -> nn.Module:
        weight = next(embedding.parameters())
        made: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        if isinstance(self.config, PTuningConfig):
            if self.config.ejected:
                return PromptTable(torch.randn(self.config.num_virtual_tokens, self.dimension, **made))
            return self._prompt_encoder(self.config, **made)
        assert isinstance(self.config, PromptTuningConfig)
        return PromptTable(initial_prompt(self.config, self.texts, embedding, self.dimension, made))

    @property
    def hidden_size(self) -> int:
        """H of P-tuning's encoder."""
        config = self.config
        assert isinstance(config, PTuningConfig)
        half = config.encoder_reparameterization_type == "LSTM" and not config.few_shot
        return config.encoder_hidden_size or (self.dimension // 2 if half else self.dimension)

    def _prompt_encoder(self, config: PTuningConfig, **made: Any) -> PromptEncoder:
        layers = config.encoder_num_layers if config.encoder_reparameterization_type == "LSTM" else 0
        n, d = config.num_virtual_tokens, self.dimension
        return PromptEncoder(n, d, self.hidden_size, layers, config.encoder_dropout, config.few_shot, **made)

    @property
    def path_of_tokens(self) -> str:
        """Where the VirtualTokens are."""
        return f"{self.stack}.{CHILD}".lstrip(".")

    def tokens(self, model: nn.Module) -> VirtualTokens:
        """What was put in."""
        return model.get_submodule(self.path_of_tokens)  # type: ignore[return-value]

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> torch.Tensor:
        """[n, d] of an adapted model, as they are outside of training."""
        encoder = self.tokens(model).encoder
        training = encoder.training
        embeddings = encoder.eval()().clone()
        encoder.train(training)
        return embeddings

    def encoder_shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        """Name and shape of the parameters of an encoder; nothing where the embeddings are trained directly."""
        config = self.config
        if not isinstance(config, PTuningConfig) or config.ejected:
            return {}
        return {name: p.shape for name, p in self._prompt_encoder(config, device="meta").named_parameters()}

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        tokens = self.tokens(model)
        tokens.enabled = False
        try:
            yield
        finally:
            tokens.enabled = True

    def eject(self, model: nn.Module) -> None:
        tokens, config = self.tokens(model), self.config
        if not isinstance(config, PTuningConfig) or config.ejected:
            return super().eject(model)
        tokens.encoder = PromptTable(self.embeddings(model)).train(tokens.encoder.training)
        self.config = replace(config, ejected=True)

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        table = {"embedding": torch.Size((self.config.num_virtual_tokens, self.dimension))}
        encoder = self.encoder_shapes(model) or table
        prompt = {f"{self.path_of_tokens}.encoder.{name}": shape for name, shape in encoder.items()}
        return prompt | super().shapes(model)


def find_stack(model: nn.Module) -> nn.Module:
    """The layers whose input is text: the encoder of an encoder-decoder model, else the backbone.

    Raises:
        TypeError: there are none that take inputs_embeds, or they have no nn.Embedding.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    stack = model.get_encoder() if two else getattr(model, "base_model", model)  # type: ignore[operator]
    embedding = getattr(stack, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            "virtual tokens need the input embedding of a transformers model: get_input_embeddings() of "
            f"{type(stack).__name__} gives {type(embedding).__name__}, not an nn.Embedding"
        )
    if "inputs_embeds" not in inspect.signature(stack.forward).parameters:
        raise TypeError(
            f"virtual tokens need a forward that takes inputs_embeds; that of {type(stack).__name__} does not"
        )
    return stack


def position_count(model: nn.Module) -> int | None:
    """Positions that the model has a table of embeddings for; None where they are rotary, relative or computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")) and "relative" not in name:
            count = getattr(model.config, "max_position_embeddings", module.num_embeddings)
            return count - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _decoder_over(model: nn.Module, stack: nn.Module) -> nn.Module | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder = model.get_decoder()  # type: ignore[operator]
    return None if decoder is stack else decoder


def init_texts(config: PromptTuningConfig) -> list[list[int]] | None:
    """Token ids of the texts that the prompt starts from: one text, tokenised whole as PEFT does, or labels, without
    special tokens.

    Raises:
        ValueError: a text without tokens.
    """
    whole = config.prompt_tuning_init == "TEXT"
    if not whole and config.prompt_tuning_init != "CLASS_LABELS":
        return None
    tokenizer = config.tokenizer
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    bare = {} if whole or not hasattr(tokenizer, "all_special_ids") else {"add_special_tokens": False}
    texts = [config.prompt_tuning_init_text] if whole else list(config.class_labels or ())
    ids = []
    for text in texts:
        given: Any = tokenizer(text, **bare)  # type: ignore[arg-type]
        ids.append(list(given["input_ids"] if hasattr(given, "keys") else given))
        if not ids[-1]:
            raise ValueError(f"the tokenizer makes no token of {text!r}")
    return ids


@torch.no_grad()
def initial_prompt(
    config: PromptTuningConfig, texts: list[list[int]] | None, embedding: nn.Module, d: int, made: dict[str, Any]
) -> torch.Tensor:
    """[n, d]: how prompt tuning starts."""
    n, device = config.num_virtual_tokens, made["device"]
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(n, d, **made)
    if config.prompt_tuning_init == "UNIFORM":
        return torch.rand(n, d, **made) - 0.5

    def embedded(ids: list[int] | torch.Tensor) -> torch.Tensor:
        return embedding(torch.as_tensor(ids, device=device)).to(made["dtype"])

    if config.prompt_tuning_init == "TEXT":
        assert texts is not None
        return embedded((texts[0] * math.ceil(n / len(texts[0])))[:n]).clone()
    assert isinstance(embedding, nn.Embedding)
    vocabulary = min(config.sample_vocab or embedding.num_embeddings, embedding.num_embeddings)
    labels = [embedded(ids).mean(0, keepdim=True) for ids in texts or ()]
    sampled = embedded(torch.randint(0, vocabulary, (n - len(labels),)))
    return torch.cat((*labels, sampled))
