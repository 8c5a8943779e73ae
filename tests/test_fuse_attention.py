"""peft_ops.fuse for attention: the same model, whatever else is done with it."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

import peft_ops
from peft_ops.nn import attention_interface

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


def build(family="Llama", **options):
    torch.manual_seed(1)
    options = {"head_dim": 8} | options if family in ("Qwen3", "Gemma") else options
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def tokens(B=3, T=20):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def calls(monkeypatch):
    """What is given to our op: masks."""
    seen = []

    def spy(query, key, value, scaling, mask, causal, real=attention_interface.attention):
        seen.append(mask)
        return real(query, key, value, scaling, mask, causal)

    monkeypatch.setattr(attention_interface, "attention", spy)
    return seen


def outcome(model, mask=None):
    """{name: tensor}: logits where there is text, and every gradient."""
    model.zero_grad()
    ids = tokens()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    logits = out.logits if mask is None else out.logits[mask.bool()]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma"])
def test_a_model_computes_what_it_did(family, side, calls):
    model, mask = build(family), None
    if side:
        mask = torch.ones(3, 20, dtype=torch.int64)
        mask[1, slice(0, 6) if side == "left" else slice(14, None)] = 0
    before = outcome(model, mask)
    assert not calls
    fused = peft_ops.fuse(model)
    assert fused.attentions == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert_same(outcome(model, mask), before)
    assert len(calls) == 2
    assert (calls[0] is None) == (side is None)
    assert peft_ops.fuse(model).attentions == fused.attentions
    peft_ops.unfuse(model)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert_same(outcome(model, mask), before)
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, calls):
    model = build()
    before = outcome(model)
    peft_ops.fuse(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(outcome(model), before)
    assert len(calls) == 4


def test_generation(calls):
    """The text at once through ours, the rest token by token."""
    model = build()
    given = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens(), **given)
    peft_ops.fuse(model)
    assert torch.equal(model.generate(tokens(), **given), expected)
    assert len(calls) == 2
    assert torch.equal(model.generate(tokens(), cache_implementation="static", **given), expected)


def test_what_the_model_asks_for_later_counts(calls):
    model = build()
    peft_ops.fuse(model)
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True)
    assert not calls
    assert out.attentions[0].shape == (3, 4, 20, 20)
    model.set_attn_implementation("sdpa")
    model(tokens())
    assert len(calls) == 2


def test_dropout_of_weights_is_torchs(calls):
    model = build(attention_dropout=0.1).train()
    peft_ops.fuse(model)
    model(tokens())
    assert not calls


def test_torch_compile_takes_torchs(calls):
    model = build()
    expected = model(tokens()).logits
    peft_ops.fuse(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_attend_alone(how, calls):
    model = build()
    peft_ops.fuse(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    config = other.model.layers[0].self_attn.config
    assert config is not model.model.layers[0].self_attn.config
    assert attention_interface.plain(config) is other.config
    peft_ops.unfuse(model)
    torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_another_process_loads_it(tmp_path):
    model = build()
    peft_ops.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import torch; model = torch.load('model.pt', weights_only=False); "
        "model(torch.arange(40).view(2, 20)).logits.sum().backward(); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=None
    )
    assert done.stdout.strip() == "done", done.stderr


def test_files_do_not_know_of_it(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "plain")
    peft_ops.fuse(model)
    model.save_pretrained(tmp_path / "fused")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "fused")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("first", ["fuse", "adapt"])
@pytest.mark.parametrize("init", [None, list(range(5))])
def test_a_prefix_takes_its_modules(first, init, calls):
    """Under a prefix the text's part is native as it is; fuse leaves such modules."""
    config = peft_ops.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=False, init_token_ids=init)
    steps = {"fuse": peft_ops.fuse, "adapt": lambda m: peft_ops.adapt(m, config)}
    model, plain = build(), build()
    torch.manual_seed(3)
    steps.pop(first)(model)
    next(iter(steps.values()))(model)
    torch.manual_seed(3)
    peft_ops.adapt(plain, config)
    calls.clear()
    assert_same(outcome(model), outcome(plain))
    assert not calls


def test_adapters_before_and_after(calls):
    for order in (1, -1):
        model = build()
        steps = [peft_ops.fuse, lambda m: peft_ops.adapt(m, peft_ops.LoRAConfig(r=4, target_modules="all-linear"))]
        for step in steps[::order]:
            step(model)
        outcome(model)
    assert len(calls) == 4


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config).eval(), lambda model: model(tokens()).last_hidden_state


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    return model, lambda model: model(tokens(), decoder_input_ids=tokens()).logits


@pytest.mark.parametrize("family", [bert, t5])
def test_models_that_attend_otherwise(family):
    """BERT attends both ways; T5 has cross-attention, and a table of positions that only torch's takes."""
    torch.manual_seed(1)
    model, call = family()
    before = call(model)
    peft_ops.fuse(model)
    torch.testing.assert_close(call(model), before, rtol=1e-4, atol=1e-5)
