"""How models with prefixes behave: training, checkpointing, generation, copies, the base model for a while."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from prefix_models import (
    BUILDERS,
    TASK,
    N,
    adapted,
    inputs,
    loss_of,
    outputs,
    prefixes,
    trained,
)  # fmt: skip
from tiny_models import assert_as_it_was, snapshot, tokens

import peft_ops
from numerics import assert_as_accurate
from peft_ops import PrefixTuningConfig, PTuningV2Config
from peft_ops.nn import NF4Linear
from peft_ops.nn.prefix import ProjectedPrefix
from peft_ops.tuning.matching import linear_paths

FOUR = ("llama", "gpt2", "bert", "t5")
METHODS = {
    "prefix": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 12},
    "v2": {"config": PTuningV2Config},
}


@pytest.mark.parametrize("name", FOUR)
def test_ejecting_keeps_the_outputs(name):
    model = adapted(name, **METHODS["projected"])
    assert any(isinstance(m, ProjectedPrefix) for m in model.modules())
    before = outputs(model, name)
    assert peft_ops.eject(model) is model
    torch.testing.assert_close(outputs(model, name), before, rtol=1e-5, atol=1e-5)
    assert {name.rpartition(".")[2] for name in trained(model) if "peft" in name} == {"key", "value"}
    assert not hasattr(model, "peft_prefix_encoders")
    loss_of(model.train(), name).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained(model).items() if "peft" in n)
    before = snapshot(model)
    with pytest.raises(ValueError, match="nothing to eject"):
        peft_ops.eject(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        peft_ops.merge(model)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FOUR)
def test_training_lowers_the_loss_and_leaves_the_base(name, method):
    model = adapted(name, **METHODS[method])
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = loss_of(model.train(), name)
        loss.backward()
        if not losses:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    head = [n for n in trained(model) if "peft" not in n]
    assert head == (["classifier.weight", "classifier.bias"] if name == "bert" else [])


def gradients(model, name):
    torch.manual_seed(5)
    model.zero_grad()
    loss_of(model.train(), name).backward()
    return {n: p.grad.clone() for n, p in trained(model).items()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["later", "before"])
@pytest.mark.parametrize("method", ["projected", "v2"])
@pytest.mark.parametrize("name", FOUR)
def test_gradient_checkpointing_gives_the_same_gradients(name, method, first, reentrant):
    fields = {"dropout": 0.5, "task_type": TASK[name], "num_virtual_tokens": N, **METHODS[method]}
    kind = fields.pop("config", PrefixTuningConfig)
    whole, model = (BUILDERS[name]() for _ in range(2))
    peft_ops.adapt(whole, kind(**fields))
    on = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if first:
        model.gradient_checkpointing_enable(**on)
    peft_ops.adapt(model, kind(**fields)).load_state_dict(whole.state_dict())
    if not first:
        model.gradient_checkpointing_enable(**on)
        model.enable_input_require_grads()
    expected = gradients(whole, name)
    for key, gradient in gradients(model, name).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_dropout_is_of_training_only_and_differs_between_rows():
    model = adapted("llama", dropout=0.5)
    twice = tokens(batch=1).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(model(twice).logits, adapted_like(model, dropout=0.0)(twice).logits)
        rows = model.train()(twice).logits
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def adapted_like(model, **fields):
    other = adapted("llama", **fields)
    other.load_state_dict(model.state_dict())
    return other


GENERATE = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generating_with_a_cache_equals_one_forward(name, how):
    model, given = adapted(name), {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    out = model.generate(
        **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, **GENERATE[how],
    )  # fmt: skip
    sequences = out.sequences
    if how == "beam":  # the scores of the best beam are those of a forward over it
        assert sequences.shape[1] >= 6
        cacheless = model.generate(
            **given, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=3, use_cache=False
        )
        assert torch.equal(sequences, cacheless)
        return
    step = torch.stack(out.logits, 1)
    with torch.no_grad():
        if name in ("t5", "bart"):
            whole = model(**given, decoder_input_ids=sequences[:, :-1]).logits
        else:
            whole = model(sequences[:, :-1], attention_mask=torch.ones_like(sequences[:, :-1])).logits[:, 8:]
    torch.testing.assert_close(step, whole[:, -step.shape[1] :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_generates_what_the_row_alone_does(name):
    model, given = adapted(name), inputs(name, padded=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    both = model.generate(**given, **options)
    alone = model.generate(given["input_ids"][1:, 3:], attention_mask=given["attention_mask"][1:, 3:], **options)
    assert torch.equal(both[1, 9:], alone[0, 6:])


@pytest.mark.parametrize("name", [*FOUR, "roberta", "bart"])
def test_disabled_it_is_the_base_to_the_bit(name):
    base = BUILDERS[name]()
    expected, model = outputs(base, name, padded=True), adapted(name)
    with_prefix = outputs(model, name, padded=True)
    assert not torch.allclose(with_prefix, expected, atol=1e-2)
    with peft_ops.adapters_disabled(model), peft_ops.adapters_disabled(model):
        assert torch.equal(outputs(model, name, padded=True), expected)
    with pytest.raises(KeyError), peft_ops.adapters_disabled(model):
        raise KeyError
    assert torch.equal(outputs(model, name, padded=True), with_prefix)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_backbone_alone_has_the_prefix_too(name):
    model, ids = adapted(name), tokens()
    with torch.no_grad():
        if name == "t5":
            hidden = model.encoder(ids).last_hidden_state
            whole = model(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state
        else:
            hidden = model.base_model(ids).last_hidden_state
            whole = model(ids, output_hidden_states=True).hidden_states[-1]
        embedded = model(
            inputs_embeds=model.get_input_embeddings()(ids), **({"decoder_input_ids": ids} if name == "t5" else {})
        )
        plain = model(input_ids=ids, **({"decoder_input_ids": ids} if name == "t5" else {}))
    torch.testing.assert_close(hidden, whole)
    torch.testing.assert_close(embedded.logits, plain.logits)
    assert hidden.shape == (2, 9, 32)


@pytest.mark.parametrize("name", FOUR)
def test_eager_equals_sdpa_and_may_be_set_later(name):
    model = adapted(name)
    expected = outputs(model, name, padded=True)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    torch.testing.assert_close(outputs(model, name, padded=True), expected, rtol=1e-4, atol=1e-4)
    base = BUILDERS[name]()
    base.set_attn_implementation("eager")
    with peft_ops.adapters_disabled(model):
        assert torch.equal(outputs(model, name, padded=True), outputs(base, name, padded=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_copies_are_independent(name, method):
    model = adapted(name, **METHODS[method])
    expected = outputs(model, name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    other = adapted(name, **METHODS[method])
    other.load_state_dict(model.state_dict())
    for twin in [*copies, other]:
        assert torch.equal(outputs(twin, name), expected)
        with torch.no_grad():
            next(iter(trained(twin).values())).add_(1.0)
        assert not torch.equal(outputs(twin, name), expected)
        with peft_ops.adapters_disabled(twin):
            assert torch.equal(outputs(twin, name), outputs(BUILDERS[name](), name))
    assert torch.equal(outputs(model, name), expected)


def test_a_model_pickled_by_another_process_registers_itself(tmp_path):
    torch.save(adapted("llama"), tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "model(torch.tensor([[1, 2]])).logits.sum().backward()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["prefix", "projected"])
def test_float32_beside_a_16_bit_base(method):
    model = adapted("llama", **METHODS[method])
    exact, low = copy.deepcopy(model).double(), BUILDERS["llama"]().bfloat16()
    low = peft_ops.adapt(low, PrefixTuningConfig(num_virtual_tokens=N, **METHODS[method]))
    kinds = {p.dtype for p in trained(low).values()}
    assert kinds == {torch.float32}
    low.load_state_dict({**model.state_dict()})
    plain = copy.deepcopy(model).bfloat16()
    for twin in (exact, low, plain):
        loss_of(twin.train(), "llama").backward()
    assert low(tokens()).logits.dtype == torch.bfloat16
    for key, truth in trained(exact).items():
        assert trained(low)[key].grad.dtype == torch.float32
        theirs = trained(plain)[key].grad.float()
        assert_as_accurate(key, trained(low)[key].grad, theirs, truth.grad, times=3)


def test_other_dtypes_and_autocast():
    model = adapted("llama", **METHODS["projected"])
    expected = outputs(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        low = outputs(model, "llama")
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.3)
    torch.testing.assert_close(outputs(model.double(), "llama").float(), expected, rtol=1e-4, atol=1e-4)


def saved_for_backward(model, name):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(model.train(), name)
    return kept


def test_no_joined_keys_are_saved():
    """Of every layer: nothing of n + S keys, and beside references less than a row of the prefix for every token."""
    model = adapted("gpt2")
    kept = saved_for_backward(model, "gpt2")
    lengths = {size for tensor in kept for size in tensor.shape}
    assert N + 9 not in lengths
    assert 9 in lengths
    prefix_sized = [t for t in kept if t.dim() == 4 and t.shape[2] == N]
    assert not prefix_sized  # never [B, heads, n, D]
    own = {p.untyped_storage().data_ptr() for p in trained(model).values()}
    references = [t for t in kept if N in t.shape and t.untyped_storage().data_ptr() in own]
    assert len(references) == 2 * 2  # the parameters themselves, K and V of two layers


def test_a_text_longer_than_the_positions_left():
    model = adapted("gpt2")
    with torch.no_grad():
        model(tokens(length=28))
        with pytest.raises(ValueError, match="at most 28 tokens: the model has 32 positions .* takes 4, got 29 tokens"):
            model(tokens(length=29))
        with pytest.raises(ValueError, match="got 29 tokens"):
            model.generate(tokens(length=28), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
        with pytest.raises(ValueError, match="got 29 tokens"):
            model.transformer(inputs_embeds=torch.zeros(1, 29, 32))
    with peft_ops.adapters_disabled(model), torch.no_grad():
        model(tokens(length=32))


def test_attention_weights_are_not_silently_left_out():
    model = adapted("bert")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(tokens(), output_attentions=True)
    with peft_ops.adapters_disabled(model):
        assert len(model(tokens(), output_attentions=True).attentions) == 2


def test_zero_starts_from_zero_and_trains():
    for fields in ({}, METHODS["projected"]):
        model = adapted("llama", init_weights="zero", **fields)
        for prefix in prefixes(model).values():
            assert not any(t.any() for t in prefix())
        loss_of(model.train(), "llama").backward()
        assert any(p.grad.abs().sum() > 0 for p in trained(model).values())


def test_adapting_twice_is_refused():
    model = adapted("llama")
    with pytest.raises(ValueError, match="already adapted"):
        peft_ops.adapt(model, PrefixTuningConfig())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_is_captured_whole(name):
    model, given = adapted(name), inputs(name)
    torch.compiler.reset()
    captured = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():  # captured, attention is torch's
        torch.testing.assert_close(captured(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4_bit_base(double_quant):
    quantised = BUILDERS["llama"]()
    for path in linear_paths(quantised):
        if path != "lm_head":
            layer = NF4Linear.from_linear(quantised.get_submodule(path), 32, double_quant)
            quantised.set_submodule(path, layer)
    config = PrefixTuningConfig(num_virtual_tokens=N, **METHODS["projected"])
    model = peft_ops.adapt(copy.deepcopy(quantised), config)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    dense = BUILDERS["llama"]()
    for path in linear_paths(quantised):
        if path != "lm_head":
            weight = peft_ops.nf4.dequantize(quantised.get_submodule(path).weight)
            dense.get_submodule(path).weight.data.copy_(weight)
    peft_ops.adapt(dense, config).load_state_dict(trained(model), strict=False)
    torch.testing.assert_close(outputs(model, "llama"), outputs(dense, "llama"), rtol=1e-4, atol=1e-4)
    loss_of(model.train(), "llama").backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model).values())
