"""Pairs of real and damaged code, and the reward that can be checked."""

from random import Random

import pytest

from peft_ops.cli.data import Document
from peft_ops.cli.embedded import python_source
from peft_ops.cli.errors import UserError
from peft_ops.cli.rlhf_corrupt import EDITS, corrupt
from peft_ops.cli.rlhf_data import COMPLETION_BYTES, PROMPT_BYTES, python_pairs
from peft_ops.cli.rlhf_verify import parses, reach, stated, verified_share


@pytest.fixture(scope="module")
def documents():
    return python_source()[:6]


@pytest.fixture(scope="module")
def pairs(documents):
    return python_pairs(documents, 200, 50, seed=0)


def test_pairs_are_a_function_of_the_seed(documents, pairs):
    again = python_pairs(documents, 200, 50, seed=0)
    assert (again, again.fingerprint()) == (pairs, pairs.fingerprint())
    assert python_pairs(documents, 200, 50, seed=1).fingerprint() != pairs.fingerprint()


def test_pairs_are_real_text_split_by_file(documents, pairs):
    texts = ["\n".join(line.strip() for line in document.completion.splitlines()) for document in documents]

    def files(side):
        plain = ["\n".join(line.strip() for line in f"{p.prompt}{p.chosen}".splitlines()) for p in side]
        return [{i for i, text in enumerate(texts) if piece in text} for piece in plain]

    found = {"train": files(pairs.train), "held out": files(pairs.held_out)}
    assert all(where for side in found.values() for where in side)
    only = {side: {next(iter(where)) for where in sets if len(where) == 1} for side, sets in found.items()}
    assert only["train"]
    assert only["held out"]
    assert not only["train"] & only["held out"]


def test_rejected_is_damaged_and_of_the_same_kind(pairs):
    for pair in pairs.train:
        assert pair.rejected != pair.chosen
        assert abs(len(pair.rejected) - len(pair.chosen)) <= 16
        assert PROMPT_BYTES[0] <= len(pair.prompt) <= PROMPT_BYTES[1]
        assert len(pair.chosen) <= COMPLETION_BYTES[1]
        assert parses(pair.prompt)
        assert parses(pair.prompt + pair.chosen)
    real = sum(verified_share(pair.prompt, pair.chosen) for pair in pairs.train)
    damaged = sum(verified_share(pair.prompt, pair.rejected) for pair in pairs.train)
    assert damaged < 0.6 * real


def test_every_edit_edits_and_none_fails_on_odd_texts():
    line = "    self.items[0] = first(second)\n"
    for edit in EDITS:
        assert any(edit(line, Random(i)) != line for i in range(5)), edit
        for text in ("", "\n", "x", " "):
            edit(text, Random(0))
    assert corrupt(line, Random(3)) == corrupt(line, Random(3)) != line


@pytest.mark.parametrize(
    ("prompt", "completion", "reached", "counted"),
    [
        ("", "", 0, 0),
        ("if x:\n", "", 0, 0),
        ("x = 1\n", "value = compute(x)\n", 19, 19),
        ("if x:\n", "    value = compute(x)\n", 23, 23),
        ("if x:\n", "value = compute(x)\n", 0, 0),  # the block has no body
        ("x = 1\n", "    value = compute(x)\n", 0, 0),  # wrong indentation
        ("x = 1\n", "while compute(x) > 3:\n    value += 1\n", 37, 37),
        ("x = 1\n", "value = compute(x)", 18, 0),  # not whole
        ("x = 1\n", "value = compute(x)\nvalue = (\n", 27, 19),
        ("x = 1\n", "value = 3 4\nvalue = compute(x)\n", 10, 19),
        ("x = 1\n", "# a comment, and nothing more\n\n\n", 0, 0),
        ("x = 1\n", "a\nb\n'text'\n1, 2\npass\nx.y.z\n", 27, 0),
        ("value = compute(x)\n", "value = compute(x)\n", 19, 0),  # as in the prompt
        ("x = 1\n", "value = compute(x)\n" * 3, 57, 19),
        ("x = 1\n", "\x00\x01\n\ufffd\n" + "(" * 500 + "\n", 0, 0),
    ],
)
def test_the_reward_that_can_be_checked(prompt, completion, reached, counted):
    assert (reach(prompt, completion), stated(prompt, completion)) == (reached, counted)
    expected = (reached + counted) / (2 * max(20, len(completion.encode())))
    assert verified_share(prompt, completion) == pytest.approx(expected)
    assert 0 <= expected <= 1


def test_nothing_is_executed(tmp_path):
    file = tmp_path / "made"
    assert verified_share("x = 1\n", f"open({str(file)!r}, 'w').close()\n") == 1.0
    assert not file.exists()


def test_too_little_source_is_named():
    with pytest.raises(UserError, match="too short for pairs"):
        python_pairs([Document("x = 1\n"), Document("y = 2\n")], 10, 10, seed=0)
