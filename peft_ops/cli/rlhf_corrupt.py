"""Plausible damage to a piece of code: characters and words in the wrong place, wrong brackets, wrong indentation."""

import re
from collections.abc import Callable
from random import Random

_BYTES_PER_EDIT = 4
_TRIES = 20
_BRACKETS = {"(": "[", "[": "(", ")": "]", "]": ")", "{": "(", "}": ")"}


def corrupt(text: str, random: Random) -> str:
    """The text with an edit for every 4 bytes, at least two; never the text itself unless nothing in it can be edited.

    Edits keep the bytes there are, but for brackets of another kind and indentation one or two spaces off, so that
    neither the length nor the characters give it away.
    """
    for _ in range(_TRIES):
        damaged = text
        for _ in range(max(2, len(text) // _BYTES_PER_EDIT)):
            damaged = random.choice(EDITS)(damaged, random)
        if damaged != text:
            return damaged
    return text


def transpose(text: str, random: Random) -> str:
    """Two neighbouring letters of a word change places."""
    places = [i for i in range(len(text) - 1) if (text[i : i + 2]).isalpha() and text[i] != text[i + 1]]
    if not places:
        return text
    i = random.choice(places)
    return f"{text[:i]}{text[i + 1]}{text[i]}{text[i + 2 :]}"


def swap_tokens(text: str, random: Random) -> str:
    """A word and the sign beside it change places: `self.x` becomes `.selfx`, `x = 1` becomes `= x 1`."""
    pairs = list(re.finditer(r"(\w+)( ?)([^\w\s]+)", text))
    if not pairs:
        return text
    pair = random.choice(pairs)
    word, space, sign = pair.groups()
    return f"{text[: pair.start()]}{sign}{space}{word}{text[pair.end() :]}"


def swap_words(text: str, random: Random) -> str:
    """Two words of the text change places."""
    words = list(re.finditer(r"[A-Za-z_]\w+", text))
    if len(words) < 2:
        return text
    first, second = sorted(random.sample(words, 2), key=lambda word: word.start())
    between = text[first.end() : second.start()]
    return f"{text[: first.start()]}{second[0]}{between}{first[0]}{text[second.end() :]}"


def break_bracket(text: str, random: Random) -> str:
    """A bracket becomes one of another kind."""
    places = [i for i, c in enumerate(text) if c in _BRACKETS]
    if not places:
        return text
    i = random.choice(places)
    return f"{text[:i]}{_BRACKETS[text[i]]}{text[i + 1 :]}"


def shift_line(text: str, random: Random) -> str:
    """A line is indented by one or two spaces more or less."""
    lines = text.split("\n")
    i = random.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
    by = random.choice([-2, -1, 1, 2])
    lines[i] = " " * by + lines[i] if by > 0 else lines[i].removeprefix(" " * -by)
    return "\n".join(lines)


EDITS: tuple[Callable[[str, Random], str], ...] = (transpose, swap_tokens, swap_words, break_bracket, shift_line)
