"""Adapters in PEFT's format: ours read by the real peft, peft's read by us, and files that are spoiled."""

import json
import os
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import BUILDERS, TASKS, assert_as_it_was, assert_same_bytes, gpt2, llama, logits, snapshot, train

import peft_ops
from peft_ops import LoRAConfig, QLoRAConfig
from peft_ops.checkpoint import files
from peft_ops.nn import LoRALinear, NF4Linear
from peft_ops.tuning.matching import linear_paths

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

CASES = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 12}),
    ("llama", {"target_modules": r".*\.1\.mlp\..*_proj", "modules_to_save": ["norm"]}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear", "bias": "lora_only"}),
    ("gpt2", {"bias": "all"}),
    ("bert", {}),
    ("bert", {"target_modules": "all-linear", "bias": "lora_only", "lora_dropout": 0.1}),
    ("bert", {"bias": "all"}),
    ("llama", {"use_dora": True, "target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "lora_dropout": 0.1}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}}),
    ("gpt2", {"use_dora": True, "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "alpha_pattern": {"wpe": 3}}),
    ("bert", {"use_dora": True, "rank_pattern": {"query": 2}}),
    ("bert", {"target_modules": ["word_embeddings", "token_type_embeddings", "value"], "bias": "all"}),
]


def fields_of(name, fields):
    return {"r": 4, "task_type": TASKS[name], **fields}


def train_ours(name, fields, config=LoRAConfig):
    model = peft_ops.adapt(BUILDERS[name](), config(**fields_of(name, fields)))
    train(model, lr=0.02)
    return model


def train_peft(name, fields):
    model = peft.get_peft_model(BUILDERS[name](), peft.LoraConfig(**fields_of(name, fields)))
    train(model, lr=0.02)
    return model


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_ours_in_peft(name, fields, tmp_path):
    model = train_ours(name, fields)
    assert not torch.allclose(logits(model), logits(BUILDERS[name]()), atol=1e-3)
    peft_ops.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(BUILDERS[name](), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    ours = peft_ops.load_adapter(BUILDERS[name](), tmp_path)
    assert torch.equal(logits(ours), logits(model))
    merged = logits(peft_ops.merge(ours))
    torch.testing.assert_close(merged, logits(model), rtol=1e-5, atol=1e-5)
    if "wte" not in fields.get("target_modules", ()):  # PEFT merges into the tied output head too
        torch.testing.assert_close(logits(theirs.merge_and_unload()), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_peft_in_ours(name, fields, tmp_path):
    model = train_peft(name, fields)
    model.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(BUILDERS[name](), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    assert isinstance(ours, type(BUILDERS[name]()))
    assert peft_ops.trainable_parameters(ours).trainable == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_files_are_those_of_peft(name, fields, tmp_path):
    peft_ops.save_adapter(train_ours(name, fields), tmp_path / "ours")
    train_peft(name, fields).save_pretrained(tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    copies = ("modules_to_save", "original_module", ".base_layer.weight")  # of what is there, or of the frozen base
    theirs = {key: t for key, t in theirs.items() if not any(copy in key for copy in copies)}
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    ours, theirs = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    if len(ours["target_modules"]) >= 20:  # peft shortens such lists to common suffixes
        del theirs["target_modules"], ours["target_modules"]
    for key, value in ours.items():
        assert (sorted(value) if isinstance(value, list) else value) == (
            sorted(theirs[key]) if isinstance(theirs[key], list) else theirs[key]
        ), key
    with safetensors.safe_open(tmp_path / "ours" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]


def gemma():
    return transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip


def bart():
    return transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        scale_embedding=True, decoder_start_token_id=2,
    )  # fmt: skip


@pytest.mark.parametrize("config", [gemma, bart])
def test_embeddings_that_scale(config, tmp_path):
    """Gemma multiplies what it looks up by the root of its width; so does BART where asked to."""
    auto = transformers.AutoModelForSeq2SeqLM if config is bart else transformers.AutoModelForCausalLM

    def build():
        torch.manual_seed(1)
        return auto.from_config(config()).eval()

    config_of_peft = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), config_of_peft).eval()
    model.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(build(), tmp_path)
    assert not torch.allclose(logits(model), logits(build()), atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    with peft_ops.adapters_disabled(ours):
        assert torch.equal(logits(ours), logits(build()))
    before = logits(ours)
    with warnings.catch_warnings(action="ignore"):  # of tied embeddings
        merged = peft_ops.merge(ours)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert type(merged.get_input_embeddings()) is type(build().get_input_embeddings())


def test_a_16_bit_base(tmp_path):
    model = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(r=4, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(llama().bfloat16(), tmp_path)
    assert ours.model.layers[0].self_attn.q_proj.lora_A.dtype == torch.float32
    error = (logits(ours) - logits(model)).float().norm() / logits(model).float().norm()
    assert error < 0.02


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_qlora_saves_a_lora_checkpoint(name, use_dora, tmp_path):
    fields = {"target_modules": "all-linear", "use_dora": use_dora}
    model = train_ours(name, fields, QLoRAConfig)
    peft_ops.save_adapter(model, tmp_path)
    assert "blocksize" not in json.loads((tmp_path / CONFIG).read_text())
    other = peft_ops.adapt(BUILDERS[name](), QLoRAConfig(**fields_of(name, fields)))
    assert torch.equal(logits(peft_ops.load_adapter(other, tmp_path)), logits(model))
    quantised = peft_ops.load_adapter(_of_nf4_layers(name), tmp_path)
    assert torch.equal(logits(quantised), logits(model))
    theirs = peft.PeftModel.from_pretrained(_dense(model, name), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


def _of_nf4_layers(name):
    """A model of NF4Linear layers that was never adapted."""
    model = BUILDERS[name]()
    for path in linear_paths(model):
        if path != "lm_head":
            model.set_submodule(path, NF4Linear.from_linear(model.get_submodule(path)))
    return model


def _dense(model, name):
    """A plain model whose weights are the dequantised ones of `model`."""
    plain = BUILDERS[name]()
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            weight = peft_ops.nf4.dequantize(layer.weight)
            target = plain.get_submodule(path).weight
            target.data.copy_(weight.T if target.shape != weight.shape or name == "gpt2" else weight)
    return plain


def test_loading_continues_training(tmp_path):
    model = train_ours("llama", {"modules_to_save": ["norm"]})
    peft_ops.save_adapter(model, tmp_path)
    other = peft_ops.adapt(llama(), LoRAConfig(**fields_of("llama", {"modules_to_save": ["norm"]})))
    flags = {name: p.requires_grad for name, p in other.named_parameters()}
    assert peft_ops.load_adapter(other, tmp_path) is other
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags
    assert torch.equal(logits(other), logits(model))
    assert train(other) == train(model)


@pytest.fixture
def saved(tmp_path):
    model = train_ours("llama", {})
    peft_ops.save_adapter(model, tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


def cut(name, keep):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


SPOILED = {
    "truncated weights": (cut(WEIGHTS, 0.9), ValueError, "adapter_model.safetensors is corrupt or truncated"),
    "truncated header": (cut(WEIGHTS, 0.01), ValueError, "adapter_model.safetensors is corrupt or truncated"),
    "empty weights": (cut(WEIGHTS, 0), ValueError, "adapter_model.safetensors is corrupt or truncated"),
    "truncated config": (cut(CONFIG, 0.5), ValueError, "adapter_config.json is not valid JSON"),
    "binary config": (
        lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"),
        ValueError,
        "adapter_config.json is not valid",
    ),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), ValueError, "adapter_config.json must hold a JSON object"),
    "missing key": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), ValueError, f"missing keys: {KEY}"),
    "unexpected key": (
        lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.x": torch.ones(1)})),
        ValueError,
        "unexpected keys: base_model.model.x",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY: torch.ones(4, 31)})),
        ValueError,
        rf"shapes: {KEY}: \(4, 31\), expected \(4, 32\)",
    ),
    "rank": (lambda f: edit_config(f, r=5), ValueError, r"shapes: .*\(4, 32\), expected \(5, 32\)"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("nan"))), ValueError, f"NaN or infinite: {KEY}"),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int8)})),
        ValueError,
        f"not floating point: {KEY}",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        FileNotFoundError,
        "no adapter_model.safetensors .found: adapter_con",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "has no adapter_config.json"),
    "another method": (
        lambda f: edit_config(f, peft_type="IA3"),
        ValueError,
        "adapter_config.json: peft_type .* 'IA3'",
    ),
    "DoRA": (
        lambda f: edit_config(f, use_dora=True),
        ValueError,
        r"missing keys: .*q_proj.lora_magnitude_vector|use_dora of the checkpoint is True, that of the model is not",
    ),
    "another embedding": (
        lambda f: edit_tensors(f, lambda t: t.update({EMBEDDING: 2 * llama().model.embed_tokens.weight})),
        ValueError,
        "was made on another base: it has other weights for model.embed_tokens",
    ),
    "PiSSA": (
        lambda f: edit_config(f, init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights='pissa' changes the base",
    ),
    "wrong type": (lambda f: edit_config(f, r="8"), TypeError, "adapter_config.json: r must be an int, got '8'"),
    "other modules": (
        lambda f: edit_config(f, target_modules=["qq_proj"]),
        ValueError,
        r"\[qq_proj\] matches no module",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "adapted"),
    [(s, False) for s in SPOILED] + [(s, True) for s in SPOILED if s not in ("rank", "other modules")],
)
def test_a_failed_load_leaves_the_model(spoil, adapted, saved):
    change, error, message = SPOILED[spoil]
    change(saved)
    model = peft_ops.adapt(llama(), LoRAConfig(r=4)) if adapted else llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.load_adapter(model, saved)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 2}, r"shapes: .*\(4, 32\), expected \(2, 32\)"),
        ({"target_modules": ["q_proj"]}, "unexpected keys: .*v_proj.lora_A"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing keys: .*o_proj.lora_A"),
        (
            {"bias": "lora_only", "modules_to_save": ["norm"]},
            "missing keys: base_model.model.model.layers.0.input_layernorm",
        ),
        ({"lora_alpha": 16}, r"scaling .* differs: model.layers.0.self_attn.q_proj: 2, the model has 4"),
        ({"use_rslora": True}, "scaling .* the model has 4"),
    ],
)
def test_a_model_adapted_otherwise_is_left(fields, message, saved):
    model = peft_ops.adapt(llama(), LoRAConfig(**{"r": 4, **fields}))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.load_adapter(model, saved)
    assert_as_it_was(model, before)


def test_every_problem_is_listed(saved):
    def change(tensors):
        del tensors[KEY]
        tensors["base_model.model.x"] = torch.ones(1)
        tensors[KEY.replace("lora_A", "lora_B")] = torch.ones(3, 3)

    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=r"missing keys: .*q_proj.lora_A.*unexpected keys: .*\.x; shapes: .*lora_B"):
        peft_ops.load_adapter(llama(), saved)


def test_unknown_fields_are_tolerated(saved):
    edit_config(saved, from_the_future={"a": 1}, inference_mode=False, peft_version="9.9")
    assert peft_ops.load_adapter(llama(), saved)


@pytest.mark.parametrize("fails", ["save_file", "_flush", "replace"])
def test_an_interrupted_save_leaves_the_previous_one(fails, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = peft_ops.load_adapter(llama(), saved)
    train(model)

    def interrupted(*args, **kwargs):
        if fails == "save_file":
            args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = os if fails == "replace" else files
        patch.setattr(owner, fails, interrupted)
        with pytest.raises(KeyboardInterrupt):
            peft_ops.save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    peft_ops.save_adapter(model, saved)
    assert torch.equal(logits(peft_ops.load_adapter(llama(), saved)), logits(model))
    assert sorted(path.name for path in saved.iterdir()) == sorted(before)


def test_saving_needs_an_adapted_model(tmp_path):
    with pytest.raises(ValueError, match="not adapted"):
        peft_ops.save_adapter(llama(), tmp_path / "new")
    model = peft_ops.adapt(gpt2(), LoRAConfig(modules_to_save=["ln_f"]))
    with peft_ops.adapters_disabled(model), pytest.raises(ValueError, match="disabled"):
        peft_ops.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loading_and_merging_need_the_adapters_in_place(saved):
    model = peft_ops.load_adapter(llama(), saved)
    before = snapshot(model)
    with peft_ops.adapters_disabled(model):
        for call in (peft_ops.merge, lambda m: peft_ops.load_adapter(m, saved)):
            with pytest.raises(ValueError, match="adapters are disabled"):
                call(model)
    assert_as_it_was(model, before)
    model.model.layers[1].self_attn.v_proj.merge()
    with pytest.raises(ValueError, match=r"merged into model.layers.1.self_attn.v_proj"):
        peft_ops.load_adapter(model, saved)


def test_saving_keeps_the_model(tmp_path):
    model = train_ours("bert", {"bias": "all"})
    before = snapshot(model)
    peft_ops.save_adapter(model, tmp_path / "a" / "b")
    assert_as_it_was(model, before)
    loaded = peft_ops.load_adapter(BUILDERS["bert"](), str(tmp_path / "a" / "b"))
    assert_same_bytes(loaded.state_dict(), model.state_dict())
