"""The command line: data, training that resumes, checks that fail when an op is wrong."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import peft_ops
from peft_ops import _backend
from peft_ops.cli import check, embedded, main, measure
from peft_ops.cli.data import IGNORED, Document, Sequences, Split, batch, pack, read_documents
from peft_ops.cli.embedded import Recipe
from peft_ops.cli.errors import UserError
from peft_ops.cli.files import write_file, write_folder
from peft_ops.cli.models import load_model
from peft_ops.cli.tokenizer import byte_tokenizer
from peft_ops.cli.training import Options, Trainer

TINY = Recipe(hidden_size=64, intermediate_size=64, layers=1, heads=2, sequence_length=64, steps=60, batch_size=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_OPS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def words():
    return [f"word{i}" for i in range(40)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, words):
    """A small Llama and a tokenizer of whole words, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory, words):
    """Sentences in which every word tells the next."""
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(words[i % 40] for i in range(2000)))
    return file


@pytest.fixture
def finetune(model_folder, data_file, tmp_path):
    """Runs `peft-ops finetune` on the small model; options given later win."""

    def run(*options, out="run"):
        given = ["--model", model_folder, "--data", data_file, "--out", tmp_path / out, "--device", "cpu"]
        given += ["--dtype", "fp32", "--steps", 8, "--batch-size", 4, "--sequence-length", 16, "--lr", 0.03, "--r", 4]
        return main(["finetune", *map(str, given), *map(str, options)])

    return run


def losses(folder):
    return json.loads((folder / "run.json").read_text())["history"]["losses"]


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


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_finetune_learns_and_writes(finetune, model_folder, tmp_path, method, capsys):
    assert finetune("--method", method, "--steps", 30) == 0
    out = tmp_path / "run"
    run = json.loads((out / "run.json").read_text())
    assert run["result"]["held_out_after"] < 0.85 * run["result"]["held_out_before"]
    assert len(run["history"]["losses"]) == 30
    assert run["arguments"]["method"] == method
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "trainable" in capsys.readouterr().out

    if method == "full":
        model, tokenizer = load_model(out / "model", torch.float32)
        assert tokenizer.encode("word1 word2") == [4, 5]
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder)
        if method == "qlora":
            peft_ops.adapt(model, peft_ops.QLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        peft_ops.load_adapter(model, out / "adapter")
    tokens = torch.arange(3, 43).repeat(2)[None, :60]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < run["result"]["held_out_before"] - 0.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(finetune, tmp_path, monkeypatch, capsys, method):
    options = ("--method", method, "--lora-dropout", 0.1, "--checkpoint-every", 2, "--evaluate-every", 3)
    assert finetune(*options, out="whole") == 0
    step = Trainer._step

    def dies_in_step_6(trainer):
        if trainer.done == 5:
            raise MemoryError
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", dies_in_step_6)
        with pytest.raises(MemoryError):
            finetune(*options, out="broken")
    assert not (tmp_path / "broken" / "run.json").exists()
    assert finetune(*options, out="broken") == 0
    assert "resumed from" in capsys.readouterr().out
    histories = [json.loads((tmp_path / out / "run.json").read_text())["history"] for out in ("whole", "broken")]
    assert histories[0]["losses"] == histories[1]["losses"]
    assert histories[0]["held_out"] == histories[1]["held_out"]
    assert len(set(histories[0]["losses"])) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_saves_and_says_how_to_go_on(finetune, tmp_path, monkeypatch, capsys, number):
    step = Trainer._step

    def interrupted(trainer):
        if trainer.done == 2:
            os.kill(os.getpid(), number)
        step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert finetune() == 130
    assert "stopped after step 3 of 8" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert finetune() == 0
    assert finetune(out="whole") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_another_run_in_the_folder_is_refused(finetune, tmp_path, capsys):
    assert finetune() == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert finetune("--lr", 0.02) == 2
    error = capsys.readouterr().err
    assert "--lr was 0.03, is 0.02" in error
    assert "--restart" in error
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert finetune("--lr", 0.02, "--restart") == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_corrupt_checkpoint_is_refused(finetune, tmp_path, capsys, damage):
    assert finetune() == 0
    file = tmp_path / "run" / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        for i in range(len(data) // 2, len(data) // 2 + 64):
            data[i] ^= 0xFF
    else:
        data = b"not a checkpoint"
    file.write_bytes(data)
    assert finetune() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("peft-ops finetune: ")
    assert "checkpoint.pt is corrupt or truncated" in last


def test_an_interrupted_save_leaves_the_previous_one(tmp_path):
    def dies(path):
        (path / "half" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt

    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    write_file(file, lambda path: path.write_text("whole"))
    write_folder(folder, lambda path: (path / "a").write_text("whole"))
    for write, target in ((write_file, file), (write_folder, folder)):
        with pytest.raises(KeyboardInterrupt):
            write(target, dies)
    assert file.read_text() == (folder / "a").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["file.txt", "folder"]
    write_folder(folder, lambda path: (path / "b").write_text("new"))
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_accumulated_batches_equal_one_large_one(finetune, tmp_path):
    assert finetune("--batch-size", 4, out="one") == 0
    assert finetune("--batch-size", 2, "--accumulation", 2, out="two") == 0
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def test_gradient_checkpointing_changes_no_loss(finetune, tmp_path):
    assert finetune("--lora-dropout", 0.1, out="one") == 0
    assert finetune("--lora-dropout", 0.1, "--gradient-checkpointing", out="two") == 0
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--steps", "x"], "argument --steps: invalid"),
        (["--lora-dropout", "2"], "argument --lora-dropout: must be between 0 and 1, got 2"),
        (["--method", "dora"], "invalid choice"),
        (["--model", "/nowhere"], "--model /nowhere: expected a folder with a transformers model"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: No such file"),
        (["--target-modules", "q_prj"], "q_proj"),
        (["--sequence-length", "65"], "--sequence-length 65: the model takes 64 tokens at most"),
        (["--optim", "adamw8bit"], "--optim adamw8bit needs a GPU, got --device cpu"),
        (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N"),
        (["--device", "abacus"], "--device abacus: expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_arguments_are_one_clear_message(finetune, capsys, options, message):
    try:
        code = finetune(*options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_model_is_named(finetune, tmp_path, model_folder, capsys):
    (tmp_path / "empty").mkdir()
    assert finetune("--model", tmp_path / "empty") == 2
    assert "it has no config.json" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    assert finetune("--model", broken) == 2
    assert f"--model {broken}" in capsys.readouterr().err


def test_without_a_tokenizer_bytes_must_fit(finetune, tmp_path, model_folder, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_folder / name).read_bytes())
    assert finetune("--model", bare) == 2
    assert "no tokenizer, and its vocabulary of 64 is too small for bytes (256)" in capsys.readouterr().err


def test_a_missing_package_is_named(finetune, monkeypatch, capsys):
    from peft_ops.cli import errors

    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "matplotlib" else SimpleNamespace())
    assert finetune() == 2
    assert "needs matplotlib: pip install 'peft-ops[cli]'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run():
    model = SimpleModel(scale=float("inf"))
    data = Split(*(Sequences(torch.ones(4, 8, dtype=torch.int64), torch.ones(4, 8, dtype=torch.int64)),) * 2)
    with pytest.raises(UserError, match="smaller --lr"):
        Trainer(model, data, Options(steps=2, batch_size=2, lr=0.1)).run()


class SimpleModel(torch.nn.Module):
    """logits = scale · w[tokens], with known sizes of what it saves."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4, 16))
        self.scale = scale

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=(torch.nn.functional.embedding(input_ids, self.w) * self.scale).sigmoid())


def test_saved_bytes_count_activations_once_and_no_parameter():
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    sequences = Sequences(tokens, torch.ones(2, 8, dtype=torch.int64))
    # float32 [16, 16] twice, of sigmoid and log-softmax; the labels; the total weight of the loss, a scalar.
    assert measure.saved_for_backward(SimpleModel(), sequences, torch.float32) == 2 * 16 * 16 * 4 + 16 * 8 + 4


def test_base_bits():
    layers = [torch.nn.Linear(256, 128), peft_ops.nn.LoRALinear(256, 128)]
    assert measure.base_bits(torch.nn.Sequential(*layers)) == 32
    assert measure.base_bits(torch.nn.Sequential(*layers).bfloat16()) == 16
    quantised = peft_ops.nn.NF4Linear.from_linear(layers[0])
    for layer in (quantised, peft_ops.nn.LoRALinear.from_linear(quantised)):
        assert 4.125 < measure.base_bits(torch.nn.Sequential(layer)) < 4.14
    assert measure.base_bits(peft_ops.nn.NF4Linear.from_linear(layers[0], double_quant=False)) == 4.5


@pytest.fixture
def small_embedded(monkeypatch):
    """The embedded default, tiny."""
    from peft_ops import cli

    monkeypatch.setattr(cli.embedded, "Recipe", lambda: TINY)
    source = embedded.python_source
    monkeypatch.setattr(embedded, "python_source", lambda: source()[:3])


def test_the_demo_learns_with_every_method(small_embedded, tmp_path, capsys):
    run = ["demo", "--out", str(tmp_path / "demo"), "--steps", "60", "--device", "cpu", "--dtype", "fp32"]
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "pre-training" in shown
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())["methods"]
    by_name = {row["method"]: row for row in results}
    assert list(by_name) == ["lora", "qlora", "full"]
    for row in results:
        assert row["held_out_after"] < row["held_out_before"] - 0.1
        assert f"{row['trainable']:,}" in shown
    assert by_name["lora"]["trainable"] == by_name["qlora"]["trainable"] < by_name["full"]["trainable"]
    assert by_name["lora"]["held_out_before"] == by_name["full"]["held_out_before"]
    assert by_name["qlora"]["base_bits"] <= 4.2
    assert 0 < by_name["lora"]["saved_bytes"] < by_name["full"]["saved_bytes"]
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert main(run) == 0
    assert "pre-training" not in capsys.readouterr().out


def test_finetune_without_model_and_data(small_embedded, tmp_path):
    given = ["--steps", "40", "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "fp32"]
    assert main(["finetune", *given, "--sequence-length", "64"]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["held_out_after"] < result["held_out_before"] - 0.1


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", ((17, 131, 67, 3),))


def test_check_passes_and_writes(few_shapes, tmp_path, device, capsys):
    assert main(["check", "--json", str(tmp_path / "check.json"), "--device", str(device)]) == 0
    results = json.loads((tmp_path / "check.json").read_text())["results"]
    assert all(row["passed"] for row in results)
    assert {row["dtype"] for row in results} == {"float32", "float16", "bfloat16"}
    assert "lora_linear, nf4 nested, p=0.1" in capsys.readouterr().out


OPS = [
    ("nf4", "nf4_quantize"), ("nf4", "absmax_quantize"), ("nf4", "nf4_dequantize"), ("nf4_linear", "nf4_linear"),
    ("nf4_linear", "nf4_linear_dx"), ("down_project", "down_project"), ("down_project", "down_project_da"),
    ("linear_low_rank", "linear_low_rank"), ("linear_low_rank", "linear_low_rank_dx"),
    ("low_rank", "low_rank_gradients"),
]  # fmt: skip
SABOTAGE = [(*op, 0.0) for op in OPS] + [
    (*op, float("nan")) for op in OPS if not op[1].endswith("_quantize")
]  # refuses NaN itself


@pytest.mark.parametrize(("op", "function", "value"), SABOTAGE)
def test_check_fails_where_an_op_is_wrong(few_shapes, monkeypatch, capsys, op, function, value):
    module = _backend.implementation(op, torch.empty(1))
    right = getattr(module, function)

    def spoil(result):
        if isinstance(result, tuple):
            return tuple(map(spoil, result))
        return torch.full_like(result, value) if result.is_floating_point() else torch.zeros_like(result)

    monkeypatch.setattr(module, function, lambda *args: spoil(right(*args)))
    assert main(["check", "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out
