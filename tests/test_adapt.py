"""adapt, merge, adapters_disabled, trainable_parameters on transformers models; and that what fails changes nothing."""

import copy
import pickle
import weakref

import peft
import pytest
import torch
import transformers
from tiny_models import (
    BUILDERS,
    TASKS,
    assert_as_it_was,
    assert_same_bytes,
    bert,
    gpt2,
    labels,
    llama,
    logits,
    snapshot,
    t5,
    tokens,
    train,
)
from torch import nn

import peft_ops
from peft_ops import LoRAConfig, QLoRAConfig
from peft_ops.nn import LoRALinear, NF4Linear, nf4_linear
from peft_ops.tuning.default_targets import DEFAULT_TARGETS

RANDOM = {"r": 4, "init_lora_weights": False}


def adapted_paths(model):
    return {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def test_default_targets_are_those_of_peft():
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {name: targets if isinstance(targets, str) else list(targets) for name, targets in DEFAULT_TARGETS.items()}
    assert ours == theirs


MATCHING = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-linear", "exclude_modules": ["k_proj"], "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": r".*proj", "exclude_modules": r".*layers\.1\..*"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(h|layers)"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    ("bert", {}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
]


@pytest.mark.parametrize(("name", "fields"), MATCHING)
def test_matches_what_peft_matches(name, fields):
    ours, theirs = BUILDERS[name](), BUILDERS[name]()
    peft_ops.adapt(ours, LoRAConfig(r=2, **fields))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, **fields))
    assert adapted_paths(ours) == set(theirs.targeted_module_names)
    count, expected = peft_ops.trainable_parameters(ours), theirs.get_nb_trainable_parameters()
    assert count.trainable == expected[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_match_as_in_peft(rslora):
    fields = {
        "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": rslora,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3, "model.layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 5, r".*\.2\..*": 9},
    }  # fmt: skip
    ours = peft_ops.adapt(llama(), LoRAConfig(**fields))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**fields)).base_model.model
    for path in adapted_paths(ours):
        layer, other = ours.get_submodule(path), theirs.get_submodule(path)
        assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"]), path
    assert {ours.get_submodule(path).r for path in adapted_paths(ours)} == {2, 3, 4}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_trainable(name, bias):
    fields = {"r": 2, "bias": bias, "task_type": TASKS[name]}
    ours = peft_ops.adapt(BUILDERS[name](), LoRAConfig(**fields))
    theirs = peft.get_peft_model(BUILDERS[name](), peft.LoraConfig(**fields)).base_model.model
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    plain = {
        n.replace(".base_layer", "").replace(".modules_to_save.default", "").replace(".default.weight", "")
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert trainable == plain


@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
@pytest.mark.parametrize("name", BUILDERS)
def test_trains(name, config):
    model = peft_ops.adapt(
        BUILDERS[name](), config(r=4, lora_dropout=0.05, target_modules="all-linear", task_type=TASKS[name])
    )
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, steps=12, lr=0.01)
    assert losses[-1] < 0.9 * losses[0]
    for n, p in model.named_parameters():
        assert n not in frozen or torch.equal(p, frozen[n]), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_16_bit_base(dtype):
    model = peft_ops.adapt(llama().to(dtype), LoRAConfig(**RANDOM, target_modules="all-linear"))
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in adapters)
    exact = peft_ops.adapt(llama().to(dtype).float(), LoRAConfig(**RANDOM, target_modules="all-linear"))
    exact.load_state_dict(model.state_dict())
    assert (logits(model).float() - logits(exact)).norm() < 0.03 * logits(exact).norm()


@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
@pytest.mark.parametrize("name", BUILDERS)
def test_autocast(name, config):
    model = peft_ops.adapt(BUILDERS[name](), config(**RANDOM, lora_dropout=0.1, task_type=TASKS[name]))
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model).float() - exact).norm() < 0.05 * exact.norm()
        model.train()(tokens(), labels=labels(model)).loss.backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in adapters)


@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", BUILDERS)
def test_disabled_is_the_base_model(name, bias, config):
    model = BUILDERS[name]()
    base = logits(model)
    saved = {"llama": ["norm"], "gpt2": ["ln_f"], "bert": None}[name]
    peft_ops.adapt(model, config(**RANDOM, bias=bias, modules_to_save=saved, task_type=TASKS[name]))
    if config is QLoRAConfig:
        with peft_ops.adapters_disabled(model):
            base = logits(model)
    train(model)
    trained, state = logits(model), copy.deepcopy(model.state_dict())
    assert not torch.allclose(trained, base)
    with peft_ops.adapters_disabled(model):
        assert torch.equal(logits(model), base)
        with peft_ops.adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    with pytest.raises(KeyError), peft_ops.adapters_disabled(model):
        raise KeyError
    assert torch.equal(logits(model), trained)
    assert_same_bytes(model.state_dict(), state)


def test_disabled_with_merged_layers_and_after_a_move():
    model = llama()
    base = logits(model)
    peft_ops.adapt(model, LoRAConfig(**RANDOM, modules_to_save=["norm"]))
    train(model)
    for path in adapted_paths(model):
        model.get_submodule(path).merge()
    merged = logits(model)
    with peft_ops.adapters_disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    reference = llama().double()
    with peft_ops.adapters_disabled(model.double()):
        assert torch.equal(logits(model), logits(reference))
    assert model.model.norm.weight.requires_grad


@pytest.mark.parametrize("name", BUILDERS)
def test_merge_gives_the_plain_model_back(name):
    model = BUILDERS[name]()
    before = snapshot(model)
    peft_ops.adapt(model, LoRAConfig(**RANDOM, target_modules="all-linear", bias="all", task_type=TASKS[name]))
    train(model)
    adapted = logits(model)
    assert peft_ops.merge(model) is model
    assert snapshot(model)["types"] == before["types"]
    assert model.state_dict().keys() == before["state"].keys()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    peft_ops.adapt(model, LoRAConfig(r=2))
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("requantize", [False, True])
def test_merge_of_a_4_bit_base(requantize):
    model = peft_ops.adapt(llama().bfloat16(), QLoRAConfig(**RANDOM, target_modules=["q_proj"]))
    adapted = logits(model)
    peft_ops.merge(model, requantize=requantize)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear | NF4Linear | LoRALinear)}
    assert kinds == ({nn.Linear, NF4Linear} if requantize else {nn.Linear})
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    error = (logits(model) - adapted).norm() / adapted.norm()
    assert error < (0.2 if requantize else 0.02)


def test_merging_nan_leaves_the_model():
    model = peft_ops.adapt(llama(), LoRAConfig(**RANDOM))
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.lora_A[0, 0] = float("nan")
    before = {name: p for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"model.layers.2.self_attn.v_proj: .*NaN"):
        peft_ops.merge(model)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_merging_a_tied_head_warns_and_spares_the_embedding():
    model = peft_ops.adapt(gpt2(), LoRAConfig(**RANDOM, target_modules=["c_attn", "lm_head"]))
    embedding, adapted = model.transformer.wte.weight.clone(), logits(model)
    with pytest.warns(UserWarning, match="lm_head.weight was tied to transformer.wte.weight"):
        peft_ops.merge(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)


def test_merging_a_tied_embedding_warns_and_spares_the_head():
    model = peft_ops.adapt(gpt2(), LoRAConfig(r=4, target_modules=["wte"]))
    train(model)
    before, head = logits(model), model.lm_head.weight.clone()
    with pytest.warns(UserWarning, match="transformer.wte.weight was tied to lm_head.weight"):
        peft_ops.merge(model)
    assert type(model.transformer.wte) is nn.Embedding
    torch.testing.assert_close(logits(model), before)
    assert torch.equal(model.lm_head.weight, head)


def test_a_shared_embedding_that_is_not_called():
    """T5 and BART call the encoder's and the decoder's embeddings, which share the weight of `shared`."""
    model = t5()
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"shared, .* name encoder.embed_tokens and decoder.embed_tokens, which share"):
        peft_ops.adapt(model, LoRAConfig(target_modules=["shared"]))
    assert_as_it_was(model, before)
    peft_ops.adapt(model, LoRAConfig(target_modules=["embed_tokens"], task_type="SEQ_2_SEQ_LM"))
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(model.get_submodule(f"{half}.embed_tokens").lora_embedding_A.any() for half in ("encoder", "decoder"))


def test_a_saved_tied_head_spares_the_embedding():
    model = gpt2()
    base, embedding = logits(model), model.transformer.wte.weight.clone()
    peft_ops.adapt(model, LoRAConfig(modules_to_save=["lm_head"]))
    train(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    with peft_ops.adapters_disabled(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(logits(model), base)


def test_qlora_quantises_every_linear_layer_but_the_head():
    model = peft_ops.adapt(llama(), QLoRAConfig(r=2, target_modules=["q_proj"], double_quant=False))
    assert type(model.lm_head) is nn.Linear
    layer = model.model.layers[1]
    assert isinstance(layer.self_attn.q_proj, LoRALinear)
    assert layer.self_attn.q_proj.packed.dtype == torch.uint8
    assert all(type(m) is NF4Linear for m in (layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj))
    dense = peft_ops.adapt(llama(), LoRAConfig(r=2, target_modules=["q_proj"]))
    assert peft_ops.trainable_parameters(model) == peft_ops.trainable_parameters(dense)
    classifier = peft_ops.adapt(bert(), QLoRAConfig(r=2))
    assert type(classifier.classifier) is nn.Linear
    assert isinstance(classifier.bert.pooler.dense, NF4Linear)


def test_qlora_of_conv1d():
    model = gpt2()
    base = logits(model)
    peft_ops.adapt(model, QLoRAConfig(r=2, target_modules=["c_attn"]))
    assert model.transformer.h[0].attn.c_attn.weight.shape == (96, 32)
    assert type(model.lm_head) is nn.Linear
    assert 0 < (logits(model) - base).norm() / base.norm() < 0.3


def test_lora_on_a_model_of_nf4_layers():
    model = peft_ops.adapt(llama(), QLoRAConfig(r=2, target_modules="all-linear"))
    peft_ops.merge(model, requantize=True)
    base = logits(model)
    peft_ops.adapt(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert torch.equal(logits(model), base)
    assert all(hasattr(model.get_submodule(path), "packed") for path in adapted_paths(model))


def test_qlora_holds_one_dense_weight_at_a_time(monkeypatch):
    model = llama()
    dense = [
        weakref.ref(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    alive = []

    def counting(*args):
        alive.append(sum(ref() is not None for ref in dense))
        return quantize(*args)

    quantize = nf4_linear.nf4.quantize
    monkeypatch.setattr(nf4_linear.nf4, "quantize", counting)
    peft_ops.adapt(model, QLoRAConfig(r=2, target_modules=["q_proj"]))
    assert alive == list(range(len(dense), 0, -1))
    assert not any(ref() for ref in dense)


def test_qlora_on_meta_is_filled_by_a_state_dict():
    config = QLoRAConfig(**RANDOM, target_modules="all-linear")
    model = peft_ops.adapt(llama().bfloat16(), config)
    empty = peft_ops.adapt(llama().bfloat16().to("meta"), config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same_bytes(empty.state_dict(), model.state_dict())


@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
def test_copies_are_exact(config):
    model = peft_ops.adapt(bert(), config(**RANDOM, bias="all", task_type="SEQ_CLS"))
    train(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bytes(other.state_dict(), model.state_dict())
        assert torch.equal(logits(other), logits(model))
        with peft_ops.adapters_disabled(other), peft_ops.adapters_disabled(model):
            assert torch.equal(logits(other), logits(model))
        assert other.classifier.weight is not model.classifier.weight


def test_casting_a_qlora_model_leaves_the_bytes():
    model = peft_ops.adapt(llama(), QLoRAConfig(r=2))
    stored = {n: t.clone() for n, t in model.state_dict().items() if "packed" in n or "absmax" in n or "nested" in n}
    model.to(torch.bfloat16)
    state = model.state_dict()
    assert_same_bytes({name: state[name] for name in stored}, stored)
    assert logits(model).dtype == torch.bfloat16


def gradients(model):
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    model(tokens(), labels=labels(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, config, before):
    fields = {**RANDOM, "lora_dropout": 0.3, "target_modules": "all-linear"}
    plain = peft_ops.adapt(llama(), config(**fields))
    model, options = llama(), {"use_reentrant": reentrant}
    if before:  # adapt sees it and makes the embeddings' output require a gradient
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model = peft_ops.adapt(model, config(**fields))
    if not before:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    model.load_state_dict(plain.state_dict())
    expected, actual = gradients(plain), gradients(model)
    assert actual.keys() == expected.keys() == {n for n, p in plain.named_parameters() if p.requires_grad}
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(actual[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("config", [LoRAConfig, QLoRAConfig])
def test_hooks_stay_where_they_were_hung(config):
    model, seen = llama(), []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, out: seen.append(type(module))
    )
    peft_ops.adapt(model, config(r=2, target_modules=["up_proj"]))
    logits(model)
    peft_ops.merge(model)
    logits(model)
    handle.remove()
    logits(model)
    assert len(seen) == 2
    assert issubclass(seen[0], LoRALinear)
    assert seen[1] is nn.Linear


def test_a_patched_forward_is_refused():
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="got Linear whose forward was replaced"):
        peft_ops.adapt(model, LoRAConfig(target_modules=["up_proj"]))


def test_counts():
    model = llama()
    total = sum(p.numel() for p in model.parameters())
    assert peft_ops.trainable_parameters(model) == type(peft_ops.trainable_parameters(model))(total, total, 1.0)
    peft_ops.adapt(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    count = peft_ops.trainable_parameters(model)
    assert (count.trainable, count.total) == (3 * 2 * (32 + 32), total + 384)
    assert count.share == 384 / (total + 384)
    assert str(count) == f"384 of {total + 384:,} parameters are trainable ({count.share:.4%})"


def test_config_is_left_alone():
    config = LoRAConfig(modules_to_save=["norm"], task_type="TOKEN_CLS")
    peft_ops.adapt(llama(), config)
    assert config == LoRAConfig(modules_to_save=["norm"], task_type="TOKEN_CLS")


def with_infinity(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    return model


def in_double(model):
    return model.double()


def unknown(model):
    model.config.model_type = "unheard-of"
    return model


def with_attention(model):
    model.attention = nn.MultiheadAttention(8, 2)
    return model


def with_max_norm(model):
    model.model.embed_tokens.max_norm = 2.0
    return model


def with_own_embedding(model):
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    model.model.embed_tokens = OPTLearnedPositionalEmbedding(64, 32)
    return model


BAD = [
    ({"target_modules": ["q_porj"]}, None, ValueError, r"target_modules=\[q_porj\] matches no module.*q_proj"),
    ({"target_modules": "q_proj"}, None, ValueError, r"matches no module; near names: q_proj"),
    ({"target_modules": ["zzz"]}, None, ValueError, "linear layers are named down_proj, gate_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, None, ValueError, r"no module in layers \[9\]"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, None, ValueError, "exclude_modules"),
    ({"target_modules": ["q_proj", "self_attn"]}, None, TypeError, "self_attn, which .* got LlamaAttention"),
    ({"target_modules": ["norm"]}, None, TypeError, "model.norm, which .* got LlamaRMSNorm"),
    ({"target_modules": ["embed_tokens"]}, with_max_norm, ValueError, "embed_tokens, which .* max_norm=2.0"),
    ({"target_modules": ["embed_tokens"]}, with_own_embedding, TypeError, "embed_tokens, which .* OPTLearnedPos"),
    ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, None, ValueError, "embed_tokens, .* use_dora"),
    ({"modules_to_save": ["nrom"]}, None, ValueError, r"modules_to_save=\['nrom'\] matches no module"),
    ({"modules_to_save": ["_proj"]}, None, ValueError, "which modules_to_save=.* trains whole"),
    ({}, unknown, ValueError, "no default for model_type 'unheard-of'.*down_proj, gate_proj"),
    ({"target_modules": ["q_proj", "out_proj"]}, with_attention, ValueError, "attention.out_proj, whose weight"),
]
BAD_QUANTISING = [
    ({"target_modules": ["q_proj"]}, with_infinity, ValueError, "model.layers.1.mlp.up_proj.weight holds NaN"),
    ({"target_modules": ["q_proj"]}, in_double, TypeError, r"q_proj.weight must be float32.* got torch.float64"),
]


@pytest.mark.parametrize(
    ("config", "fields", "spoil", "error", "message"),
    [(LoRAConfig, *case) for case in BAD] + [(QLoRAConfig, *case) for case in BAD + BAD_QUANTISING],
)
def test_a_failed_adapt_leaves_the_model(config, fields, spoil, error, message):
    model = llama()
    model = spoil(model) if spoil else model
    model.model.embed_tokens.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.adapt(model, config(**fields))
    assert_as_it_was(model, before)


def test_adapting_twice():
    model = peft_ops.adapt(llama(), LoRAConfig())
    before = snapshot(model)
    with pytest.raises(ValueError, match="already adapted"):
        peft_ops.adapt(model, LoRAConfig())
    with pytest.raises(ValueError, match="already adapted"):
        peft_ops.adapt(nn.Sequential(model), LoRAConfig(target_modules=["up_proj"]))
    assert_as_it_was(model, before)
    with pytest.raises(ValueError, match=r"already adapted .*by peft"):
        peft_ops.adapt(peft.get_peft_model(llama(), peft.LoraConfig()), LoRAConfig())


def test_not_adapted():
    for call in (peft_ops.merge, lambda m: peft_ops.adapters_disabled(m).__enter__()):
        with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\) has no adapters"):
            call(llama())


def test_wrong_types():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        peft_ops.adapt({}, LoRAConfig())
    with pytest.raises(TypeError, match="config must be one of .*LoRAConfig.*, got LoraConfig"):
        peft_ops.adapt(llama(), peft.LoraConfig())


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"rank_pattern": {"k_proj": 3}}, r"rank_pattern\['k_proj'\] matches none"),
        ({"alpha_pattern": {"k_proj": 3}}, r"alpha_pattern\['k_proj'\] matches none"),
        ({"exclude_modules": ["nothing"]}, r"exclude_modules=\['nothing'\] matches no module"),
    ],
)
def test_what_has_no_effect_warns(fields, warning):
    with pytest.warns(UserWarning, match=warning):
        peft_ops.adapt(llama(), LoRAConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"lora_dropout": 2}, ValueError, r"lora_dropout must be in \[0, 1\], got 2"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\].* at least 1, got 0"),
        ({"rank_pattern": {"(": 2}}, ValueError, r"rank_pattern '\(' is not a regular expression"),
        ({"rank_pattern": ["q"]}, TypeError, "rank_pattern must be a dict"),
        ({"alpha_pattern": {"q": "x"}}, TypeError, r"alpha_pattern\['q'\].* must be a number"),
        ({"target_modules": "("}, ValueError, "target_modules '.' is not a regular expression"),
        ({"target_modules": 3}, TypeError, "target_modules must be a string, a list of strings or None, got 3"),
        ({"target_modules": [3]}, TypeError, r"target_modules must be .* got \[3\]"),
        ({"modules_to_save": "norm"}, TypeError, "modules_to_save must be a list of strings or None, got 'norm'"),
        ({"modules_to_save": ["norm("]}, ValueError, r"modules_to_save 'norm\(' is not a regular expression"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be an int or a list of ints, got '1'"),
        ({"target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform cannot be used"),
        ({"target_modules": "a", "layers_pattern": "h"}, ValueError, "layers_pattern cannot be used"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern needs layers_to_transform"),
        ({"bias": "some"}, ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"task_type": "POETRY"}, ValueError, "task_type must be None or one of .*, got 'POETRY'"),
        ({"init_lora_weights": "olora"}, ValueError, "init_lora_weights must be .*, got 'olora'"),
        ({"lora_bias": True}, ValueError, "lora_bias=True is not supported"),
        ({"target_parameters": ["w"]}, ValueError, "target_parameters=.* is not supported"),
        ({"trainable_token_indices": [1]}, ValueError, "trainable_token_indices=.* is not supported"),
        ({"layer_replication": [(0, 1)]}, ValueError, "layer_replication=.* is not supported"),
    ],
)
def test_bad_configs(fields, error, message):
    for config in (LoRAConfig, QLoRAConfig):
        with pytest.raises(error, match=message):
            config(**fields)


def test_bad_blocksize():
    with pytest.raises(ValueError, match=r"blocksize must be one of 32, .*, got 100"):
        QLoRAConfig(blocksize=100)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("build", "targets", "r", "count"),
    [
        (lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig()), ["query", "value"], 8, 294_912),
        (
            lambda: transformers.RobertaForMaskedLM(
                transformers.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
            ),
            ["query", "value"], 8, 786_432,
        ),
        (
            lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
            ["c_attn"], 4, 393_216,
        ),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_paper(build, targets, r, count):
    """LoRA, 2021, tables 2 and 3: RoBERTa base and large, GPT-2 medium."""
    with torch.device("meta"):
        model = build()
    assert (
        peft_ops.trainable_parameters(peft_ops.adapt(model, LoRAConfig(r=r, target_modules=targets))).trainable == count
    )
