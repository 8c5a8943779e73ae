"""Bottleneck adapters in AdapterHub's layout: its files read by us, ours in its form, and files that are spoiled.

tests/fixtures/adapterhub holds what adapters 1.3.0 (with transformers 4.57.6) saved of models with the weights of
`filled` and an adapter "greta", and the logits that it computed: BERT with seq_bn and a trained classifier, GPT-2 with
double_seq_bn (the bottleneck 5 of 32), a Llama with par_bn, T5 with double_seq_bn after cross-attention too.
"""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import BUILDERS, TASKS, assert_as_it_was, assert_same_bytes, bert, llama, snapshot, t5

import peft_ops
from peft_ops import AdapterConfig

FIXTURES = Path(__file__).parent / "fixtures" / "adapterhub"
MODELS = {**BUILDERS, "t5": t5}
CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEAD_PICKLED, HEAD_CONFIG = "model_head.safetensors", "pytorch_model_head.bin", "head_config.json"
TRAINING = "adapter_training.safetensors"
every_fixture = pytest.mark.parametrize("name", MODELS)


def filled(model):
    """Weights that do not depend on anyone's random numbers: a sine of their place, with a phase of their name."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000)
            p.copy_((0.3 * wave + (1 if p.dim() == 1 and name.endswith("weight") else 0)).reshape(p.shape))
    return model.eval()


def build(name):
    model = MODELS[name]()
    if name == "t5":
        model.lm_head.weight = model.shared.weight
    return filled(model)


def outputs(model):
    ids = torch.arange(18).reshape(2, 9) * 7 % 64
    with torch.no_grad():
        return model(ids, labels=ids if isinstance(model, transformers.T5PreTrainedModel) else None).logits


def adapted(name, config):
    model = peft_ops.adapt(build(name), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def weights(folder):
    return load_file(folder / SAFE) if (folder / SAFE).exists() else torch.load(folder / PICKLED, weights_only=True)


@every_fixture
def test_theirs_in_ours(name):
    model = peft_ops.load_adapter(build(name), FIXTURES / name)
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(build(name)), expected, rtol=0.1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {"classifier.weight", "classifier.bias"} if name == "bert" else set()
    assert heads == {n for n in trained if "adapter" not in n}


@every_fixture
def test_loaded_and_saved_again_it_is_the_same(name, tmp_path):
    """Names and bytes of tensors, and every field of the config that we have."""
    peft_ops.save_adapter(peft_ops.load_adapter(build(name), FIXTURES / name), tmp_path)
    assert_same_bytes(load_file(tmp_path / SAFE), weights(FIXTURES / name))
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, FIXTURES / name))
    for key in ("hidden_size", "model_class", "model_type", "name", "version"):
        assert ours[key] == theirs[key], key
    for key, value in ours["config"].items():
        if key != "reduction_factor":
            assert value == theirs["config"][key], key
            assert type(value) is type(theirs["config"][key]), key
    assert int(32 // ours["config"]["reduction_factor"]) == int(32 // theirs["config"]["reduction_factor"])
    names = {CONFIG, SAFE}
    if name == "bert":
        names |= {HEAD, HEAD_CONFIG}
        theirs = torch.load(FIXTURES / name / HEAD_PICKLED, weights_only=True)
        assert_same_bytes(load_file(tmp_path / HEAD), theirs)
        ours, theirs = (json.loads((folder / HEAD_CONFIG).read_text()) for folder in (tmp_path, FIXTURES / name))
        assert {k: v for k, v in ours.items() if k != "model_name"} == {
            k: v for k, v in theirs.items() if k != "model_name"
        }
    assert {path.name for path in tmp_path.iterdir()} == names
    assert torch.equal(outputs(peft_ops.load_adapter(build(name), tmp_path)), outputs(_loaded(name)))


def _loaded(name):
    return peft_ops.load_adapter(build(name), FIXTURES / name)


@pytest.mark.parametrize("form", ["houlsby", "pfeiffer", "parallel"])
@every_fixture
def test_ours_comes_back_whole(name, form, tmp_path):
    """With its name, its LayerNorms and its head, into a plain model and into one that is adapted."""
    saved = ["lm_head"] if name == "t5" else None
    config = getattr(AdapterConfig, form)(
        bottleneck=7, task_type=TASKS[name], modules_to_save=saved, name="hugo", leave_out=[1]
    )
    model = adapted(name, config)
    peft_ops.save_adapter(model, tmp_path)
    assert all(".adapters.hugo.adapter_" in key for key in load_file(tmp_path / SAFE))
    expected = outputs(model)
    plain = peft_ops.load_adapter(build(name), tmp_path)
    assert torch.equal(outputs(plain), expected)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = peft_ops.load_adapter(peft_ops.adapt(build(name), config), tmp_path)
    assert torch.equal(outputs(again), expected)
    names = {p.name for p in tmp_path.iterdir()}
    assert (TRAINING in names) == (form == "houlsby" or name == "t5")
    assert (HEAD in names) == (name == "bert")
    peft_ops.save_adapter(plain, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


@pytest.mark.parametrize("width", [32, 768, 1000])
def test_reduction_factors_give_the_bottleneck_back(width):
    from peft_ops.checkpoint.adapterhub_config import _reduction_factor

    for m in range(1, 2 * width):
        assert int(width // _reduction_factor(width, m)) == m


def test_saving_takes_the_place_of_other_files(tmp_path):
    """What AdapterHub would read in their stead does not stay: weights as a pickle, a head, LayerNorms."""
    shutil.copytree(FIXTURES / "bert", tmp_path, dirs_exist_ok=True)
    (tmp_path / TRAINING).touch()
    peft_ops.save_adapter(adapted("bert", AdapterConfig.pfeiffer()), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, SAFE, "expected.safetensors"}


def test_a_backbone_and_a_model_with_a_head_share_files(tmp_path):
    """AdapterHub's keys begin at the model that was saved; an adapter fits others with the same blocks."""
    whole = adapted("bert", AdapterConfig.pfeiffer())
    peft_ops.save_adapter(whole, tmp_path)
    backbone = peft_ops.load_adapter(build("bert").bert, tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(backbone(ids).pooler_output, whole.bert(ids).pooler_output)
    peft_ops.save_adapter(backbone, tmp_path / "bare")
    assert next(iter(load_file(tmp_path / "bare" / SAFE))).startswith("encoder.layer.")
    assert torch.equal(outputs(peft_ops.load_adapter(build("bert"), tmp_path / "bare")), outputs(whole))


def test_names_of_the_first_version(tmp_path):
    """Files without a version call the places otherwise, and 'gelu' what is gelu_new now."""
    shutil.copytree(FIXTURES / "gpt2", tmp_path, dirs_exist_ok=True)
    old = {k.replace(".adapters.", ".attention_text_task_adapters."): t for k, t in weights(tmp_path).items()}
    save_file(old, tmp_path / SAFE)
    _edit(
        tmp_path / CONFIG,
        lambda saved: saved.pop("version"),
        lambda saved: saved["config"].update(non_linearity="gelu"),
    )
    model = peft_ops.load_adapter(build("gpt2"), tmp_path)
    assert model.transformer.h[0].output_adapter.activation == "gelu_new"
    assert_same_bytes(_state(model), _state(_loaded("gpt2")))


def _state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "adapter" in name}


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertAdapterModel"])
def test_other_heads_are_passed_over_aloud(kind, tmp_path):
    shutil.copytree(FIXTURES / "bert", tmp_path, dirs_exist_ok=True)
    _edit(tmp_path / HEAD_CONFIG, lambda head: head.update(model_class=kind))
    model = build("bert")
    with pytest.warns(UserWarning, match=f"has the head of a {kind}, which is not loaded"):
        peft_ops.load_adapter(model, tmp_path)
    assert not model.classifier.weight.requires_grad


def test_it_goes_on_from_theirs():
    model = _loaded("bert").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(torch.arange(18).reshape(2, 9), labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def _edit(file, *changes):
    value = json.loads(file.read_text())
    for change in changes:
        change(value)
    file.write_text(json.dumps(value))


def in_config(**fields):
    return lambda folder: _edit(folder / CONFIG, lambda saved: saved["config"].update(fields))


def in_weights(change):
    def spoil(folder):
        tensors = weights(folder)
        change(tensors)
        torch.save(tensors, folder / PICKLED)

    return spoil


KEY = "bert.encoder.layer.1.output.adapters.greta.adapter_up.bias"
SPOILED = [
    (in_config(architecture="lora"), ValueError, "adapter_config.json: architecture 'lora' is not supported"),
    (in_config(ln_after=True, phm_layer=True), ValueError, "uses ln_after, phm_layer, which is not supported"),
    (in_config(dropout=0.1), ValueError, "uses dropout, which is not supported"),
    (in_config(scaling="learned"), ValueError, "uses scaling='learned', which is not supported"),
    (in_config(reduction_factor={"default": 2}), ValueError, "uses a reduction_factor for each layer"),
    (in_config(reduction_factor="2"), TypeError, "adapter_config.json: reduction_factor must be a number, got '2'"),
    (in_config(non_linearity="sinus"), ValueError, "non_linearity must be one of .*, got 'sinus'"),
    (in_config(original_ln_after=False), ValueError, "would drop the sublayer's residual or add it twice"),
    (in_config(mh_adapter=True), ValueError, r"missing keys: 0\.attention\.output\.adapters\.adapter_down\.0\.weight"),
    (in_config(reduction_factor=4), ValueError, r"adapter_down\.0\.weight: \(4, 32\), expected \(8, 32\)"),
    (in_config(leave_out=[5]), ValueError, r"leave_out=\[5\]: the model has blocks 0 to 1"),
    (in_weights(lambda t: t.pop(KEY)), ValueError, r"missing keys: 1\.output\.adapters\.adapter_up\.bias"),
    (in_weights(lambda t: t.update(more=t[KEY])), ValueError, "unexpected keys"),
    (in_weights(lambda t: t[KEY].fill_(float("nan"))), ValueError, r"NaN or infinite: 1\.output\.adapters"),
    (in_weights(lambda t: t.update({KEY: t[KEY].int()})), ValueError, r"not floating point: 1\.output\.adapters"),
    (lambda f: torch.save([1], f / PICKLED), ValueError, "pytorch_adapter.bin must hold a dict of tensors, got list"),
    (lambda f: torch.save(AdapterConfig(), f / PICKLED), ValueError, "pytorch_adapter.bin is corrupt, truncated"),
    (lambda f: (f / PICKLED).write_bytes((f / PICKLED).read_bytes()[:900]), ValueError, "adapter.bin is corrupt"),
    (lambda f: (f / SAFE).write_bytes(b"no"), ValueError, "adapter.safetensors is corrupt or truncated"),
    (lambda f: (f / PICKLED).unlink(), FileNotFoundError, r"has no adapter.safetensors \(found: adapter_config.json"),
    (lambda f: (f / HEAD_PICKLED).unlink(), FileNotFoundError, "has no model_head.safetensors"),
    (lambda f: _edit(f / CONFIG, lambda saved: saved.update(name=None)), ValueError, "name must be letters"),
    (lambda f: (f / CONFIG).write_text("{}"), ValueError, "peft_type must be a method that is known"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED)
def test_spoiled_files_leave_the_model(spoil, error, message, tmp_path):
    shutil.copytree(FIXTURES / "bert", tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    model = bert()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"non_linearity": "gelu"}, "non_linearity='relu', the model has 'gelu'"),
        ({"scaling": 2.0}, "scaling=1.0, the model has 2.0"),
        ({"residual_before_ln": False, "original_ln_after": False}, "residual_before_ln=True, the model has False"),
        ({"bottleneck": 3}, r"adapter_down.0.weight: \(4, 32\), expected \(3, 32\)"),
        ({"mh_adapter": True}, "mh_adapter=False, the model has True"),
        ({"leave_out": [0]}, "unexpected keys"),
        ({"task_type": None}, "unexpected keys: classifier"),
    ],
)
def test_a_model_adapted_otherwise(fields, message):
    model = peft_ops.adapt(build("bert"), AdapterConfig.pfeiffer(**{"bottleneck": 4, "task_type": "SEQ_CLS"} | fields))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.load_adapter(model, FIXTURES / "bert")
    assert_as_it_was(model, before)


def test_another_method_or_another_model():
    for model, message in (
        (peft_ops.adapt(llama(), peft_ops.LoRAConfig()), "is of another method: the model was adapted with LoRA"),
        (llama(), "missing keys"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            peft_ops.load_adapter(model, FIXTURES / "gpt2")
        assert_as_it_was(model, before)
