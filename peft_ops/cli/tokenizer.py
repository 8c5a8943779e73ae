"""From text to tokens: a model's own tokenizer, or the bytes of the text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class Tokenizer:
    """encode: text -> tokens, nothing added; decode: back. start, end: what stands around a document. source: a
    tokenizer of transformers, saved with a model that is trained whole."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: list[int]
    end: list[int]
    vocabulary: int
    source: Any = None


def byte_tokenizer() -> Tokenizer:
    """A token is a byte of UTF-8; a document ends with byte 0, which text does not hold."""
    return Tokenizer(
        lambda text: list(text.encode()),
        lambda tokens: bytes(tokens).decode(errors="replace"),
        [],
        [0],
        BYTE_VOCABULARY,
    )


def from_transformers(source: Any) -> Tokenizer:
    """A document starts with a token where the tokenizer itself puts one, and ends with end-of-sequence."""
    added = source("").input_ids
    start = [source.bos_token_id] if source.bos_token_id is not None and added[:1] == [source.bos_token_id] else []
    end = [] if source.eos_token_id is None else [source.eos_token_id]

    def encode(text: str) -> list[int]:
        return source(text, add_special_tokens=False, verbose=False).input_ids  # no warning about the length: it is cut

    return Tokenizer(encode, source.decode, start, end, len(source), source)
