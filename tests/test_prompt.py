"""Prompt tuning and P-tuning: the authors' formulas, PEFT's outputs and files, generation, training, bad input."""

import copy
import pickle
import warnings

import peft
import pytest
import tiny_models
import torch
import transformers
from tiny_models import TASKS, assert_as_it_was, bert, gpt2, llama, snapshot, t5, tokens, train
from torch import nn

import peft_ops
from peft_ops import PromptTuningConfig, PTuningConfig
from peft_ops.nn.prompt_encoder import PromptEncoder

N = 4
MODELS = ["llama", "gpt2", "bert", "t5"]
PSEUDO = 999


def build(name):
    return getattr(tiny_models, name)()


def config(kind, model="llama", **fields):
    fields = {"num_virtual_tokens": N, "task_type": TASKS[model]} | fields
    if kind == "prompt":
        return PromptTuningConfig(**fields)
    return PTuningConfig(encoder_reparameterization_type=kind, encoder_hidden_size=16, **fields)


def output(model):
    """Logits, without touching random state."""
    with torch.no_grad():
        return model(tokens(), labels=tiny_models.labels(model)).logits


def virtual(model):
    return next(m for m in model.modules() if type(m).__name__ == "VirtualTokens")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        yield


# The formulas


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_prompt_stands_before_the_embedded_text(name):
    base, model = build(name), peft_ops.adapt(build(name), config("prompt"))
    prompt = virtual(model).encoder.embedding
    text = base.get_input_embeddings()(tokens())
    whole = torch.cat((prompt.expand(2, -1, -1), text), dim=1)
    with torch.no_grad():
        assert torch.equal(output(model), base(inputs_embeds=whole).logits[:, N:])


def test_bert_pools_the_first_place_and_types_are_zero():
    base, model = bert(), peft_ops.adapt(bert(), config("prompt", "bert"))
    types = torch.ones_like(tokens())
    text = base.get_input_embeddings()(tokens())
    whole = torch.cat((virtual(model).encoder.embedding.expand(2, -1, -1), text), dim=1)
    with torch.no_grad():
        ours = model(tokens(), token_type_ids=types).logits
        longer = torch.cat((torch.zeros(2, N, dtype=torch.int64), types), dim=1)
        assert torch.equal(ours, base(inputs_embeds=whole, token_type_ids=longer).logits)


def test_t5_sees_the_prompt_in_every_cross_attention():
    base, model = t5(), peft_ops.adapt(t5(), config("prompt", "t5"))
    mask = torch.ones_like(tokens())
    mask[0, 5:] = 0
    text = base.get_input_embeddings()(tokens())
    whole = torch.cat((virtual(model).encoder.embedding.expand(2, -1, -1), text), dim=1)
    longer = torch.cat((torch.ones(2, N, dtype=torch.int64), mask), dim=1)
    with torch.no_grad():
        ours = model(input_ids=tokens(), attention_mask=mask, decoder_input_ids=tokens()).logits
        theirs = base(inputs_embeds=whole, attention_mask=longer, decoder_input_ids=tokens()).logits
    torch.testing.assert_close(ours, theirs)


def lstm(x, weights, layers):
    """A bidirectional LSTM over x [n, d] by its equations (Hochreiter and Schmidhuber, 1997; gates i, f, g, o)."""
    for layer in range(layers):
        directions = []
        for suffix in ("", "_reverse"):
            w_i, w_h, b_i, b_h = (
                weights[f"{part}_l{layer}{suffix}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = x.new_zeros(w_h.shape[1])
            states = []
            for step in x.flip(0) if suffix else x:
                i, f, g, o = (w_i @ step + b_i + w_h @ h + b_h).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                states.append(h)
            directions.append(torch.stack(states[::-1] if suffix else states))
        x = torch.cat(directions, dim=1)
    return x


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_encoders_are_the_authors(layers, few_shot):
    """ "GPT Understands, Too", section 3.2, and the heads of its two sets of experiments."""
    d, hidden = 12, 5
    encoder = PromptEncoder(N, d, hidden, layers, few_shot=few_shot).double()
    weights = {name: p.detach() for name, p in encoder.named_parameters()}
    x = weights["embedding.weight"]
    if layers:
        x = lstm(x, {name.removeprefix("lstm_head."): p for name, p in weights.items()}, layers)
    widths = {
        (0, False): [d, hidden, hidden, d],
        (0, True): [d, hidden, d],
        (2, False): [10, 10, d],
        (2, True): [10, hidden, d],
    }
    expected = widths[layers, few_shot]
    for i in range(len(expected) - 1):
        w, b = weights[f"mlp_head.{2 * i}.weight"], weights[f"mlp_head.{2 * i}.bias"]
        assert w.shape == (expected[i + 1], expected[i])
        x = x @ w.t() + b
        if i < len(expected) - 2:
            x = x.clamp(min=0)
    torch.testing.assert_close(encoder(), x)


def template_ids():
    """[cls] P P [mask] P subject P [sep], twice with other words."""
    wanted = PTuningConfig(template=(2, 1, 1), pseudo_token_id=PSEUDO)
    assert wanted.num_virtual_tokens == N
    return wanted, torch.tensor([[1, *wanted.fill([5], [6, 7]), 2], [1, *wanted.fill([8], [9, 3]), 2]])


def test_a_template_is_filled_in_place():
    wanted, ids = template_ids()
    assert ids[0].tolist() == [1, PSEUDO, PSEUDO, 5, PSEUDO, 6, 7, PSEUDO, 2]
    base, model = bert(), peft_ops.adapt(bert(), wanted)
    prompt = virtual(model).encoder()
    embedded = base.get_input_embeddings()(ids.masked_fill(ids == PSEUDO, 0)).clone()
    for row in range(2):
        for i, place in enumerate([1, 2, 4, 7]):
            embedded[row, place] = prompt[i]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(inputs_embeds=embedded).logits)
        assert torch.equal(model(tokens()).logits, base(tokens()).logits)  # rows without pseudo tokens


def test_a_template_in_a_causal_model_generates():
    wanted = PTuningConfig(template=(2, 2, 0), pseudo_token_id=PSEUDO)
    ids = torch.tensor([wanted.fill([5, 6], []), wanted.fill([7, 8], [])])
    model = peft_ops.adapt(gpt2(), wanted)
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    current = ids
    for _ in range(5):
        with torch.no_grad():
            current = torch.cat((current, model(current, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(made, current)


def test_a_row_with_another_number_of_pseudo_tokens_is_refused():
    wanted, ids = template_ids()
    model = peft_ops.adapt(bert(), wanted)
    ids[1, 1] = 5
    with pytest.raises(ValueError, match=r"a row must hold 4 pseudo tokens \(id 999\).*or none; got \[3\]"):
        model(ids)


# Parameter counts of METHODS.md


def trained_on_meta(model_class, settings, wanted):
    with torch.device("meta"):
        model = model_class(settings)
    return peft_ops.trainable_parameters(peft_ops.adapt(model, wanted)).trainable


@pytest.mark.unpoisoned
def test_parameter_counts():
    roberta = transformers.RobertaConfig(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16)
    lama = PTuningConfig(template=(3, 3, 3), pseudo_token_id=50265, encoder_reparameterization_type="LSTM")
    assert trained_on_meta(transformers.RobertaForMaskedLM, roberta, lama) == 14_707_712
    t5_xxl = transformers.T5Config(d_model=4096, num_layers=1, d_ff=64, num_heads=64)
    five = PromptTuningConfig(num_virtual_tokens=5)
    assert trained_on_meta(transformers.T5ForConditionalGeneration, t5_xxl, five) == 20_480
    for kind, count in (("MLP", 1504), ("LSTM", 15_072)):
        wanted = PTuningConfig(
            num_virtual_tokens=5, encoder_hidden_size=16 if kind == "MLP" else 32, encoder_reparameterization_type=kind
        )
        ours = sum(p.numel() for p in virtual(peft_ops.adapt(llama(), wanted)).parameters())
        theirs = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32, num_transformer_submodules=1, num_layers=1,
            encoder_hidden_size=wanted.encoder_hidden_size, encoder_reparameterization_type=kind,
        )  # fmt: skip
        assert ours == sum(p.numel() for p in peft.PromptEncoder(theirs).parameters())
        assert kind == "LSTM" or ours == count
    half = PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM")
    assert sum(p.numel() for p in virtual(peft_ops.adapt(llama(), half)).parameters()) == 15_072


# PEFT's outputs and files


def without_prompt(logits, name):
    return logits if name in ("bert", "t5") else logits[:, N:]


@pytest.mark.parametrize("kind", ["prompt", "MLP", "LSTM"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_ours(name, kind, tmp_path):
    model = peft_ops.adapt(build(name), config(kind, name))
    train(model)
    peft_ops.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        logits = theirs(input_ids=tokens(), labels=tiny_models.labels(build(name))).logits
    torch.testing.assert_close(output(model), without_prompt(logits, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "MLP", "LSTM"])
@pytest.mark.parametrize("name", MODELS)
def test_we_load_pefts(name, kind, tmp_path):
    fields = {"task_type": TASKS[name], "num_virtual_tokens": N}
    theirs = peft.PromptTuningConfig(**fields) if kind == "prompt" else peft.PromptEncoderConfig(
        encoder_hidden_size=16, encoder_reparameterization_type=kind, **fields
    )  # fmt: skip
    model = peft.get_peft_model(build(name), theirs).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens(), labels=tiny_models.labels(build(name))).logits
    model.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(build(name), tmp_path)
    torch.testing.assert_close(output(ours), without_prompt(logits, name), rtol=1e-4, atol=1e-5)
    assert train(ours)[-1] != train(ours)[0]  # as plain embeddings, since PEFT drops the encoder


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_equals_pefts(name, beams, tmp_path):
    model = peft_ops.adapt(build(name), config("prompt", name))
    peft_ops.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    how = dict(
        input_ids=tokens(), max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(**how), theirs.generate(**how))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_and_padding_equals_none(name):
    model = peft_ops.adapt(build(name), config("prompt", name))
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, :3] = 0
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = model.generate(input_ids=ids, attention_mask=mask, **how)
    alone = model.generate(input_ids=ids[:1, 3:], **how)
    assert torch.equal(made[0, -6:], alone[0, -6:])
    current, seen = ids, mask
    for _ in range(6):
        with torch.no_grad():
            positions = (seen.cumsum(1) - 1).clamp(min=0)
            logits = model(current, attention_mask=seen, position_ids=positions, use_cache=False).logits
        current = torch.cat((current, logits[:, -1:].argmax(-1)), dim=1)
        seen = torch.cat((seen, torch.ones(2, 1, dtype=torch.int64)), dim=1)
    assert torch.equal(made, current)


# What is seen from outside


def test_outputs_keep_their_shape():
    model = peft_ops.adapt(llama(attn_implementation="eager"), config("prompt"))
    model.set_attn_implementation("eager")
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert out.logits.shape == (2, 9, 64)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 4
    assert [a.shape for a in out.attentions] == [(2, 4, 9, 9 + N)] * 3
    assert model(tokens(), return_dict=False)[0].shape == (2, 9, 64)
    assert torch.equal(model.model(tokens()).last_hidden_state, out.hidden_states[-1])


@pytest.mark.parametrize("kind", ["prompt", "LSTM"])
@pytest.mark.parametrize("name", MODELS)
def test_off_copied_and_pickled(name, kind, tmp_path):
    base, model = build(name).requires_grad_(False), peft_ops.adapt(build(name), config(kind, name))
    before = output(model)
    with peft_ops.adapters_disabled(model):
        assert torch.equal(output(model), output(base))
    assert torch.equal(output(model), before)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(output(twin), before)
    train(twin)
    assert not torch.equal(output(twin), before)
    assert torch.equal(output(model), before)


def test_a_16_bit_base_keeps_float32_prompts():
    model = peft_ops.adapt(llama().bfloat16(), config("MLP"))
    assert {p.dtype for p in virtual(model).parameters()} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    train(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_checkpointing_gives_the_same_gradients(name, first, reentrant):
    def gradients(checkpointing):
        model = build(name)
        if checkpointing and first:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model = peft_ops.adapt(model, config("MLP", name)).train()
        if checkpointing and not first:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens(), labels=tiny_models.labels(model)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert gradient.norm() > 0, key
        torch.testing.assert_close(checkpointed[key], gradient, msg=key)


# Training, saving, going on


@pytest.mark.parametrize("kind", ["prompt", "MLP", "LSTM"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_it_trains_and_the_base_stays(name, kind):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    peft_ops.adapt(model, config(kind, name))
    losses = train(model, steps=12)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value) or key.startswith("classifier"), key
    with peft_ops.adapters_disabled(model):
        assert torch.equal(output(model), output(build(name).requires_grad_(False)))


def steps(model, optimizer, count, ids):
    losses = []
    for _ in range(count):
        loss = model(ids, labels=ids.masked_fill(ids == PSEUDO, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["prompt", "LSTM", "template"])
def test_a_run_goes_on_where_it_was_saved(kind, adapted, tmp_path):
    wanted, ids = template_ids() if kind == "template" else (config(kind), tokens())
    model = peft_ops.adapt(llama(), wanted)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 3, ids)
    peft_ops.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    uninterrupted = steps(model, optimizer, 3, ids)
    again = peft_ops.load_adapter(peft_ops.adapt(llama(), wanted) if adapted else llama(), tmp_path)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(state)
    assert steps(again, optimizer, 3, ids) == uninterrupted


def test_ejecting_keeps_the_function_and_drops_the_encoder(tmp_path):
    model = peft_ops.adapt(llama(), config("LSTM", encoder_dropout=0.3))
    peft_ops.save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_training.safetensors").exists()
    before = output(model)
    peft_ops.eject(model)
    torch.testing.assert_close(output(model), before)
    assert peft_ops.trainable_parameters(model).trainable == N * 32
    peft_ops.save_adapter(model, tmp_path)
    assert not (tmp_path / "adapter_training.safetensors").exists()
    assert torch.equal(output(peft_ops.load_adapter(llama(), tmp_path)), output(model))
    with pytest.raises(ValueError, match="nothing to eject"):
        peft_ops.eject(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        peft_ops.merge(model)


def test_peft_refuses_a_template(tmp_path):
    peft_ops.save_adapter(peft_ops.adapt(bert(), template_ids()[0]), tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert peft_ops.load_adapter(bert(), tmp_path)


# How prompts start


def letters(text):
    return [ord(c) - ord("a") for c in text]


def prompt_of(**fields):
    wanted = PromptTuningConfig(num_virtual_tokens=6, tokenizer=letters, **fields)
    return virtual(peft_ops.adapt(llama(), wanted)).encoder.embedding


def test_initialisation():
    table = llama().get_input_embeddings().weight
    text = prompt_of(prompt_tuning_init="TEXT", prompt_tuning_init_text="abcd")
    assert torch.equal(text, table[[0, 1, 2, 3, 0, 1]])
    labels = prompt_of(prompt_tuning_init="CLASS_LABELS", class_labels=["ab", "c"], sample_vocab=5)
    assert torch.equal(labels[0], (table[0] + table[1]) / 2)
    assert torch.equal(labels[1], table[2])
    sampled = prompt_of(prompt_tuning_init="SAMPLE_VOCAB", sample_vocab=5)
    for row in (*labels[2:], *sampled):
        assert (table[:5] == row).all(dim=1).any()
    uniform = prompt_of(prompt_tuning_init="UNIFORM")
    assert uniform.abs().max() <= 0.5
    assert 0.2 < uniform.std() < 0.35
    assert 0.8 < prompt_of().std() < 1.2


def test_a_tokenizer_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    given = dict(num_virtual_tokens=3, tokenizer_name_or_path=str(tmp_path))
    table = llama().get_input_embeddings().weight
    for fields in (
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "bad good bad good"},
        {"prompt_tuning_init": "CLASS_LABELS", "class_labels": ["bad", "good", "bad"]},
    ):
        model = peft_ops.adapt(llama(), PromptTuningConfig(**given, **fields))
        assert torch.equal(virtual(model).encoder.embedding, table[[2, 1, 2]])
    theirs = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text="bad good bad good", **given
    )
    assert torch.equal(peft.get_peft_model(llama(), theirs).get_prompt(1)[0], table[[2, 1, 2]])


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PromptTuningConfig(num_virtual_tokens=0), ValueError, "num_virtual_tokens must be at least 1, got 0"),
        (lambda: PromptTuningConfig(num_virtual_tokens=2.0), TypeError, "num_virtual_tokens must be an int"),
        (lambda: PromptTuningConfig(prompt_tuning_init="ZERO"), ValueError, "prompt_tuning_init must be one of"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TEXT"), ValueError, "needs prompt_tuning_init_text"),
        (
            lambda: PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
            ValueError,
            "needs tokenizer or tokenizer_name_or_path",
        ),
        (
            lambda: PromptTuningConfig(
                num_virtual_tokens=1, prompt_tuning_init="CLASS_LABELS", class_labels=["a", "b"], tokenizer=letters
            ),
            ValueError,
            "class_labels has 2 labels, which do not fit num_virtual_tokens=1",
        ),
        (lambda: PromptTuningConfig(class_labels="ab"), TypeError, "class_labels must be a list of strings"),
        (lambda: PTuningConfig(encoder_reparameterization_type="GRU"), ValueError, "must be one of 'MLP', 'LSTM'"),
        (lambda: PTuningConfig(encoder_hidden_size=0), ValueError, "encoder_hidden_size must be at least 1"),
        (lambda: PTuningConfig(encoder_dropout=1.5), ValueError, r"encoder_dropout must be in \[0, 1\]"),
        (lambda: PTuningConfig(template=(3, 3)), ValueError, "template needs pseudo_token_id"),
        (lambda: PTuningConfig(template=(0, 0), pseudo_token_id=5), ValueError, "template must be counts"),
        (
            lambda: PTuningConfig(template=(3, 3), pseudo_token_id=5, num_virtual_tokens=5),
            ValueError,
            "has 6 virtual tokens, got 5",
        ),
        (lambda: PTuningConfig(template=(3, 3), pseudo_token_id=5).fill([1], [2]), ValueError, "takes 1 pieces, got 2"),
        (lambda: PTuningConfig().fill(), ValueError, "fill needs a template"),
        (lambda: PromptTuningConfig(task_type="POEM"), ValueError, "task_type must be None or one of"),
    ],
)
def test_bad_configs(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "wanted", "error", "message"),
    [
        (
            gpt2,
            config("prompt", num_virtual_tokens=32),
            ValueError,
            "leaves no room for text: the model has 32 positions",
        ),
        (lambda: nn.Linear(4, 4), config("prompt"), TypeError, "input embedding of a transformers model"),
        (
            llama,
            config("prompt", prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer=lambda text: []),
            ValueError,
            "makes no token of 'x'",
        ),
        (llama, config("prompt", modules_to_save=["nowhere"]), ValueError, "matches no module"),
    ],
)
def test_a_failed_adaptation_leaves_the_model(model, wanted, error, message):
    model = model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.adapt(model, wanted)
    assert_as_it_was(model, before)


def test_an_adapted_model_takes_no_second_method():
    model = peft_ops.adapt(llama(), config("prompt"))
    for again in (config("MLP"), peft_ops.LoRAConfig()):
        with pytest.raises(ValueError, match="already adapted"):
            peft_ops.adapt(model, again)


def test_more_tokens_than_positions_and_masks_of_four_dimensions():
    model = peft_ops.adapt(gpt2(), config("prompt"))
    with pytest.raises(ValueError, match="4 virtual tokens and 29 tokens of input are more than the 32 positions"):
        model(tokens(length=29))
    assert model(tokens(length=28)).logits.shape == (2, 28, 64)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\].*got 4 dimensions"):
        model(tokens(), attention_mask=torch.ones(2, 1, 9, 9))


def test_loading_what_does_not_fit_leaves_the_model(tmp_path):
    peft_ops.save_adapter(peft_ops.adapt(llama(), config("LSTM")), tmp_path)
    for other, message in (
        (config("MLP"), "missing keys: encoder.mlp_head.4.weight.*unexpected keys: encoder.lstm_head"),
        (config("LSTM", num_virtual_tokens=5), r"prompt_embeddings: \(4, 32\), expected \(5, 32\)"),
        (PTuningConfig(template=(2, 2), pseudo_token_id=9), "template of the checkpoint is None"),
        (peft_ops.LoRAConfig(), "is of another method: the model was adapted with LoRA"),
    ):
        model = peft_ops.adapt(llama(), other)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            peft_ops.load_adapter(model, tmp_path)
        assert_as_it_was(model, before)


def test_files_of_two_saves_are_refused(tmp_path):
    model = peft_ops.adapt(llama(), config("LSTM"))
    peft_ops.save_adapter(model, tmp_path)
    old = (tmp_path / "adapter_training.safetensors").read_bytes()
    train(model)
    peft_ops.save_adapter(model, tmp_path)
    (tmp_path / "adapter_training.safetensors").write_bytes(old)
    with pytest.raises(ValueError, match="of two different saves"):
        peft_ops.load_adapter(llama(), tmp_path)
