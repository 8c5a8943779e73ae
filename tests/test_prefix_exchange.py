"""Prefixes in PEFT's format: ours read by the real peft, peft's read by us; runs that go on; files that are spoiled."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
from prefix_models import BUILDERS, TASK, N, adapted, inputs, loss_of, outputs, prefixes, trained
from tiny_models import assert_as_it_was, assert_same_bytes, snapshot, t5

import peft_ops
from peft_ops import PrefixTuningConfig, PTuningV2Config
from peft_ops.tuning.adaptation import adaptation_of

WEIGHTS, CONFIG, TRAINING = "adapter_model.safetensors", "adapter_config.json", "adapter_training.safetensors"
FOUR = ("llama", "gpt2", "bert", "t5")
PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 12}
DECODER = {"places": ["decoder"]}


def step(model, name, optimizer=None, steps=2):
    """Losses of some steps of AdamW; the model is in eval mode afterwards."""
    optimizer = optimizer or torch.optim.AdamW(trained(model).values(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train(), name)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def from_peft(name, folder):
    return peft.PeftModel.from_pretrained(BUILDERS[name](), folder).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_ours_in_peft(name, padded, tmp_path):
    model = adapted(name, **DECODER)
    base = outputs(BUILDERS[name](), name, padded)
    peft_ops.save_adapter(model, tmp_path)
    ours, theirs = outputs(model, name, padded), outputs(from_peft(name, tmp_path), name, padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-2)
    assert torch.equal(outputs(peft_ops.load_adapter(BUILDERS[name](), tmp_path), name, padded), ours)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("fields", [{}, {"prefix_projection": True, "encoder_hidden_size": 12}])
def test_peft_in_ours(name, fields, tmp_path):
    theirs = peft.get_peft_model(
        BUILDERS[name](), peft.PrefixTuningConfig(task_type=TASK[name], num_virtual_tokens=N, **fields)
    )
    step(theirs, name)
    theirs.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(BUILDERS[name](), tmp_path)
    torch.testing.assert_close(outputs(ours, name), outputs(theirs, name), rtol=1e-4, atol=1e-4)
    assert adaptation_of(ours).config.prefix_projection is False  # PEFT drops its encoder
    step(ours, name)  # what PEFT cannot: train on
    peft_ops.save_adapter(ours, tmp_path)
    torch.testing.assert_close(outputs(from_peft(name, tmp_path), name), outputs(ours, name), rtol=1e-4, atol=1e-4)


def test_t5_of_an_odd_number_of_layers(tmp_path):
    """PEFT's T5 layers share pieces where their number is even, and not where it is odd: both are read."""
    model = adapted("umt5", **DECODER)
    keys = [p.key for p in prefixes(model).values()]
    assert len(keys) == 3
    assert not any(torch.equal(keys[0], key) for key in keys[1:])
    theirs = peft.get_peft_model(
        BUILDERS["umt5"](), peft.PrefixTuningConfig(task_type=TASK["umt5"], num_virtual_tokens=N)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = peft_ops.load_adapter(BUILDERS["umt5"](), tmp_path)
    torch.testing.assert_close(outputs(ours, "umt5"), outputs(theirs, "umt5"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_is_that_of_peft(name, tmp_path):
    model = adapted(name, **DECODER)
    peft_ops.save_adapter(model, tmp_path)
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **options), from_peft(name, tmp_path).generate(**given, **options))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_encoder_is_that_of_peft(name, tmp_path):
    """The file beside has the names and the values of PEFT's PrefixEncoder, which then computes the same."""
    fields = {"prefix_projection": True, "encoder_hidden_size": 12}
    model = adapted(name, **fields)
    step(model, name)
    peft_ops.save_adapter(model, tmp_path)
    theirs = peft.get_peft_model(
        BUILDERS[name](), peft.PrefixTuningConfig(task_type=TASK[name], num_virtual_tokens=N, **fields)
    )
    encoder = theirs.prompt_encoder["default"]
    training = safetensors.torch.load_file(tmp_path / TRAINING)
    assert encoder.load_state_dict(training).missing_keys == []
    saved = safetensors.torch.load_file(tmp_path / WEIGHTS)["prompt_embeddings"]
    torch.testing.assert_close(encoder(torch.arange(N)), saved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_files_are_those_of_peft(name, tmp_path):
    peft_ops.save_adapter(adapted(name), tmp_path / "ours")
    config = peft.PrefixTuningConfig(task_type=TASK[name], num_virtual_tokens=N)
    peft.get_peft_model(BUILDERS[name](), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    ours, theirs = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    assert ours.keys() - theirs.keys() == {"method", "places", "dropout", "layers"}
    assert theirs.keys() <= ours.keys()
    different = {key for key in theirs if ours[key] != theirs[key]}
    assert different <= {"modules_to_save"}  # PEFT adds the heads that task_type names
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_p_tuning_v2_is_read_back_as_itself_and_by_peft(name, tmp_path):
    model = adapted(name, config=PTuningV2Config, **DECODER)
    step(model, name)
    peft_ops.save_adapter(model, tmp_path)
    loaded = peft_ops.load_adapter(BUILDERS[name](), tmp_path)
    config = adaptation_of(loaded).config
    assert type(config) is PTuningV2Config
    assert (config.dropout, config.num_virtual_tokens) == (0.1, N)
    assert_same_bytes(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(outputs(from_peft(name, tmp_path), name), outputs(model, name), rtol=1e-4, atol=1e-4)


METHODS = {
    "prefix": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 12},
    "v2": {"config": PTuningV2Config},
    "v2 projected": {"config": PTuningV2Config, "prefix_projection": True},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FOUR)
def test_a_run_goes_on_as_if_it_had_not_stopped(name, method, tmp_path):
    model = adapted(name, **METHODS[method])
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    step(model, name, optimizer)
    peft_ops.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    other = peft_ops.load_adapter(BUILDERS[name](), tmp_path)
    assert_same_bytes(other.state_dict(), model.state_dict())
    assert trained(other).keys() == trained(model).keys()
    resumed = torch.optim.AdamW(trained(other).values(), lr=0.05)
    resumed.load_state_dict(state)
    torch.manual_seed(4)
    expected = step(model, name, optimizer)
    torch.manual_seed(4)
    assert step(other, name, resumed) == expected
    assert_same_bytes(other.state_dict(), model.state_dict())
    into = adapted(name, **METHODS[method])
    assert torch.equal(outputs(peft_ops.load_adapter(into, tmp_path), name), outputs(into, name))


def test_three_places_are_refused_by_peft(tmp_path):
    model = adapted("t5")
    peft_ops.save_adapter(model, tmp_path)
    keys = set(safetensors.torch.load_file(tmp_path / WEIGHTS))
    assert keys == {f"prompt_embeddings.{place}" for place in ("encoder", "cross", "decoder")}
    with pytest.raises(KeyError, match="prompt_embeddings"):
        from_peft("t5", tmp_path)
    assert torch.equal(outputs(peft_ops.load_adapter(t5(), tmp_path), "t5"), outputs(model, "t5"))


def test_ejected_it_is_saved_without_an_encoder(tmp_path):
    model = adapted("llama", **PROJECTED)
    expected = outputs(model, "llama")
    peft_ops.save_adapter(peft_ops.eject(model), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert json.loads((tmp_path / CONFIG).read_text())["prefix_projection"] is False
    torch.testing.assert_close(outputs(from_peft("llama", tmp_path), "llama"), expected, rtol=1e-4, atol=1e-4)


def edit_tensors(change, file=WEIGHTS):
    def edit(folder):
        tensors = safetensors.torch.load_file(folder / file)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / file)

    return edit


def edit_config(**fields):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return edit


ROWS, LAST = "prompt_embeddings", "transform.2.bias"
SPOILED = {
    "no rows": (edit_tensors(lambda t: t.pop(ROWS)), ValueError, f"missing keys: {ROWS}"),
    "unexpected": (edit_tensors(lambda t: t.update(x=torch.ones(1))), ValueError, "unexpected keys: x"),
    "width": (edit_tensors(lambda t: t.update({ROWS: torch.ones(N, 95)})), ValueError, r"95\), expected \(4, 96\)"),
    "rows": (edit_tensors(lambda t: t.update({ROWS: torch.ones(3, 96)})), ValueError, r"\(3, 96\), expected \(4,"),
    "NaN": (edit_tensors(lambda t: t[ROWS].fill_(torch.nan)), ValueError, "does not belong"),
    "integers": (
        edit_tensors(lambda t: t.update({ROWS: torch.ones(N, 96, dtype=torch.int8)})),
        ValueError,
        "not floating point: prompt_embeddings|does not belong",
    ),
    "encoder cut": (edit_tensors(lambda t: t.pop(LAST), TRAINING), ValueError, f"missing keys: {LAST}"),
    "encoder of another": (
        edit_tensors(lambda t: t[LAST].add_(1.0), TRAINING),
        ValueError,
        "adapter_training.safetensors does not belong to adapter_model.safetensors",
    ),
    "corrupt encoder": (lambda f: (f / TRAINING).write_bytes(b"12"), ValueError, f"{TRAINING} is corrupt"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "no adapter_model.safetensors"),
    "layers": (edit_config(num_layers="3"), TypeError, "adapter_config.json: num_layers must be an int, got '3'"),
    "no layers": (edit_config(num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
    "submodules": (edit_config(num_transformer_submodules=3), ValueError, "at least 1 and at most 2, got 3"),
    "method": (edit_config(method="q"), ValueError, "method must be one of p_tuning_v2, prefix_tuning, got 'q'"),
    "field": (edit_config(dropout="much"), TypeError, "adapter_config.json: dropout must be a number"),
    "too many": (edit_config(num_virtual_tokens=99), ValueError, "below the model's 32 positions|differs"),
}  # fmt: skip


@pytest.mark.parametrize("into", ["plain", "adapted"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_a_failed_load_leaves_the_model(spoil, into, tmp_path):
    peft_ops.save_adapter(adapted("llama", **PROJECTED), tmp_path)
    change, error, message = SPOILED[spoil]
    change(tmp_path)
    model = BUILDERS["llama"]() if into == "plain" else adapted("llama", **PROJECTED)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)


MISMATCHED = [
    ({}, "prefix_projection of the checkpoint differs: True, the model was adapted with False"),
    ({**PROJECTED, "num_virtual_tokens": 5}, "num_virtual_tokens of the checkpoint differs: 4, .* 5"),
    ({**PROJECTED, "encoder_hidden_size": 8}, r"shapes: .*transform.0.weight: \(12, 32\), expected \(8, 32\)"),
    ({**PROJECTED, "modules_to_save": ["norm"]}, "missing keys: base_model.model.layers.0.input_layernorm.weight"),
]


@pytest.mark.parametrize(("fields", "message"), MISMATCHED)
def test_a_model_adapted_otherwise_is_left(fields, message, tmp_path):
    peft_ops.save_adapter(adapted("llama", **PROJECTED), tmp_path)
    model = adapted("llama", **fields)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)


def test_another_methods_model_is_left(tmp_path):
    peft_ops.save_adapter(adapted("llama"), tmp_path)
    model = peft_ops.adapt(BUILDERS["llama"](), peft_ops.LoRAConfig(r=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="of another method: the model was adapted with LoRA"):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)
    places = adapted("t5", places=["encoder"])
    peft_ops.save_adapter(adapted("t5", **DECODER), tmp_path)
    before = snapshot(places)
    with pytest.raises(ValueError, match=f"missing keys: {ROWS}.encoder; unexpected keys: {ROWS}"):
        peft_ops.load_adapter(places, tmp_path)
    assert_as_it_was(places, before)


def test_modules_to_save_go_with_it(tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=N, modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = peft_ops.adapt(BUILDERS["llama"](), config)
    step(model, "llama")
    peft_ops.save_adapter(model, tmp_path)
    assert torch.equal(outputs(peft_ops.load_adapter(BUILDERS["llama"](), tmp_path), "llama"), outputs(model, "llama"))
    torch.testing.assert_close(
        outputs(from_peft("llama", tmp_path), "llama"), outputs(model, "llama"), rtol=1e-4, atol=1e-4
    )
