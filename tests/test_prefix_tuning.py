"""Prefix-tuning and P-tuning v2: what they compute, against formulas written out, and what is refused."""

import inspect
import math

import pytest
import torch
import transformers
from prefix_models import (
    BUILDERS,
    N,
    adapted,
    inputs,
    of,
    outputs,
    prefixes,
    qwen3,
    trained,
)  # fmt: skip
from tiny_models import assert_as_it_was, bert, gpt2, llama, snapshot, t5, tokens
from transformers.cache_utils import DynamicCache

import peft_ops
from numerics import assert_as_accurate
from peft_ops import PrefixTuningConfig, PTuningV2Config
from peft_ops.nn.prefix import Prefix

FOUR = ("llama", "gpt2", "bert", "t5")
METHODS = {
    "prefix": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 12},
    "v2": {"config": PTuningV2Config},
}


def attention_written_out(q, k, v, pk, pv, scaling, bias=0.0, prefix_bias=0.0):
    """softmax over the joined scores, [B, H, T, D]; heads of keys repeated for groups of queries."""
    groups = q.shape[1] // pk.shape[0]
    keys, values = (
        torch.cat([p[None].expand(len(q), -1, -1, -1), t], 2).repeat_interleave(groups, 1)
        for p, t in ((pk, k), (pv, v))
    )
    scores = q @ keys.mT * scaling
    scores = torch.cat([scores[..., :N] + prefix_bias, scores[..., N:] + bias], -1)
    return scores.softmax(-1) @ values


def seen_by(module, call):
    """(keyword arguments, output) of a module's forward while call() runs."""
    found = {}
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: found.update(given=dict(zip(names, args, strict=False)) | kwargs, out=out[0]),
        with_kwargs=True,
    )
    try:
        call()
    finally:
        handle.remove()
    return found["given"], found["out"]


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def test_a_layer_of_bert_is_attention_over_prefix_and_text():
    model = adapted("bert")
    layer = model.bert.encoder.layer[1].attention.self
    given, out = seen_by(layer, lambda: outputs(model, "bert"))
    x, prefix = given["hidden_states"], layer.peft_prefix
    q, k, v = (heads(projection(x), 4) for projection in (layer.query, layer.key, layer.value))
    expected = attention_written_out(q, k, v, prefix.key, prefix.value, 8**-0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def bucket(distance, bidirectional, buckets=32, furthest=128):
    """T5's bucket of key position − query position, for one number (Raffel et al., 2020; Mesh TensorFlow)."""
    start = 0
    if bidirectional:
        buckets //= 2
        start, distance = (buckets, distance) if distance > 0 else (0, -distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    far = exact + int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


@pytest.mark.parametrize("place", ["encoder", "cross", "decoder"])
def test_a_layer_of_t5_has_the_bias_of_the_prefixs_positions(place):
    model = adapted("t5")
    stack = model.encoder if place == "encoder" else model.decoder
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    block = stack.block[1].layer
    layer = block[1].EncDecAttention if place == "cross" else block[0].SelfAttention
    given, out = seen_by(layer, lambda: outputs(model, "t5"))
    x, prefix = given["hidden_states"], layer.peft_prefix
    other = given["key_value_states"] if place == "cross" else x
    q, k, v = heads(layer.q(x), 4), heads(layer.k(other), 4), heads(layer.v(other), 4)
    bias, prefix_bias, length = 0.0, 0.0, x.shape[1]
    if place != "cross":
        both = place == "encoder"
        rows = [[bucket(j - (N + i), both) for j in range(N + length)] for i in range(length)]
        whole = table[torch.tensor(rows)].permute(2, 0, 1)
        prefix_bias, bias = whole[..., :N], whole[..., N:]
    if place == "decoder":
        bias = bias.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = attention_written_out(q, k, v, prefix.key, prefix.value, 1.0, bias, prefix_bias)
    expected = layer.o(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_equals_transformers_with_the_prefix_in_its_cache(name, padded):
    model, base, given = adapted(name), BUILDERS[name](), inputs(name, padded)
    rows = [(p.key.expand(2, -1, -1, -1), p.value.expand(2, -1, -1, -1)) for p in prefixes(model).values()]
    mask = torch.cat([torch.ones(2, N, dtype=torch.long), given["attention_mask"]], 1)
    positions = torch.arange(9)[None] + N
    with torch.no_grad():
        joined = base(
            input_ids=given["input_ids"],
            attention_mask=mask,
            past_key_values=DynamicCache(rows),
            position_ids=positions,
        ).logits
    expected = joined[given["attention_mask"].bool()] if padded else joined.flatten(0, 1)
    torch.testing.assert_close(outputs(model, name, padded), expected, rtol=1e-5, atol=2e-5)
    moved = outputs(model, name, padded, position_ids=torch.arange(9)[None])  # the text's own positions start at 0
    assert torch.equal(moved, outputs(model, name, padded))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox", "qwen3"])
def test_from_a_text_a_causal_model_starts_as_behind_it(name):
    text = [7, 3, 11, 5]
    model = adapted(name, init_token_ids=text)
    given = torch.cat([torch.tensor([text, text]), tokens()], 1)
    with torch.no_grad():
        expected = BUILDERS[name]()(given).logits[:, N:]
        plain = BUILDERS[name]()(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=0.1)


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_from_a_text_every_place_has_keys_of_its_own(name, implementation):
    base = BUILDERS[name]()
    base.set_attn_implementation(implementation)
    before = snapshot(base.train())
    ids = [7, 3, 11, 5]
    config = PrefixTuningConfig(num_virtual_tokens=N, init_token_ids=ids)
    plan = peft_ops.tuning.methods.plan(base, config)
    assert_as_it_was(base, before)
    assert base.config._attn_implementation == implementation
    model = peft_ops.adapt(base, config)
    if name == "bert":
        layer = model.bert.encoder.layer[0].attention.self
        with peft_ops.adapters_disabled(model):
            x = model.eval().bert.embeddings(torch.tensor([ids]))
        torch.testing.assert_close(layer.peft_prefix.key, heads(layer.key(x), 4)[0])
    keys = torch.stack([prefix.key for prefix in prefixes(model).values()])
    assert (keys.flatten(1).std(1) > 0.01).all()
    assert len({tuple(key.flatten().tolist()) for key in keys}) == len(plan.sites)


def test_an_encoder_is_the_authors_mlp():
    model = adapted("t5", **METHODS["projected"], places=["encoder", "decoder"])
    for place in ("encoder", "decoder"):
        trunk = model.peft_prefix_encoders[place]
        table, first = trunk.embedding.weight, trunk.linear
        assert table.shape == (N, 32)
        assert first.weight.shape == (12, 32)
        for path, prefix in prefixes(model).items():
            if not path.startswith(place):
                continue
            row = torch.tanh(table @ first.weight.T + first.bias) @ prefix.linear.weight.T + prefix.linear.bias
            key, value = prefix()
            torch.testing.assert_close(key, row[:, :32].view(N, 4, 8).transpose(0, 1))
            torch.testing.assert_close(value, row[:, 32:].view(N, 4, 8).transpose(0, 1))


def count(model):
    return sum(p.numel() for p in trained(model).values())


def test_parameters_of_the_papers():
    with torch.device("meta"):
        medium = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        config = transformers.RobertaConfig(
            **large, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
        )
        of_eight = transformers.RobertaForSequenceClassification(config)
        of_more = transformers.RobertaForSequenceClassification(config)
    model = peft_ops.adapt(
        medium, PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=512)
    )
    assert count(model) == 5 * 1024 + (1024 * 512 + 512) + (512 * 2 * 24 * 1024 + 2 * 24 * 1024)
    assert count(peft_ops.eject(model)) == 245_760
    head = sum(p.numel() for p in of_eight.classifier.parameters())
    for model, psl, expected in ((of_eight, 8, 393_216), (of_more, 128, 6_291_456)):
        peft_ops.adapt(model, PTuningV2Config(num_virtual_tokens=psl, task_type="SEQ_CLS"))
        assert count(model) == expected + head
        total = sum(p.numel() for p in model.parameters())
        assert total - head - expected == 355_359_744 - (1024 * 1024 + 1024)  # the paper counts RoBERTa's pooler


def test_the_whole_window_sees_the_prefix():
    """A sliding window is over the text: its last token, far from the start, attends to the prefix too."""
    mistral = of(
        "MistralForCausalLM", "MistralConfig", num_key_value_heads=2, max_position_embeddings=64, sliding_window=3
    )
    model = peft_ops.adapt(mistral(), PrefixTuningConfig(num_virtual_tokens=N))
    layer = model.model.layers[0].self_attn
    given, out = seen_by(layer, lambda: model(tokens(length=12)))
    x, prefix = given["hidden_states"], layer.peft_prefix
    cos, sin = given["position_embeddings"]
    q, k, v = heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2), heads(layer.v_proj(x), 2)
    turn = lambda t: t * cos[:, None] + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin[:, None]
    rows = torch.arange(12)
    outside = (rows[None] > rows[:, None]) | (rows[None] <= rows[:, None] - 3)
    bias = torch.zeros(12, 12).masked_fill(outside, -torch.inf)
    expected = attention_written_out(turn(q), turn(k), v, prefix.key, prefix.value, 8**-0.5, bias)
    torch.testing.assert_close(out, layer.o_proj(expected.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-5)


REFUSED = {
    "more tokens than positions": (gpt2, {"num_virtual_tokens": 32}, "below the model's 32 positions, got 32"),
    "of rotary positions": (llama, {"num_virtual_tokens": 40}, "below the model's 32 positions, got 40"),
    "padding rows are none": (BUILDERS["roberta"], {"num_virtual_tokens": 32}, "below the model's 32 positions"),
    "no interface": (
        of("BloomForCausalLM", "BloomConfig", n_layer=1, n_head=4),
        {},
        "BloomForCausalLM has no attention .* AttentionInterface",
    ),
    "softcap": (
        of("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, num_key_value_heads=2),
        {},
        r"layers.0.self_attn .Gemma2Attention.: attention with attn_logit_softcapping",
    ),
    "latent attention": (
        of("DeepseekV3ForCausalLM", "DeepseekV3Config", q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
           qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1),
        {},
        "shape of its keys is not recognised",
    ),
    "an encoder of sounds": (
        of("WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=1, decoder_layers=1,
           encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=0, max_target_positions=32),
        {},
        "model.encoder takes no tokens .* leave 'encoder' out of places",
    ),
    "token ids": (llama, {"init_token_ids": [1, 2, 3, 64]}, r"vocabulary's 64, got \[64\]"),
    "nothing to save": (llama, {"modules_to_save": ["heads"]}, r"\['heads'\] matches no module"),
    "a trained bias": (
        t5,
        {"modules_to_save": ["encoder.block.0.layer.0.SelfAttention"]},
        "relative_attention_bias.weight: it gets no gradient",
    ),
    "no such place": (bert, {"places": ["cross"]}, None),
    "a plain module": (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), {}, "Sequential has no attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_it_is_not_defined_for(case):
    build, fields, message = REFUSED[case]
    model = build()
    config = PrefixTuningConfig(**{"num_virtual_tokens": N, **fields})
    if message is None:  # places are of encoder-decoder models
        peft_ops.adapt(model, config)
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.adapt(model, config)
    assert_as_it_was(model, before)


def test_flash_attention_is_refused_by_name():
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    before = snapshot(model)
    with pytest.raises(ValueError, match="must be one of sdpa, eager .*got 'flash_attention_2'"):
        peft_ops.adapt(model, PrefixTuningConfig())
    assert_as_it_was(model, before)
    later = adapted("llama")
    later.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="must be one of sdpa, eager .*got 'flash_attention_2'"):
        later.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.zeros(1, 2, 8),) * 2, attention_mask=None
        )


def test_another_model_around_one_is_refused():
    model = torch.nn.Sequential(llama())
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Sequential around one"):
        peft_ops.adapt(model, PrefixTuningConfig())


def test_positions_counted_in_the_mask_alone_are_refused():
    model = adapted("opt")
    with pytest.raises(ValueError, match="OPTLearnedPositionalEmbedding needs position_ids"):
        model.model.decoder.embed_positions(torch.ones(1, 3, dtype=torch.long))


def test_unknown_positions_are_refused():
    model = llama()
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="model: no position embedding recognised"):
        peft_ops.adapt(model, PrefixTuningConfig())


BAD = [
    ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be at least 1, got 0"),
    ({"num_virtual_tokens": 2.0}, TypeError, "num_virtual_tokens must be an int"),
    ({"prefix_projection": 1}, TypeError, "prefix_projection must be a bool"),
    ({"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size must be at least 1"),
    ({"init_weights": "one"}, ValueError, "init_weights must be one of None, 'zero', got 'one'"),
    ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
    ({"places": "encoder"}, TypeError, "places must be a list"),
    ({"places": ["middle"]}, ValueError, "places must be one of 'encoder', 'cross', 'decoder', got 'middle'"),
    ({"places": []}, ValueError, "places must have at least one"),
    ({"init_token_ids": "text"}, TypeError, "init_token_ids must be a list of ints"),
    ({"init_token_ids": [1, 2]}, ValueError, "must be num_virtual_tokens=20 ids, got 2"),
    ({"init_token_ids": [1] * 20, "prefix_projection": True}, ValueError, "cannot go with prefix_projection=True"),
    ({"init_token_ids": [1] * 20, "init_weights": "zero"}, ValueError, "cannot go with init_weights='zero'"),
    ({"task_type": "LM"}, ValueError, "task_type must be None or one of"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD)
def test_a_config_no_model_can_have(fields, error, message):
    with pytest.raises(error, match=message):
        PrefixTuningConfig(**fields)


def test_places_choose_the_attention():
    for places in (["encoder"], ["cross"], ["decoder"], ["cross", "decoder"]):
        model = adapted("t5", places=places)
        owners = {path.rpartition(".")[2] if "Enc" in path else path.split(".")[0] for path in prefixes(model)}
        assert owners == {{"cross": "EncDecAttention"}.get(place, place) for place in places}
        assert outputs(model, "t5").isfinite().all()
    assert (
        len([m for m in adapted("bart").modules() if isinstance(m, Prefix)]) == 3 + 2 * 2
    )  # encoder; cross and decoder


def test_head_dim_may_differ_from_hidden_size_over_heads():
    model = peft_ops.adapt(qwen3(), PrefixTuningConfig(num_virtual_tokens=N))
    assert all(p.key.shape == (2, N, 16) for p in prefixes(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outputs_and_gradients_are_as_accurate_as_joined_keys(name, dtype, device):
    """Peer and truth join the prefix to the text in transformers' cache; the truth in float64."""
    model = adapted(name).to(device, dtype)
    given = {k: v.to(device) for k, v in inputs(name, padded=True).items()}
    weights = torch.randn(2, 9, 64, device=device).masked_fill_(~given["attention_mask"][..., None].bool(), 0.0)
    out = model(**given).logits
    (out * weights).sum().backward()
    peer, exact = (joined_keys(name, model, given, weights, kind) for kind in (dtype, torch.float64))
    seen = given["attention_mask"].bool()
    assert_as_accurate("logits", out[seen], peer[0][seen], exact[0][seen])
    for (path, prefix), theirs, truth in zip(prefixes(model).items(), peer[1], exact[1], strict=True):
        for i, own in enumerate((prefix.key.grad, prefix.value.grad)):
            assert_as_accurate(f"{path} {i}", own, theirs[i], truth[i], times=3)


def joined_keys(name, model, given, weights, dtype):
    """(logits, gradients of every layer's keys and values) of a base model with the prefix in its cache."""
    base = BUILDERS[name]().to(weights.device, model.dtype).to(dtype).requires_grad_(False)
    rows = [[p.detach().to(dtype).requires_grad_() for p in prefix()] for prefix in prefixes(model).values()]
    cache = DynamicCache([tuple(p.expand(2, -1, -1, -1) for p in row) for row in rows])
    mask = torch.nn.functional.pad(given["attention_mask"], (N, 0), value=1)
    positions = torch.arange(9, device=weights.device)[None] + N
    logits = base(given["input_ids"], attention_mask=mask, past_key_values=cache, position_ids=positions).logits
    (logits * weights.to(dtype)).sum().backward()
    return logits, [[p.grad for p in row] for row in rows]
