"""The default that needs no files: a small byte-level Llama, English from Python's documentation, Python's own source.

The model is pre-trained on the spot on `pydoc_data.topics` (the language reference, 465 kB), and kept in a cache.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .data import Document, pack
from .errors import UserError
from .files import write_folder
from .tokenizer import BYTE_VOCABULARY, byte_tokenizer
from .training import History, Observer, Options, Trainer

_SOURCE_BYTES = 1_500_000
POSITIONS = 2048  # tokens that the model takes
_HISTORY = "pretraining.json"


@dataclass(frozen=True)
class Recipe:
    """The embedded model and its pre-training; what the cache is keyed by."""

    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 3
    heads: int = 4
    sequence_length: int = 128
    steps: int = 450
    batch_size: int = 8
    lr: float = 4e-3
    version: int = 1

    def key(self, dtype: torch.dtype) -> str:
        versions = (sys.version_info[:3], torch.__version__.split("+")[0], str(dtype))
        return hashlib.sha256(repr((asdict(self), versions)).encode()).hexdigest()[:16]


def english() -> list[Document]:
    """The topics of Python's language reference."""
    from pydoc_data.topics import topics

    return [Document(text) for _, text in sorted(topics.items())]


def python_source() -> list[Document]:
    """Modules of the standard library of the running Python, in the order of their names, up to 1.5 MB."""
    documents, total = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        if total > _SOURCE_BYTES:
            break
        documents.append(Document(text))
    if not documents:
        raise UserError("this Python comes without the source of its standard library: give --data FILE")
    return documents


def cache_folder() -> Path:
    """PEFT_OPS_CACHE, or peft-ops in the user's cache folder."""
    if given := os.environ.get("PEFT_OPS_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-ops"


def base_model(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, observe: Callable[[Options], Observer]
) -> tuple[Path, History]:
    """The folder of the pre-trained model and how its pre-training went; from the cache where it is there.

    observe: gives what shows the pre-training, which takes about a minute on two cores.
    """
    folder = cache_folder() / f"base-{recipe.key(dtype)}"
    try:
        return folder, History(**json.loads((folder / _HISTORY).read_text(encoding="utf-8")))
    except FileNotFoundError:
        model, history = pretrain(recipe, device, dtype, observe)

    def write(new: Path) -> None:
        model.save_pretrained(new)
        (new / _HISTORY).write_text(json.dumps(vars(history)), encoding="utf-8")

    try:
        write_folder(folder, write)
    except OSError as error:
        raise UserError(f"cannot write the cache {folder}: {error.strerror}; set PEFT_OPS_CACHE") from error
    return folder, history


def pretrain(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, observe: Callable[[Options], Observer]
) -> tuple[Any, History]:
    """A Llama trained from nothing on `english()`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTE_VOCABULARY, hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
            max_position_embeddings=POSITIONS, bos_token_id=None, eos_token_id=0, pad_token_id=None,
        )
    )  # fmt: skip
    model.to(device)
    options = Options(
        steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr, weight_decay=0.1,
        dtype=dtype, evaluate_every=max(1, recipe.steps // 5),
    )  # fmt: skip
    data = pack(english(), byte_tokenizer(), recipe.sequence_length, held_out=0.02, seed=0)
    return model, Trainer(model, data, options, observe(options)).run()
