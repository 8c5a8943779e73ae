"""Text and JSONL files, packed into sequences of one length, and the order in which they are learnt."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .errors import UserError
from .tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not learnt, as in transformers
_MOST_HELD_OUT = 64  # sequences: an evaluation stays short whatever the size of the data


@dataclass(frozen=True)
class Document:
    """A text; the loss is taken on `completion` alone where there is a prompt."""

    completion: str
    prompt: str = ""


@dataclass(frozen=True)
class Sequences:
    """tokens, labels: int64 [n, length]. labels[i, j] is the token after tokens[i, j], or IGNORED."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: torch.Tensor | slice) -> "Sequences":
        return Sequences(self.tokens[index], self.labels[index])

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(self.tokens.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Split:
    """What is learnt, and what is held out to measure it."""

    train: Sequences
    held_out: Sequences

    def fingerprint(self) -> str:
        """The same for the same sequences."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(part.tokens.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def read_documents(files: Iterable[Path]) -> list[Document]:
    """One document per text file and per line of a .jsonl file ({"text"} or {"prompt", "completion"}).

    Raises UserError naming the file, and the line, that cannot be read.
    """
    documents: list[Document] = []
    for file in files:
        text = read_text(file)
        documents += _jsonl(file, text) if file.suffix == ".jsonl" else [Document(text)]
    return documents


def read_text(file: Path) -> str:
    """Of a file of --data; UserError naming it where that fails."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--data {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data {file}: not UTF-8 text (byte {error.start})") from error


def _jsonl(file: Path, text: str) -> list[Document]:
    lines = enumerate(text.split("\n"), 1)
    return [_document(f"--data {file}, line {number}", line) for number, line in lines if line.strip()]


def _document(where: str, line: str) -> Document:
    found = record(where, line, ("text",), ("prompt", "completion"))
    return Document(found["text"]) if "text" in found else Document(found["completion"], found["prompt"])


def record(where: str, line: str, *forms: tuple[str, ...]) -> dict[str, str]:
    """The fields of the first of the forms that a line of JSON has; UserError saying where, if it has none."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    fields = next((form for form in forms if isinstance(found, dict) and all(field in found for field in form)), None)
    if fields is None:
        *others, last = (f'"{field}"' for field in forms[-1])
        expected = "".join(f'"{form[0]}", or ' for form in forms[:-1]) + f"{', '.join(others)} and {last}"
        has = (", ".join(found) or "none") if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{where}: expected the field{'' if len(forms) > 1 else 's'} {expected}; found {has}")
    for field in fields:
        if not isinstance(found[field], str):
            raise UserError(f'{where}: "{field}" must be a string, got {type(found[field]).__name__}')
    return {field: found[field] for field in fields}


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(tokens, whether each is learnt): start, prompt, completion, end."""
    given = tokenizer.start + tokenizer.encode(document.prompt)
    learnt = tokenizer.encode(document.completion) + tokenizer.end
    return given + learnt, [False] * len(given) + [True] * len(learnt)


def pack(documents: Sequence[Document], tokenizer: Tokenizer, length: int, held_out: float, seed: int) -> Split:
    """Documents in the order that `seed` gives, end to end, cut into sequences; the last share is held out.

    Sequences in which nothing is to be learnt are left out.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    stream: list[int] = []
    in_loss: list[bool] = []
    for index in order:
        ids, counts = encode(documents[index], tokenizer)
        stream += ids
        in_loss += counts
    n = max(0, len(stream) - 1) // length
    tokens, learnt = torch.tensor(stream, dtype=torch.int64), torch.tensor(in_loss, dtype=torch.bool)
    labels = torch.where(learnt, tokens, IGNORED)
    sequences = Sequences(tokens[: n * length].view(n, length), labels[1 : n * length + 1].view(n, length))
    kept = sequences[(sequences.labels != IGNORED).any(dim=1)]
    if len(kept) < 2:
        raise UserError(
            f"the data has {len(stream)} tokens ({int(learnt.sum())} to learn), which fill {len(kept)} sequences of "
            f"{length}: at least 2 are needed (one is held out); give more data or a smaller --sequence-length"
        )
    cut = len(kept) - min(max(1, round(held_out * len(kept))), _MOST_HELD_OUT, len(kept) - 1)
    return Split(kept[:cut], kept[cut:])


def batch(sequences: Sequences, size: int, seed: int, step: int) -> Sequences:
    """The `size` sequences of a step: every epoch in a new order, a pure function of (seed, step)."""
    return sequences[batch_rows(len(sequences), size, seed, step)]


def batch_rows(n: int, size: int, seed: int, step: int) -> torch.Tensor:
    """Which of n examples a step takes: every epoch in a new order, a pure function of the arguments."""
    places = [divmod(position, n) for position in range(step * size, (step + 1) * size)]
    return torch.stack([_epoch_order(n, seed, epoch)[place] for epoch, place in places])


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 24) + epoch))
