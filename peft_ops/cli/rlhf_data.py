"""Preference pairs of real code: a piece of a file, what stands after it there, and a damaged copy of that."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .data import Document, read_text, record
from .errors import UserError
from .rlhf_corrupt import corrupt
from .rlhf_verify import parses, verified_share
from .tokenizer import Tokenizer

PROMPT_BYTES = (16, 64)
COMPLETION_BYTES = (20, 47)
_LEAST_VERIFIED = 0.5  # of real continuations: statements, not data and comments alone
_PIECES = 3  # tried from a line
_EVERY = 8  # a file in so many is held out


@dataclass(frozen=True)
class Pair:
    """Texts: `chosen` follows the prompt in the source, `rejected` is what it is preferred to."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Pairs:
    """What is learnt, and what is held out to measure it: no file is in both."""

    train: list[Pair]
    held_out: list[Pair]

    def fingerprint(self) -> str:
        """The same for the same pairs."""
        return hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:16]


def python_pairs(documents: Sequence[Document], train: int, held_out: int, seed: int) -> Pairs:
    """At most so many pairs out of Python files, split by file; a pure function of its arguments.

    Raises UserError: pairs in fewer than two of the documents.
    """
    random = Random(seed)
    files = [found for document in documents if (found := _pairs_in(document, random))]
    if len(files) < 2:
        raise UserError("the source of the standard library is too short for pairs: give --data FILE")
    random.shuffle(files)
    cut = max(1, len(files) // _EVERY)
    sides = [[pair for found in side for pair in found] for side in (files[cut:], files[:cut])]
    for side in sides:
        random.shuffle(side)
    return Pairs(sides[0][:train], sides[1][:held_out])


def _pairs_in(document: Document, random: Random) -> list[Pair]:
    lines = document.completion.splitlines(keepends=True)
    starts = (start for start in range(len(lines)) for _ in range(_PIECES))
    return [pair for start in starts if (pair := _pair_at(lines, start, random))]


def read_pairs(files: Iterable[Path], longest: int, tokenizer: Tokenizer, seed: int) -> Pairs:
    """Of .jsonl files with the fields prompt, chosen and rejected; all pairs of a prompt are on one side of the split.

    longest: tokens that the model takes.
    Raises UserError naming the file, and the line, that cannot be read or is too long.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                pair = Pair(**record(f"--data {file}, line {number}", line, ("prompt", "chosen", "rejected")))
                size = len(tokenizer.encode(pair.prompt)) + max(
                    len(tokenizer.encode(t)) for t in (pair.chosen, pair.rejected)
                )
                if size >= longest or not pair.prompt:
                    found = f"{size} tokens, the model takes {longest - 1}" if pair.prompt else "an empty prompt"
                    raise UserError(f"--data {file}, line {number}: {found}")
                by_prompt.setdefault(pair.prompt, []).append(pair)
    prompts = list(by_prompt)
    if len(prompts) < 2:
        raise UserError(f"--data has {len(prompts)} prompts: at least 2 are needed (one is held out)")
    Random(seed).shuffle(prompts)
    cut = max(1, len(prompts) // _EVERY)
    return Pairs(*([pair for prompt in side for pair in by_prompt[prompt]] for side in (prompts[cut:], prompts[:cut])))


def _pair_at(lines: Sequence[str], start: int, random: Random) -> Pair | None:
    """A piece of random length that begins at a line, if it and what follows it parse."""
    indentation = len(lines[start]) - len(lines[start].lstrip())
    if not lines[start].strip() or indentation % 4:
        return None
    prompt, end = _take(lines, start, indentation, random.randint(*PROMPT_BYTES))
    chosen, _ = _take(lines, end, indentation, random.randint(*COMPLETION_BYTES))
    if len(prompt) < PROMPT_BYTES[0] or len(chosen.strip()) < COMPLETION_BYTES[0] or not (prompt + chosen).isascii():
        return None
    if not parses(prompt) or not parses(prompt + chosen) or verified_share(prompt, chosen) < _LEAST_VERIFIED:
        return None
    if (rejected := corrupt(chosen, random)) == chosen:
        return None
    return Pair(prompt, chosen, rejected)


def _take(lines: Sequence[str], start: int, indentation: int, most: int) -> tuple[str, int]:
    """Whole lines of at most so many characters in all, without the indentation, and where they end."""
    text, margin = "", " " * indentation
    while start < len(lines) and (lines[start].startswith(margin) or not lines[start].strip()):
        line = lines[start].rstrip() + "\n"
        line = line.removeprefix(margin)
        if len(text) + len(line) > most:
            break
        text, start = text + line, start + 1
    return text, start
