"""Bottleneck adapters in models: what they compute, where they go, what is trained and saved for backward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import BUILDERS, TASKS, assert_as_it_was, assert_same_bytes, labels, snapshot, t5, tokens
from torch import nn
from torch.utils.hooks import RemovableHandle

import peft_ops
from peft_ops import AdapterConfig

MODELS = {**BUILDERS, "t5": t5}
FORMS = {
    "houlsby": AdapterConfig.houlsby(bottleneck=5),
    "pfeiffer": AdapterConfig.pfeiffer(bottleneck=5),
    "parallel": AdapterConfig.parallel(bottleneck=5),
    "pfeiffer, both": AdapterConfig.pfeiffer(bottleneck=5, mh_adapter=True, non_linearity="gelu_new"),
    "parallel, both": AdapterConfig.parallel(bottleneck=5, mh_adapter=True, non_linearity="silu"),
}
SOME = ("houlsby", "pfeiffer, both", "parallel, both")
every_model = pytest.mark.parametrize("name", MODELS)
every_form = pytest.mark.parametrize("form", FORMS)


def outputs(model):
    with torch.no_grad():
        return model(tokens(), labels=labels(model)).logits


def shaken(model):
    """With every trainable weight and bias far from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(name, config, **changes):
    fields = {**vars(config), "task_type": TASKS[name], **changes}
    return shaken(peft_ops.adapt(MODELS[name](), AdapterConfig(**fields)))


def adapters(model):
    return [name for name, _ in model.named_parameters() if "adapter" in name]


# What a block computes, by the papers' formulas, from a plain model's parts and the adapters' weights.

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_new": lambda z: F.gelu(z, approximate="tanh")}


def formula(adapter, config):
    def added(x):
        z = F.linear(x, adapter.down_weight, adapter.down_bias)
        return config.scaling * F.linear(ACTIVATIONS[config.non_linearity](z), adapter.up_weight, adapter.up_bias)

    return added


def post_norm(h, r, norm, added, config):
    """A sublayer of BERT: h is what it gives, r its residual input."""
    if added is None:
        return norm(h + r)
    if config.is_parallel:
        return norm(h + added(r) + r)
    if not config.original_ln_before:
        return norm(h + added(h) + r)
    s, n = h + r, norm(h + r)
    if config.original_ln_after:
        return norm(s + added(n))
    return added(n) + (s if config.residual_before_ln == "post_add" else n)


def pre_norm(h, r, added, config):
    """A sublayer of a model whose norms stand before the sublayers."""
    if added is None:
        return h + r
    if config.is_parallel:
        return h + r + added(r)
    return h + r + added(h + r if config.original_ln_before else h)


def bert_block(block, x, after_attention, after_network, config):
    attention = block.attention
    h = attention.output.dense(attention.self(x)[0])
    x = post_norm(h, x, attention.output.LayerNorm, after_attention, config)
    h = block.output.dense(block.intermediate(x))
    return post_norm(h, x, block.output.LayerNorm, after_network, config)


def inline_block(attention, network, norms):
    def block(x, after_attention, after_network, config):
        x = pre_norm(attention(norms[0](x)), x, after_attention, config)
        return pre_norm(network(norms[1](x)), x, after_network, config)

    return block


def unadapted(name, model):
    """A plain model with the LayerNorms and heads of the adapted one."""
    plain = MODELS[name]().to(next(model.parameters()).dtype)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "adapter" not in n})
    return plain


def computed_and_expected(name, config, layer=1):
    """The output of one block of an adapted model, in float64, and what its formula gives."""
    model = adapted(name, config).double()
    plain, x = unadapted(name, model), torch.randn(2, 7, 32, dtype=torch.float64)
    if name == "bert":
        ours, base = model.bert.encoder.layer[layer], plain.bert.encoder.layer[layer]
        sites = (getattr(m, "adapter", None) for m in (ours.attention.output, ours.output))
        added = [None if site is None else formula(site, config) for site in sites]
        return ours(x), bert_block(base, x, *added, config)
    if name == "llama":
        ours, base = model.model.layers[layer], plain.model.layers[layer]
        rotary = {"position_embeddings": plain.model.rotary_emb(x, torch.arange(7)[None])}
        block = inline_block(
            lambda n: base.self_attn(n, attention_mask=None, **rotary)[0],
            base.mlp,
            (base.input_layernorm, base.post_attention_layernorm),
        )
    else:
        ours, base, rotary = model.transformer.h[layer], plain.transformer.h[layer], {}
        block = inline_block(lambda n: base.attn(n)[0], base.mlp, (base.ln_1, base.ln_2))
    sites = (getattr(ours, place, None) for place in ("attention_adapter", "output_adapter"))
    return ours(x, **rotary), block(x, *[None if site is None else formula(site, config) for site in sites], config)


BEHIND = {"mh_adapter": True, "original_ln_after": False, "bottleneck": 5, "non_linearity": "gelu"}
VARIANTS = {
    "normed": AdapterConfig.pfeiffer(**BEHIND, residual_before_ln=False),
    "summed": AdapterConfig.pfeiffer(**BEHIND, residual_before_ln="post_add"),
}


@pytest.mark.parametrize("form", [*FORMS, *VARIANTS])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_block_is_its_formula(name, form):
    config = (FORMS | VARIANTS)[form]
    actual, expected = computed_and_expected(name, config)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_form
def test_a_sublayer_of_t5_is_its_formula(form):
    config = FORMS[form]
    model = adapted("t5", config, cross_adapter=config.mh_adapter).double()
    plain = unadapted("t5", model)
    x, memory = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    ours, base = (m.decoder.block[1].layer for m in (model, plain))
    bodies = (
        lambda n: base[0].SelfAttention(n)[0],
        lambda n: base[1].EncDecAttention(n, key_value_states=memory)[0],
        base[2].DenseReluDense,
    )
    for sublayer, plain_one, body, arguments in zip(ours, base, bodies, ((), (memory,), ()), strict=True):
        site = getattr(sublayer, "adapter", None)
        assert (site is not None) == (sublayer is ours[2] or config.mh_adapter)
        expected = pre_norm(body(plain_one.layer_norm(x)), x, site and formula(site, config), config)
        actual = sublayer(x, *arguments)
        actual = actual[0] if isinstance(actual, tuple) else actual
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("size", "of_adapters", "of_norms"),
    [
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
         6_343_680, 100_352),
        ({}, 2_379_264, 38_400),
    ],
)  # fmt: skip
def test_counts_of_houlsby_on_bert(size, of_adapters, of_norms):
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**size))
    peft_ops.adapt(model, AdapterConfig.houlsby())
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(n for name, n in sizes.items() if "adapter" in name) == of_adapters
    assert sum(n for name, n in sizes.items() if "LayerNorm" in name) == of_norms
    assert sum(sizes.values()) == of_adapters + of_norms
    assert all(p.is_meta for p in model.parameters())


def test_forms_start_as_their_authors_do():
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1, vocab_size=8)
    adapter = peft_ops.adapt(transformers.BertModel(config), AdapterConfig.houlsby()).encoder.layer[0].output.adapter
    assert adapter.down_weight.shape == (64, 768)
    for weight in (adapter.down_weight, adapter.up_weight):
        assert weight.abs().max() <= 2e-3
        assert 0.8e-3 < weight.std() < 0.96e-3  # of a normal truncated at two of its deviations: 0.88
    pfeiffer = peft_ops.adapt(transformers.BertModel(config), AdapterConfig.pfeiffer()).encoder.layer[0]
    assert not hasattr(pfeiffer.attention.output, "adapter")
    assert pfeiffer.output.adapter.down_weight.shape == (48, 768)
    assert 0.019 < pfeiffer.output.adapter.up_weight.std() < 0.021
    parallel = peft_ops.adapt(transformers.BertModel(config), AdapterConfig.parallel()).encoder.layer[0].output.adapter
    assert parallel.down_weight.shape == (384, 768)
    assert parallel.scaling == 4.0
    assert not parallel.up_weight.any()
    for each in (adapter, pfeiffer.output.adapter, parallel):
        assert not each.down_bias.any()
        assert not each.up_bias.any()


@every_model
def test_what_is_trained(name):
    model, plain = adapted(name, FORMS["houlsby"]), MODELS[name]()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {n for n, _ in plain.named_parameters() if "norm" in n.lower() or ".ln_" in n}
    heads = {"classifier.weight", "classifier.bias"} if name == "bert" else set()
    assert trainable == set(adapters(model)) | norms | heads
    assert len(adapters(model)) == 4 * {"llama": 6, "gpt2": 4, "bert": 4, "t5": 8}[name]
    assert model.state_dict().keys() - set(adapters(model)) == plain.state_dict().keys()
    frozen_norms = adapted(name, FORMS["pfeiffer"])
    assert {n for n, p in frozen_norms.named_parameters() if p.requires_grad} == set(adapters(frozen_norms)) | heads


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_disabled_is_the_base_model(name, form):
    base = outputs(MODELS[name]())
    model = adapted(name, FORMS[form])
    trained, state = outputs(model), copy.deepcopy(model.state_dict())
    assert not torch.allclose(trained, base, rtol=1e-2)
    with peft_ops.adapters_disabled(model), peft_ops.adapters_disabled(model):
        assert torch.equal(outputs(model), base)
    with pytest.raises(KeyError), peft_ops.adapters_disabled(model):
        raise KeyError
    assert torch.equal(outputs(model), trained)
    assert_same_bytes(model.state_dict(), state)


def test_an_unpickled_model_keeps_its_hooks(monkeypatch):
    """A new process numbers hooks from 0 again; a user's hook must not take the place of an adapter's."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model = adapted("llama", FORMS["houlsby"])
    expected, pickled = outputs(model), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    other = pickle.loads(pickled)
    for module in other.model.layers[0].modules():
        for _ in range(3):
            module.register_forward_hook(lambda *_: None)
    assert torch.equal(outputs(other), expected)


def test_a_forward_that_fails_leaves_a_model_that_copies():
    model = adapted("llama", FORMS["parallel"])
    handle = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    handle.remove()
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(pickle.loads(pickle.dumps(model))))


def gradients(model):
    torch.manual_seed(7)
    model.train().zero_grad()
    model(tokens(), labels=labels(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", SOME)
def test_checkpointing_that_was_on_before(form, reentrant):
    """adapt sees it and makes the embeddings' output require a gradient."""
    plain, model = with_dropout(adapted("gpt2", FORMS[form])), MODELS["gpt2"]()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = with_dropout(peft_ops.adapt(model, FORMS[form]))
    model.load_state_dict(plain.state_dict())
    expected, actual = gradients(plain), gradients(model)
    assert actual.keys() == expected.keys() == {n for n, p in plain.named_parameters() if p.requires_grad}
    for n, grad in expected.items():
        assert grad.abs().max() > 0, n
        torch.testing.assert_close(actual[n], grad, rtol=1e-4, atol=1e-6, msg=n)


def with_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", SOME)
def test_float32_adapters_on_a_16_bit_base(form, dtype):
    model = peft_ops.adapt(MODELS["llama"]().to(dtype), FORMS[form])
    trainable = dict(model.named_parameters())
    assert {trainable[n].dtype for n in adapters(model)} == {torch.float32}
    shaken(model)(tokens(), labels=tokens()).loss.backward()
    assert all(trainable[n].grad.dtype == torch.float32 and trainable[n].grad.abs().max() > 0 for n in adapters(model))
    exact = peft_ops.adapt(MODELS["llama"]().to(dtype).float(), FORMS[form])
    exact.load_state_dict(model.state_dict())
    assert outputs(model).dtype == dtype
    assert (outputs(model).float() - outputs(exact)).norm() < 0.03 * outputs(exact).norm()


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast(name, form):
    model = adapted(name, FORMS[form])
    exact, dtypes = outputs(model), set()
    for block in model.get_submodule({"llama": "model.layers", "bert": "bert.encoder.layer"}[name]):
        block.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert (outputs(model).float() - exact).norm() < 0.05 * exact.norm()
        model.train()(tokens(), labels=labels(model)).loss.backward()
    assert dtypes == {torch.float32}  # what flows from block to block loses nothing
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def saved(model):
    """{storage: bytes} that autograd keeps for backward, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens(), labels=labels(model)).loss.backward()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("name", "form", "floats"),
    [
        ("llama", "houlsby", 6 * 32), ("llama", "pfeiffer", 3 * 32), ("llama", "parallel", 0),
        ("bert", "houlsby", 4 * 32), ("bert", "pfeiffer", 2 * (2 * 32 + 2)), ("bert", "parallel", 2 * 32),
    ],
)  # fmt: skip
def test_saves_the_bottleneck_and_no_more(name, form, floats):
    """For each token, beyond what the frozen model keeps: the bottleneck of every adapter, and the d floats of its x
    unless a norm keeps those anyway. Pfeiffer's second LayerNorm in BERT has an input and two statistics of its own."""
    base = MODELS[name]().requires_grad_(False)
    base.enable_input_require_grads()
    config = AdapterConfig(**{**vars(FORMS[form]), "train_layer_norms": False})
    model = peft_ops.adapt(MODELS[name](), config)
    model.enable_input_require_grads()
    bottlenecks = 5 * len(adapters(model)) // 4
    assert saved(model) - saved(base) == 4 * tokens().numel() * (bottlenecks + floats)


@pytest.mark.parametrize(("name", "form"), [("llama", "parallel, both"), ("t5", "pfeiffer, both")])
def test_generates_with_a_cache_as_without(name, form):
    model = adapted(name, FORMS[form])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0  # padded on the left

    def generated(use_cache=True):
        made = model.generate(
            tokens(), attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None,
            use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(made.logits)

    torch.testing.assert_close(generated(), generated(use_cache=False), rtol=1e-4, atol=1e-4)
    with peft_ops.adapters_disabled(model):
        base = generated()
    assert not torch.allclose(generated(), base, rtol=0.1)


def test_the_backbone_alone_is_adapted():
    model = adapted("llama", FORMS["pfeiffer"])
    hidden = model.model(tokens()).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(tokens()).logits)
    with peft_ops.adapters_disabled(model):
        assert not torch.allclose(model.model(tokens()).last_hidden_state, hidden)


def test_leave_out_and_saved_modules():
    model = adapted("t5", FORMS["houlsby"], leave_out=[0, 3], cross_adapter=True, modules_to_save=["lm_head"])
    places = {n.partition(".adapter")[0] for n in adapters(model)}
    assert places == {
        "encoder.block.1.layer.0", "encoder.block.1.layer.1",
        "decoder.block.0.layer.0", "decoder.block.0.layer.1", "decoder.block.0.layer.2",
    }  # fmt: skip
    assert model.lm_head.weight.requires_grad
    assert not model.shared.weight.requires_grad


SMALL = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
T5 = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
KNOWN = [
    ("Roberta", SMALL), ("Electra", SMALL), ("DebertaV2", SMALL), ("Camembert", SMALL), ("Mistral", GQA),
    ("Qwen2", GQA), ("Qwen3", GQA), ("Gemma", GQA), ("MT5", T5),
    ("GPTNeo", {"vocab_size": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4,
                "attention_types": [[["global", "local"], 1]]}),
]  # fmt: skip


def built(kind, fields):
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**fields)).eval()


@pytest.mark.parametrize("form", SOME[1:])
@pytest.mark.parametrize(("kind", "fields"), KNOWN)
def test_models_like_these_are_known(kind, fields, form):
    model, x = built(kind, fields), torch.arange(1, 9).reshape(2, 4)
    extra = {"decoder_input_ids": x} if kind == "MT5" else {}
    base = model(x, **extra).last_hidden_state
    shaken(peft_ops.adapt(model, FORMS[form]))
    blocks = 4 if kind == "MT5" else 2
    assert len(adapters(model)) == 4 * blocks * (2 if FORMS[form].mh_adapter else 1)
    out = model(x, **extra).last_hidden_state
    assert not torch.allclose(out, base, rtol=1e-2)
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in adapters(model))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Gemma2", GQA),
        ("Granite", GQA),
        ("OPT", {"vocab_size": 16, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("GPTJ", {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
        ("DistilBert", {"vocab_size": 16, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}),
        ("Albert", {**SMALL, "embedding_size": 8}),
    ],
)
def test_other_blocks_are_refused(kind, fields):
    model = built(kind, fields)
    before = snapshot(model)
    looked_for = "has no block that adapters know; looked for: attention.output .*Llama; .*GPT-2; .*T5"
    with pytest.raises(ValueError, match=rf"model \({kind}Model\) {looked_for}"):
        peft_ops.adapt(model, AdapterConfig())
    assert_as_it_was(model, before)


def test_a_block_known_in_part_is_refused():
    model = built("LongT5", {**T5, "local_radius": 3})
    with pytest.raises(ValueError, match=r"encoder.block.0.layer.0 is of LocalSelfAttention, dropout, layer_norm"):
        peft_ops.adapt(model, AdapterConfig())


def test_a_norm_without_a_weight_is_refused():
    model = built("Olmo", GQA)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm must have a weight \[d\].*; it has none"):
        peft_ops.adapt(model, AdapterConfig())
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert", {"leave_out": [1, 2]}, r"leave_out=\[2\]: the model has blocks 0 to 1"),
        ("bert", {"leave_out": [0, 1]}, r"mh_adapter=True: no block .* that leave_out leaves has a sublayer"),
        ("llama", {"cross_adapter": True}, r"cross_adapter=True: no block of model \(LlamaForCausalLM\) has"),
        ("t5", {"cross_adapter": True, "leave_out": [2, 3]}, r"cross_adapter=True: no block"),
        ("gpt2", {"modules_to_save": ["lm_haed"]}, r"modules_to_save=\['lm_haed'\] matches no module"),
    ],
)
def test_a_failed_adapt_leaves_the_model(name, fields, message):
    model = MODELS[name]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.adapt(model, AdapterConfig(**fields))
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bottleneck": 0}, ValueError, "bottleneck must be at least 1, got 0"),
        ({"bottleneck": 2.0}, TypeError, "bottleneck must be an int, got 2.0"),
        ({"bottleneck": 2, "reduction_factor": 2}, ValueError, "bottleneck and reduction_factor say the same"),
        ({"reduction_factor": 0}, ValueError, "reduction_factor must be above 0, got 0"),
        ({"reduction_factor": {"1": 2}}, TypeError, "reduction_factor must be a number, got {'1': 2}"),
        ({"scaling": "learned"}, TypeError, "scaling must be a number, got 'learned'"),
        ({"scaling": float("nan")}, ValueError, "scaling must be finite, got nan"),
        ({"non_linearity": "sinus"}, ValueError, "non_linearity must be one of .*relu.*, got 'sinus'"),
        ({"init_weights": "zeros"}, ValueError, "init_weights must be one of 'houlsby', .*, got 'zeros'"),
        ({"mh_adapter": 1}, TypeError, "mh_adapter must be True or False, got 1"),
        ({"mh_adapter": False, "output_adapter": False}, ValueError, "no place for an adapter is left"),
        ({"residual_before_ln": "pre"}, ValueError, "residual_before_ln must be one of True, .*, got 'pre'"),
        ({"original_ln_after": False}, ValueError, "would drop the sublayer's residual or add it twice"),
        ({"is_parallel": True, "original_ln_after": False}, ValueError, "would drop the sublayer's residual"),
        ({"original_ln_before": True, "residual_before_ln": False}, ValueError, "would drop .* or add it twice"),
        ({"leave_out": 1}, TypeError, "leave_out must be a list of ints, got 1"),
        ({"leave_out": [-1]}, ValueError, "leave_out must be at least 0, got -1"),
        ({"leave_out": ["1"]}, TypeError, "leave_out must be an int, got '1'"),
        ({"name": "a.b"}, ValueError, "name must be letters, digits, '_' and '-', got 'a.b'"),
        ({"task_type": "POETRY"}, ValueError, "task_type must be None or one of"),
    ],
)
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        AdapterConfig(**fields)


def test_what_an_adapter_cannot_do():
    model = adapted("bert", FORMS["pfeiffer"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="a bottleneck adapter adds to what the model computes and cannot be merged"):
        peft_ops.merge(model)
    with pytest.raises(ValueError, match="a bottleneck adapter has no part that only training needs"):
        peft_ops.eject(model)
    with pytest.raises(ValueError, match="already adapted"):
        peft_ops.adapt(model, AdapterConfig())
    assert_as_it_was(model, before)
