"""A small model, small data and a small embedded default to run the command line on."""

import json

import pytest
import torch

from peft_ops import cli
from peft_ops.cli import embedded, main
from peft_ops.cli.embedded import Recipe
from peft_ops.cli.methods import METHODS

TINY = Recipe(hidden_size=64, intermediate_size=64, layers=1, heads=2, sequence_length=64, steps=60, batch_size=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_OPS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def words():
    return [f"word{i}" for i in range(40)]


def save_llama(folder, words, layers):
    """A small Llama and a tokenizer of whole words, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, words):
    """Of one layer, which learns in few steps."""
    return save_llama(tmp_path_factory.mktemp("model"), words, layers=1)


@pytest.fixture(scope="session")
def deeper_folder(tmp_path_factory, words):
    """Of two layers, for a method that freezes one."""
    return save_llama(tmp_path_factory.mktemp("model"), words, layers=2)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory, words):
    """Sentences in which every word tells the next."""
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(words[i % 40] for i in range(2000)))
    return file


@pytest.fixture
def finetune(model_folder, deeper_folder, data_file, tmp_path):
    """Runs `peft-ops finetune` on the small model; options given later win."""

    def run(*options, out="run"):
        method = options[options.index("--method") + 1] if "--method" in options else "lora"
        folder = deeper_folder if method == "frozen-bottom" else model_folder
        given = ["--model", folder, "--data", data_file, "--out", tmp_path / out, "--device", "cpu"]
        lr = {"adapter": 0.1, "rslora": 0.015, "lora-plus": 0.003, "loftq": 0.015}.get(method, 0.03)
        given += ["--dtype", "fp32", "--steps", 8, "--batch-size", 4, "--sequence-length", 16, "--lr", lr]
        given += ["--r", 4] if "r" in METHODS.get(method, METHODS["lora"]).options else []
        return main(["finetune", *map(str, given), *map(str, options)])

    return run


@pytest.fixture
def losses(tmp_path):
    """Of the run in a folder."""
    return lambda out: json.loads((tmp_path / out / "run.json").read_text())["history"]["losses"]


@pytest.fixture
def small_embedded(monkeypatch):
    """The embedded default, tiny."""
    monkeypatch.setattr(cli.embedded, "Recipe", lambda: TINY)
    source = embedded.python_source
    monkeypatch.setattr(embedded, "python_source", lambda: source()[:3])
