"""peft_ops.fuse: attention of transformers' modules by ops.attention on a CPU, and what else happens to the model."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import tiny_models
import torch
from tiny_models import assert_same, outcome

import peft_ops
from numerics import assert_as_accurate

transformers = pytest.importorskip("transformers")

import prefix_models  # noqa: E402

FUSED = "peft_ops_attention"
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
)  # fmt: skip


def build(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).to(dtype).eval()


def attentions(model):
    return [m for m in model.modules() if hasattr(m, "_peft_ops_attention")]


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of ops.attention was causal."""
    from peft_ops.nn import attention_interface

    counted, op = [], attention_interface.attention

    def counting(query, key, value, scaling, mask, is_causal):
        counted.append(is_causal)
        return op(query, key, value, scaling, mask, is_causal)

    monkeypatch.setattr(attention_interface, "attention", counting)
    return counted


def padding():
    mask = torch.ones_like(tiny_models.tokens())
    mask[1, :3] = 0
    return mask


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_as_accurate(heads, padded, dtype, calls):
    mask = padding() if padded else None
    model = build(dtype, num_key_value_heads=heads)
    plain = outcome(model, mask)
    exact = outcome(copy.deepcopy(model).double(), mask)
    fused = peft_ops.fuse(model)
    assert fused.attentions == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    ours = outcome(model, mask)
    assert calls == [not padded] * 2
    seen = torch.ones_like(padding()).bool() if mask is None else mask.bool()
    for name, truth in exact.items():
        rows = [t[seen] if name == "logits" else t for t in (ours[name], plain[name], truth)]
        assert_as_accurate(name, *rows, times=2.0 if name == "logits" else 3.0)


def test_the_models_config_stays_and_unfuse_gives_it_back():
    model = build()
    before, expected = model.config.to_dict(), outcome(model)
    peft_ops.fuse(model)
    modules = attentions(model)
    assert len({id(m.config) for m in modules}) == 1
    assert modules[0].config is not model.config
    assert modules[0].config._attn_implementation == FUSED
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert len(peft_ops.fuse(model).attentions) == 2  # again changes nothing
    peft_ops.unfuse(model)
    assert all(m.config is model.config for m in modules)
    assert not attentions(model)
    assert_same(outcome(model), expected)


def test_eager_attention_is_left(calls):
    model = build(attn_implementation="eager")
    assert peft_ops.fuse(model).attentions == []
    outcome(model)
    assert calls == []


def test_a_later_choice_of_attention_is_followed(calls):
    model = build()
    expected = outcome(model)
    peft_ops.fuse(model)
    model.set_attn_implementation("eager")
    tokens = tiny_models.tokens()
    weights = model(tokens, output_attentions=True).attentions
    assert weights[0].shape == (2, 4, tokens.shape[1], tokens.shape[1])
    assert_same(outcome(model), expected)
    assert calls == []
    model.set_attn_implementation("sdpa")
    assert_same(outcome(model), expected)
    assert calls == [True] * 2


@pytest.mark.parametrize("order", ["adapt first", "fuse first"])
def test_with_adapters(order, calls):
    def adapted(model):
        torch.manual_seed(5)
        config = peft_ops.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft_ops.adapt(model, config)

    expected = outcome(adapted(build()))
    model = build()
    if order == "fuse first":
        peft_ops.fuse(model)
        adapted(model)
    else:
        peft_ops.fuse(adapted(model))
    assert_same(outcome(model), expected)
    assert calls == [True] * 2


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "qwen3"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_of_every_shape(name, padded, calls):
    """Encoders, cross-attention, masks on either side; what is not for the op goes where it went."""
    model = prefix_models.BUILDERS[name]()
    expected = prefix_models.outputs(model, name, padded)
    loss = prefix_models.loss_of(model, name)
    fused = peft_ops.fuse(model)
    assert fused.attentions
    torch.testing.assert_close(prefix_models.outputs(model, name, padded), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prefix_models.loss_of(model, name), loss, rtol=1e-4, atol=1e-5)
    assert calls


@pytest.mark.parametrize("name", ["t5", "gpt2", "roberta", "opt", "neox", "phi3", "gemma3", "umt5"])
def test_other_models_compute_what_they_did(name):
    model = prefix_models.BUILDERS[name]()
    expected = prefix_models.outputs(model, name, True)
    peft_ops.fuse(model)
    torch.testing.assert_close(prefix_models.outputs(model, name, True), expected, rtol=1e-4, atol=1e-5)


def test_position_biases_and_dropout_are_transformers_own(calls):
    t5 = prefix_models.BUILDERS["t5"]()
    peft_ops.fuse(t5)
    prefix_models.loss_of(t5, "t5").backward()
    assert len(calls) <= sum("EncDecAttention" in name for name, _ in t5.named_modules())
    calls.clear()
    llama = build(attention_dropout=0.3).train()
    peft_ops.fuse(llama)
    outcome(llama)
    assert calls == []
    outcome(llama.eval())
    assert calls == [True] * 2


@pytest.mark.parametrize("name", ["llama", "bart", "bert"])
@pytest.mark.parametrize("order", ["prefix first", "fuse first"])
def test_with_a_prefix(name, order, calls):
    """Either order computes the same; the prefix has the text's attention in its own op."""
    fields = {"num_virtual_tokens": 4, "task_type": prefix_models.TASK[name]}

    def prefixed(model):
        torch.manual_seed(3)
        return peft_ops.adapt(model, peft_ops.PrefixTuningConfig(**fields))

    expected = prefix_models.outputs(prefixed(prefix_models.BUILDERS[name]()), name, True)
    plain = prefix_models.outputs(prefix_models.BUILDERS[name](), name, True)
    model = prefix_models.BUILDERS[name]()
    if order == "fuse first":
        assert peft_ops.fuse(model).attentions
        prefixed(model)
    else:
        peft_ops.fuse(prefixed(model))
    configs = [m.config for m in attentions(model)]
    torch.testing.assert_close(prefix_models.outputs(model, name, True), expected, rtol=1e-4, atol=1e-5)
    with peft_ops.adapters_disabled(model):
        torch.testing.assert_close(prefix_models.outputs(model, name, True), plain, rtol=1e-4, atol=1e-5)
    assert bool(calls) == (order == "fuse first")  # with the prefix switched off
    assert [m.config for m in attentions(model)] == configs
    peft_ops.unfuse(model)
    calls.clear()
    torch.testing.assert_close(prefix_models.outputs(model, name, True), expected, rtol=1e-4, atol=1e-5)
    with peft_ops.adapters_disabled(model):
        torch.testing.assert_close(prefix_models.outputs(model, name, True), plain, rtol=1e-4, atol=1e-5)
        originals = [m.config for m in model.modules() if hasattr(m, "peft_prefix")]
    assert all(config is model.config for config in originals)
    assert calls == []


def test_a_prefix_from_a_text(calls):
    def prefixed(model):
        config = peft_ops.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", init_token_ids=[5, 6, 7])
        return peft_ops.adapt(model, config)

    expected = prefixed(build())(tiny_models.tokens()).logits
    model = build()
    peft_ops.fuse(model)
    torch.testing.assert_close(prefixed(model)(tiny_models.tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how, calls):
    model = build()
    peft_ops.fuse(model)
    expected = outcome(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    calls.clear()
    assert_same(outcome(copied), expected)
    assert calls == [True] * 2
    copied.set_attn_implementation("eager")
    calls.clear()
    outcome(copied)
    assert calls == []
    outcome(model)
    assert calls == [True] * 2
    peft_ops.unfuse(copied)
    assert all(m.self_attn.config is copied.config for m in copied.model.layers)
    assert len(attentions(model)) == 2


def test_a_saved_model_is_loaded_by_another_process(tmp_path):
    model = build()
    peft_ops.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(tiny_models.tokens()).logits.detach(), tmp_path / "logits.pt")
    torch.save(tiny_models.tokens(), tmp_path / "tokens.pt")
    code = (
        "import sys, torch; folder = sys.argv[1]; load = lambda n: torch.load(f'{folder}/{n}.pt', weights_only=False)\n"
        "model = load('model')\n"
        "torch.testing.assert_close(model(load('tokens')).logits, load('logits'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_checkpoints_have_no_name_of_ours(tmp_path):
    model = build()
    expected = model(tiny_models.tokens()).logits
    peft_ops.fuse(model)
    model.config.save_pretrained(tmp_path)
    assert "peft_ops" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    model.save_pretrained(tmp_path)
    assert "peft_ops" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tiny_models.tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(cache, padded, calls):
    model = build()
    tokens, mask = tiny_models.tokens(), padding() if padded else torch.ones_like(tiny_models.tokens())
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    expected = model.generate(tokens, **options)
    peft_ops.fuse(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(calls) == 2  # the prompt; a token at a time goes to torch's


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, calls):
    model = build().train()
    expected = outcome(model)
    peft_ops.fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(outcome(model), expected)
    assert len(calls) == 4


def test_torch_compile_takes_transformers_own(calls):
    torch._dynamo.reset()
    model = build()
    expected = model(tiny_models.tokens()).logits
    peft_ops.fuse(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tiny_models.tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls == []


def test_autocast(calls):
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model)
        peft_ops.fuse(model)
        ours = outcome(model)
    assert len(calls) == 2
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.1, atol=0.05)


def test_subclasses_of_tensors_are_transformers_own(calls):
    """As of tensor parallelism."""

    class Sharded(torch.Tensor):
        pass

    model = build()
    peft_ops.fuse(model)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, 32)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    expected, _ = attention(x, positions, None)
    assert calls == [True]
    out, _ = attention(x.as_subclass(Sharded), positions, None)
    assert calls == [True]
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-5)


def test_torch_export_takes_transformers_own(calls):
    model = build().model
    tokens = tiny_models.tokens()
    expected = model(tokens, use_cache=False).last_hidden_state
    peft_ops.fuse(model)
    with torch.no_grad():
        program = torch.export.export(model, (tokens,), {"use_cache": False, "return_dict": False}, strict=False)
    assert calls == []
    out = program.module()(tokens, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_module_made_from_a_copied_config_attends(calls):
    """Someone's own layer, built from the config that a fused one shows."""
    model = build()
    peft_ops.fuse(model)
    attention = type(model.model.layers[0].self_attn)(model.model.layers[0].self_attn.config, 0).eval()
    x = torch.randn(1, 5, 32)
    out, _ = attention(x, model.model.rotary_emb(x, torch.arange(5)[None]), None)
    assert out.norm() > 0
    assert calls == [True]


def test_attention_that_asks_for_sdpa_by_name_is_left():
    """DeepSeek's sparse attention makes its mask for the names "eager" and "sdpa" alone."""
    torch.manual_seed(1)
    config = transformers.DeepseekV32Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        index_topk=4, index_n_heads=2, index_head_dim=16, first_k_dense_replace=1, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    model = transformers.DeepseekV32ForCausalLM(config).eval()
    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        assert peft_ops.fuse(model).attentions == []
        torch.testing.assert_close(model(tokens).logits, expected)
