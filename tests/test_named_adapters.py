"""Several LoRA adapters on one model: added, switched, combined, saved and merged by name."""

import copy
import pickle

import peft
import pytest
import torch
from tiny_models import assert_as_it_was, bert, llama, logits, snapshot, tokens, train

import peft_ops
from peft_ops import LoRAConfig, QLoRAConfig

FIRST = LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SECOND = LoRAConfig(r=2, lora_alpha=6, target_modules=["v_proj", "down_proj", "embed_tokens"], task_type="CAUSAL_LM")
THIRD = LoRAConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True, task_type="CAUSAL_LM")


def alone(config, seed):
    """A model with one adapter that is not the base."""
    torch.manual_seed(seed)
    model = peft_ops.adapt(llama(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def folders(tmp_path):
    """{name: folder of an adapter}."""
    found = {}
    for name, config, seed in (("a", FIRST, 1), ("b", SECOND, 2), ("c", THIRD, 3)):
        peft_ops.save_adapter(alone(config, seed), tmp_path / name)
        found[name] = tmp_path / name
    return found


@pytest.fixture
def model(folders):
    model = peft_ops.load_adapter(llama(), folders["a"], adapter_name="a")
    for name in ("b", "c"):
        peft_ops.load_adapter(model, folders[name], adapter_name=name)
    return model


def test_each_computes_what_it_does_alone(model, folders):
    assert peft_ops.adapter_names(model) == ["a", "b", "c"]
    for name in ("a", "c", "b", "a"):
        peft_ops.set_adapter(model, name)
        assert peft_ops.adapter_names(model)[0] == name
        only = peft_ops.load_adapter(llama(), folders[name])
        assert torch.equal(logits(model), logits(only))
        assert peft_ops.trainable_parameters(model) == peft_ops.trainable_parameters(only)
        assert model.state_dict().keys() == only.state_dict().keys()
        with peft_ops.adapters_disabled(model):
            assert torch.equal(logits(model), logits(llama()))


def test_training_one_leaves_the_others(model, folders):
    train(model)
    trained = logits(model)
    peft_ops.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(peft_ops.load_adapter(llama(), folders["b"])))
    train(model)
    peft_ops.set_adapter(model, "a")
    assert torch.equal(logits(model), trained)


def test_one_base_is_shared(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    for name in ("b", "c", "a"):
        assert peft_ops.set_adapter(model, name).model.layers[0].self_attn.v_proj.weight is weight


def test_adapt_adds_without_switching():
    model = peft_ops.adapt(llama(), FIRST)
    train(model)
    before = logits(model)
    peft_ops.adapt(model, SECOND, adapter_name="other")
    assert peft_ops.adapter_names(model) == ["default", "other"]
    assert torch.equal(logits(model), before)
    peft_ops.set_adapter(model, "other")
    assert torch.equal(logits(model), logits(llama()))
    peft_ops.delete_adapter(model, "default")
    assert peft_ops.adapter_names(model) == ["other"]


def test_saved_by_name_for_peft(model, folders, tmp_path):
    peft_ops.save_adapter(model, tmp_path / "again", adapter_name="b")
    assert peft_ops.adapter_names(model)[0] == "a"
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(logits(peft_ops.set_adapter(model, "b")), expected, rtol=1e-4, atol=1e-5)
    peft_ops.load_adapter(model, folders["a"], adapter_name="a")  # into the one that rests
    assert peft_ops.adapter_names(model)[0] == "b"


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
def test_weighted_sums_are_pefts(model, folders, how, weights):
    names = ["a", "c"] if how == "linear" else ["a", "b"]
    if how != "linear":  # PEFT's needs one kind of layer
        peft_ops.save_adapter(alone(LoRAConfig(r=2, target_modules=["v_proj", "down_proj"]), 2), folders["b"])
        peft_ops.delete_adapter(model, "b")
        peft_ops.load_adapter(model, folders["b"], adapter_name="b")
    peft_ops.add_weighted_adapter(model, names, weights, "sum", combination_type=how)
    assert peft_ops.adapter_names(model)[0] == "a"
    peft_ops.set_adapter(model, "sum")
    theirs = peft.PeftModel.from_pretrained(llama(), folders[names[0]], adapter_name=names[0])
    theirs.load_adapter(folders[names[1]], adapter_name=names[1])
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=how)
    theirs.set_adapter("sum")
    with torch.no_grad():
        expected = theirs.eval()(input_ids=tokens()).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_cat_is_the_exact_sum_whatever_the_layers(model):
    """Embeddings, layers that one of them has, other ranks, rsLoRA: the sum of the deltas."""
    peft_ops.add_weighted_adapter(model, ["a", "b", "c"], [0.5, 2.0, -1.0], "sum")
    base, deltas = llama(), {}
    for name, weight in (("a", 0.5), ("b", 2.0), ("c", -1.0)):
        peft_ops.set_adapter(model, name)
        for path, layer in model.named_modules():
            if hasattr(layer, "merged_weight"):
                own = base.get_submodule(path).weight
                deltas[path] = deltas.get(path, 0) + weight * (layer.merged_weight() - own)
    peft_ops.set_adapter(model, "sum")
    for path, delta in deltas.items():
        ours = model.get_submodule(path).merged_weight() - base.get_submodule(path).weight
        torch.testing.assert_close(ours, delta, rtol=1e-3, atol=1e-5)


def test_merging_several_drops_the_rest(model):
    peft_ops.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    expected = logits(peft_ops.set_adapter(model, "sum"))
    peft_ops.set_adapter(model, "c")
    peft_ops.merge(model, adapter_names=["a", "b"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="not adapted"):
        peft_ops.adapter_names(model)


def test_a_failed_merge_leaves_the_adapters(model):
    peft_ops.set_adapter(model, "b")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.lora_B.fill_(float("inf"))
    before = snapshot(model)
    peft_ops.set_adapter(model, "a")
    expected = logits(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        peft_ops.merge(model, adapter_names=["a", "b"])
    assert peft_ops.adapter_names(model)[0] == "a"
    assert sorted(peft_ops.adapter_names(model)) == ["a", "b", "c"]
    assert torch.equal(logits(model), expected)
    assert snapshot(peft_ops.set_adapter(model, "b"))["types"] == before["types"]


def test_16_bit_adapters_combine(model):
    model.bfloat16()
    for name in ("b", "c", "a"):
        peft_ops.set_adapter(model, name).bfloat16()
    peft_ops.add_weighted_adapter(model, ["a", "c"], [1.0, 1.0], "sum", combination_type="svd")
    assert logits(peft_ops.set_adapter(model, "sum")).isfinite().all()


def test_over_a_4_bit_base(folders):
    model = peft_ops.adapt(llama(), QLoRAConfig(r=4, target_modules="all-linear"))
    train(model)
    before = logits(model)
    packed = model.model.layers[0].mlp.up_proj.packed
    peft_ops.adapt(model, FIRST, adapter_name="second")
    peft_ops.set_adapter(model, "second")
    train(model)
    with peft_ops.adapters_disabled(model):
        base = logits(model)
    assert not torch.equal(logits(model), base)
    assert model.model.layers[0].mlp.up_proj.packed is packed
    assert torch.equal(logits(peft_ops.set_adapter(model, "default")), before)
    with pytest.raises(ValueError, match="which the first of them quantises"):
        peft_ops.adapt(peft_ops.adapt(llama(), FIRST), QLoRAConfig(target_modules=["q_proj"]), adapter_name="b")


def test_heads_belong_to_their_adapter():
    config = LoRAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft_ops.adapt(bert(), config)
    base = bert().classifier.weight
    train(model)
    own = model.classifier.weight.clone()
    peft_ops.adapt(model, config, adapter_name="second")
    peft_ops.set_adapter(model, "second")
    assert torch.equal(model.classifier.weight, base)
    train(model)
    peft_ops.set_adapter(model, "default")
    assert torch.equal(model.classifier.weight, own)
    with pytest.warns(UserWarning, match="that default, second trained whole are not combined"):
        peft_ops.add_weighted_adapter(model, ["default", "second"], [0.5, 0.5], "sum")


def test_copies_pickles_and_dtypes(model):
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for name in ("a", "b"):
        assert torch.equal(logits(peft_ops.set_adapter(twin, name)), logits(peft_ops.set_adapter(model, name)))
    train(twin)
    assert not torch.equal(logits(twin), logits(model))
    twin.double()
    assert logits(peft_ops.set_adapter(twin, "b")).dtype == torch.float64
    assert logits(peft_ops.set_adapter(twin, "a")).dtype == torch.float64


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: peft_ops.set_adapter(m, "x"), ValueError, "no adapter is called 'x'; there are: a, b, c"),
        (lambda m: peft_ops.delete_adapter(m, "a"), ValueError, "'a' is active: set_adapter to another first"),
        (lambda m: peft_ops.adapt(m, FIRST, adapter_name="b"), ValueError, "'b' exists already"),
        (lambda m: peft_ops.adapt(m, FIRST, adapter_name="x.y"), ValueError, "must be a string without dots"),
        (lambda m: peft_ops.adapt(m, FIRST), ValueError, "already adapted"),
        (lambda m: peft_ops.adapt(m, LoRAConfig(target_modules=["no"]), adapter_name="x"), ValueError, "matches no"),
        (lambda m: peft_ops.adapt(m, peft_ops.PromptTuningConfig(), adapter_name="x"), ValueError, "only LoRA can"),
        (lambda m: peft_ops.add_weighted_adapter(m, ["a"], [1.0, 2.0], "s"), ValueError, "must be as many"),
        (lambda m: peft_ops.add_weighted_adapter(m, ["a", "z"], [1.0, 2.0], "s"), ValueError, "is called 'z'"),
        (lambda m: peft_ops.add_weighted_adapter(m, ["a", "b"], [1, 1], "s", "linear"), ValueError, "of equal rank"),
        (lambda m: peft_ops.add_weighted_adapter(m, ["a", "b"], [1, 1], "c"), ValueError, "'c' exists already"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(model, act, error, message):
    before, expected = snapshot(model), logits(model)
    with pytest.raises(error, match=message):
        act(model)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model), expected)
    assert peft_ops.adapter_names(model) == ["a", "b", "c"]


def test_other_methods_take_no_second_adapter():
    model = peft_ops.adapt(llama(), peft_ops.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="takes no second adapter"):
        peft_ops.adapt(model, FIRST, adapter_name="x")
    loftq = QLoRAConfig(r=2, target_modules="all-linear", init_lora_weights="loftq")
    with pytest.raises(ValueError, match="made a base for its adapter alone"):
        peft_ops.adapt(peft_ops.adapt(llama(), loftq), FIRST, adapter_name="x")
    dora = peft_ops.adapt(llama(), LoRAConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(TypeError, match="only plain LoRA can be combined"):
        peft_ops.add_weighted_adapter(dora, ["default"], [1.0], "s")
