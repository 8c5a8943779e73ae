"""What every method's config has, and the checks that configs share."""

import re
from collections.abc import Collection
from dataclasses import dataclass

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class MethodConfig:
    """The base of every config that `adapt` takes; frozen, compared by value, named as in Hugging Face PEFT.

    modules_to_save: modules trained whole and saved with what the method adds; sequence and token classification add
        'classifier' and 'score', question answering 'qa_outputs'.
    task_type: one of PEFT's task types or None.

    Raises:
        TypeError, ValueError: values of the wrong type, an unknown task type.
    """

    modules_to_save: Collection[str] | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of strings or None, got {self.modules_to_save!r}")
        check_names("modules_to_save", self.modules_to_save)
        for pattern in self.modules_to_save or ():  # PEFT reads them as regular expressions
            check_regex("modules_to_save", pattern)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(f"task_type must be None or one of {', '.join(TASK_TYPES)}, got {self.task_type!r}")


def matches_end(pattern: str, path: str) -> bool:
    """How the keys of rank_pattern and alpha_pattern match: the whole path, or what follows one of its dots."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_names(name: str, value) -> None:
    """None, a regular expression, or a collection of strings."""
    if isinstance(value, str):
        check_regex(name, value)
    elif value is not None and not (
        isinstance(value, Collection) and not isinstance(value, dict) and all(isinstance(v, str) for v in value)
    ):
        raise TypeError(f"{name} must be a string, a list of strings or None, got {value!r}")


def check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}") from error


def check_count(name: str, value, least: int = 1) -> None:
    """An int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_probability(name: str, value) -> None:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_choice(name: str, value, choices: Collection) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
