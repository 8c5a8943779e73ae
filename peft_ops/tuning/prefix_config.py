"""What prefix-tuning and P-tuning v2 do to a model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .config import MethodConfig, check_choice, check_count, check_probability

PLACES = ("encoder", "cross", "decoder")


@dataclass(frozen=True)
class PrefixTuningConfig(MethodConfig):
    """Prefix-tuning: n virtual tokens whose keys and values every layer's attention sees before the text's.

    num_virtual_tokens: n; the authors take 5 to 10 for tables to text, 200 for summaries.
    prefix_projection: train an encoder, Embedding(n, d) - Linear(d, encoder_hidden_size) - Tanh - Linear, from which
        keys and values come, and which `eject` drops; the authors do, with encoder_hidden_size=512. False trains keys
        and values themselves, as PEFT does by default.
    encoder_hidden_size: width of that encoder; None is the model's hidden size.
    init_weights: None draws as PEFT does (keys and values from N(0, 1)), 'zero' starts with keys and values of zeros.
    init_token_ids: n ids of a text; the prefix starts as the keys and values that the base model has for it, so that
        a causal model starts as if the text stood before the input.
    dropout: of keys and values in training, a mask for every row of the batch.
    places: for encoder-decoder models: which attention gets a prefix of its own, of 'encoder' (its self-attention),
        'cross' and 'decoder' (its self-attention). PEFT knows the decoder's alone.
    modules_to_save, task_type: see MethodConfig.

    Raises:
        TypeError, ValueError: values of the wrong type or out of range; init_token_ids that are not n, or together
            with prefix_projection or init_weights.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv 2101.00190; fields
    of Hugging Face PEFT 0.21 and, beyond those, init_token_ids, dropout and places.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    init_token_ids: Sequence[int] | None = None
    dropout: float = 0.0
    places: Collection[str] = PLACES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if not isinstance(self.prefix_projection, bool):
            raise TypeError(f"prefix_projection must be a bool, got {self.prefix_projection!r}")
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_choice("init_weights", self.init_weights, (None, "zero"))
        check_probability("dropout", self.dropout)
        self._check_places()
        if self.init_token_ids is not None:
            self._check_token_ids(self.init_token_ids)

    def _check_places(self) -> None:
        if isinstance(self.places, str) or not isinstance(self.places, Collection):
            raise TypeError(f"places must be a list of {', '.join(map(repr, PLACES))}, got {self.places!r}")
        for place in self.places:
            check_choice("places", place, PLACES)
        if not self.places:
            raise ValueError("places must have at least one of " + ", ".join(map(repr, PLACES)))
        object.__setattr__(self, "places", tuple(place for place in PLACES if place in self.places))

    def _check_token_ids(self, ids: Sequence[int]) -> None:
        if isinstance(ids, str) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TypeError(f"init_token_ids must be a list of ints, got {ids!r}")
        if len(ids) != self.num_virtual_tokens:
            raise ValueError(f"init_token_ids must be num_virtual_tokens={self.num_virtual_tokens} ids, got {len(ids)}")
        if self.prefix_projection or self.init_weights is not None:
            other = "prefix_projection=True" if self.prefix_projection else f"init_weights={self.init_weights!r}"
            raise ValueError(f"init_token_ids sets keys and values themselves and cannot go with {other}")
        object.__setattr__(self, "init_token_ids", tuple(ids))


@dataclass(frozen=True)
class PTuningV2Config(PrefixTuningConfig):
    """P-tuning v2: prefixes in every layer as prompts for understanding, with the classification head trained.

    The keys and values are trained themselves, Embedding(n, 2 · L · d), with dropout; prefix_projection puts the
    authors' MLP before them (their prefix_hidden_size is encoder_hidden_size). task_type SEQ_CLS or TOKEN_CLS trains
    the head, QUESTION_ANS the span head. Other fields and errors as in PrefixTuningConfig.

    Source: Liu et al., "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
    Tasks", 2021, arXiv 2110.07602.
    """

    num_virtual_tokens: int = 128
    encoder_hidden_size: int | None = 512
    dropout: float = 0.1
