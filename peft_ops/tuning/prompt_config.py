"""Prompt tuning and P-tuning: fields of Hugging Face PEFT's configs, and the authors' forms that PEFT does not have."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import MethodConfig, check_choice, check_count, check_probability

INITS = ("RANDOM", "UNIFORM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS")


@dataclass(frozen=True)
class PromptConfig(MethodConfig):
    """What methods of virtual tokens share. num_virtual_tokens: n, how many there are."""

    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens)


@dataclass(frozen=True)
class PromptTuningConfig(PromptConfig):
    """n trained embeddings before the input of a frozen model.

    num_virtual_tokens: n.
    prompt_tuning_init: 'RANDOM' draws from N(0, 1), as PEFT does; 'UNIFORM' from U(-0.5, 0.5), as the paper does;
        'SAMPLE_VOCAB' takes embeddings of tokens drawn at random; 'TEXT' those of prompt_tuning_init_text, repeated or
        cut to n; 'CLASS_LABELS' those of class_labels, averaged over a label's tokens, and samples of the vocabulary
        for what is left of n.
    sample_vocab: draw among the first so many tokens (the paper: 5,000, in the order of their frequency); None: all.
    prompt_tuning_init_text, class_labels: text, texts.
    tokenizer: str -> list of ids, or a tokenizer of transformers; tokenizer_name_or_path: where to load one from.
    modules_to_save, task_type: see MethodConfig.

    Raises:
        TypeError, ValueError: a value out of its range, an initialisation without what it needs.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, section 2.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    class_labels: Collection[str] | None = None
    sample_vocab: int | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer: Callable[[str], Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prompt_tuning_init", self.prompt_tuning_init, INITS)
        if self.sample_vocab is not None:
            check_count("sample_vocab", self.sample_vocab)
        texts = {"TEXT": "prompt_tuning_init_text", "CLASS_LABELS": "class_labels"}.get(self.prompt_tuning_init)
        if texts and not getattr(self, texts):
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} needs {texts}")
        if texts and self.tokenizer is None and self.tokenizer_name_or_path is None:
            raise ValueError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} needs tokenizer or tokenizer_name_or_path"
            )
        labels = self.class_labels
        if isinstance(labels, str) or (labels is not None and not all(isinstance(label, str) for label in labels)):
            raise TypeError(f"class_labels must be a list of strings or None, got {labels!r}")
        if labels is not None and len(labels) > self.num_virtual_tokens:
            raise ValueError(
                f"class_labels has {len(labels)} labels, which do not fit num_virtual_tokens={self.num_virtual_tokens}"
            )


@dataclass(frozen=True)
class PTuningConfig(PromptConfig):
    """Virtual tokens that a small encoder computes from trained embeddings, before the input or inside a template.

    num_virtual_tokens: n; with a template, the sum of it (and taken from it where left at its default).
    encoder_reparameterization_type: 'MLP': Linear - ReLU - Linear - ReLU - Linear, d to H to H to d; 'LSTM': a
        bidirectional LSTM with H per direction, then Linear(2H, 2H) - ReLU - Linear(2H, d). Both are PEFT's; the LSTM
        with H = d/2 and two layers is the authors' encoder of their LAMA experiments.
    encoder_hidden_size: H; None is d for 'MLP' and d/2 for 'LSTM'.
    encoder_num_layers, encoder_dropout: of the LSTM.
    few_shot: the heads of the authors' few-shot experiments instead: LSTM with H, Linear(2H, H) - ReLU - Linear(H, d);
        MLP without an LSTM, Linear(d, H) - ReLU - Linear(H, d). H = None is d.
    template, pseudo_token_id: None puts the virtual tokens before the input, as PEFT does. A template such as (3, 3, 3)
        is the authors' form: the input holds pseudo_token_id at n places, which `fill` lays out, and the virtual tokens
        stand there in order; positions are those of the input. A row may also hold none, then it stays as it is.
    ejected: start from a plain table of embeddings, as loaded from a PEFT checkpoint, which does not hold the encoder.
    modules_to_save, task_type: see MethodConfig.

    Raises:
        TypeError, ValueError: a value out of its range, a template without pseudo_token_id.

    Source: Liu et al., "GPT Understands, Too", 2021 (arXiv 2103.10385), section 3.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    few_shot: bool = False
    template: Sequence[int] | None = None
    pseudo_token_id: int | None = None
    ejected: bool = False

    def __post_init__(self) -> None:
        if self.template is not None:
            self._check_template(self.template)
        super().__post_init__()
        check_choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM"))
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_count("encoder_num_layers", self.encoder_num_layers)
        check_probability("encoder_dropout", self.encoder_dropout)

    def _check_template(self, template: Sequence[int]) -> None:
        if isinstance(template, str) or not all(isinstance(n, int) and n >= 0 for n in template) or sum(template) < 1:
            raise ValueError(f"template must be counts of virtual tokens such as (3, 3, 3), got {template!r}")
        if self.pseudo_token_id is None:
            raise ValueError("template needs pseudo_token_id, which stands for the virtual tokens in the input")
        check_count("pseudo_token_id", self.pseudo_token_id, least=0)
        if self.num_virtual_tokens == PromptConfig.num_virtual_tokens:
            object.__setattr__(self, "num_virtual_tokens", sum(template))
        if self.num_virtual_tokens != sum(template):
            raise ValueError(
                f"template {tuple(template)} has {sum(template)} virtual tokens, got {self.num_virtual_tokens}"
            )

    def fill(self, *pieces: Sequence[int]) -> list[int]:
        """Token ids of the template around the pieces: pseudo tokens, a piece, pseudo tokens, a piece, ...

        LAMA: BERT with template (3, 3, 3), [cls, *config.fill([mask], subject), sep]; GPT with (3, 3, 0),
        config.fill(subject, []).

        Raises:
            ValueError: no template, or another number of pieces than gaps in it.
        """
        if self.template is None or self.pseudo_token_id is None:
            raise ValueError("fill needs a template")
        if len(pieces) != len(self.template) - 1:
            raise ValueError(
                f"template {tuple(self.template)} takes {len(self.template) - 1} pieces, got {len(pieces)}"
            )
        ids: list[int] = []
        for count, piece in zip(self.template, (*pieces, ()), strict=True):
            ids += [self.pseudo_token_id] * count + list(piece)
        return ids
