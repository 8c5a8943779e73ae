"""A causal language model and its tokenizer from a folder of transformers."""

from pathlib import Path
from typing import Any

import torch

from .errors import UserError, as_user_error
from .tokenizer import BYTE_VOCABULARY, Tokenizer, byte_tokenizer, from_transformers

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Tokenizer]:
    """The model (config and safetensors), on the CPU, and its tokenizer; nothing is downloaded, no code there is run.

    Raises UserError naming the folder and what is wrong with it.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        found = "it does not exist" if not folder.exists() else "it has no config.json"
        raise UserError(f"--model {folder}: expected a folder with a transformers model, but {found}")
    from safetensors import SafetensorError

    try:
        with as_user_error(f"--model {folder}: "):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"--model {folder}: {error}") from error
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    return model, tokenizer


def load_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """The folder's tokenizer; where it has none, bytes."""
    from transformers import AutoTokenizer

    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        with as_user_error(f"--model {folder}, tokenizer: "):
            tokenizer = from_transformers(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    elif vocabulary >= BYTE_VOCABULARY:
        tokenizer = byte_tokenizer()
    else:
        raise UserError(
            f"--model {folder}: no tokenizer, and its vocabulary of {vocabulary} is too small for bytes "
            f"({BYTE_VOCABULARY}); add its tokenizer.json"
        )
    if tokenizer.vocabulary > vocabulary:
        raise UserError(
            f"--model {folder}: the tokenizer has {tokenizer.vocabulary} tokens, the model a vocabulary of {vocabulary}"
        )
    return tokenizer
