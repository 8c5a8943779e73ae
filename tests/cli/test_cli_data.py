"""Files, packing, the split and the order of batches."""

import pytest
import torch

from peft_ops.cli.data import IGNORED, Document, Sequences, batch, pack, read_documents
from peft_ops.cli.errors import UserError
from peft_ops.cli.tokenizer import byte_tokenizer


def test_packing_by_value():
    tokenizer = byte_tokenizer()
    split = pack([Document("defg", prompt="abc")], tokenizer, length=2, held_out=0.3, seed=0)
    stream = torch.tensor(list(b"abcdefg\0"))
    got = torch.cat((split.train.tokens, split.held_out.tokens))
    # (a, b) predicts only the prompt and is left out; (c, d) predicts d and e.
    assert torch.equal(got, torch.tensor([list(b"cd"), list(b"ef")]))
    assert torch.equal(torch.cat((split.train.labels, split.held_out.labels)), torch.tensor([list(b"de"), list(b"fg")]))
    assert len(split.train) == len(split.held_out) == 1
    assert stream[-1] == 0


def test_prompt_is_not_learnt():
    split = pack([Document("cd", prompt="ab"), Document("cd", prompt="ab")], byte_tokenizer(), 4, 0.1, seed=0)
    assert split.train.tokens.tolist() == [list(b"abcd")]
    assert split.train.labels.tolist() == [[IGNORED, *b"cd", 0]]
    assert split.held_out.tokens.tolist() == [[0, *b"abc"]]


def test_split_is_disjoint_deterministic_and_follows_the_seed():
    documents = [Document(chr(65 + i) * 7) for i in range(20)]
    one, two, other = (pack(documents, byte_tokenizer(), 8, 0.25, seed) for seed in (3, 3, 4))
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert (len(one.train), len(one.held_out)) == (14, 5)
    train, held_out = ({tuple(t) for t in part.tokens.tolist()} for part in (one.train, one.held_out))
    assert not train & held_out


def test_batches_cover_each_epoch_once_in_new_orders():
    sequences = Sequences(torch.arange(10).view(10, 1), torch.arange(10).view(10, 1))
    seen = torch.cat([batch(sequences, 4, seed=1, step=step).tokens for step in range(5)]).flatten()
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    assert torch.equal(batch(sequences, 4, seed=1, step=3).tokens.flatten(), seen[12:16])


def test_jsonl_and_text(tmp_path):
    jsonl, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    jsonl.write_text('{"text": "one"}\n\n{"prompt": "two", "completion": "three", "id": 1}\n')
    text.write_text("four\nfive")
    assert read_documents([jsonl, text]) == [Document("one"), Document("three", "two"), Document("four\nfive")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not valid JSON"),
        ('{"prompt": "x"}', 'line 2: expected the field "text", or "prompt" and "completion"; found prompt'),
        ("[1]", "line 2: expected the field .* found list"),
        ('{"text": 3}', 'line 2: "text" must be a string, got int'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=f"bad.jsonl, {message}"):
        read_documents([file])
