"""Full and partial fine-tuning: what is trained, where the backward ends, checkpoints, and what is refused."""

import copy
import json
import pickle
import re

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
from torch.utils.flop_counter import FlopCounterMode

import peft_ops
from peft_ops import FullConfig, LoRAConfig, PartialConfig, QLoRAConfig

ALL = {**BUILDERS, "t5": t5}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def named(model, pattern):
    """Parameters whose name starts with the pattern."""
    return {name for name, _ in model.named_parameters() if re.match(pattern, name)}


def gradients(model, training=True):
    torch.manual_seed(7)
    model.train(training)
    model.zero_grad()
    model(tokens(), labels=labels(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALL)
def test_full_trains_everything_in_place(name):
    model = ALL[name]()
    before = snapshot(model)
    assert peft_ops.adapt(model.requires_grad_(False), FullConfig(task_type=TASKS[name])) is model
    after = snapshot(model)
    assert after["identities"] == before["identities"]
    assert after["types"] == before["types"]
    assert all(after["requires_grad"].values())
    count = peft_ops.trainable_parameters(model)
    assert (count.trainable, count.share) == (sum(p.numel() for p in model.parameters()), 1.0)
    losses = train(model, steps=8, lr=0.01)
    assert losses[-1] < 0.8 * losses[0]
    assert [n for n, p in model.named_parameters() if torch.equal(p, before["state"][n])] == []


def test_full_leaves_out_what_is_excluded():
    model = peft_ops.adapt(llama(), FullConfig(exclude_modules=["embed_tokens", "mlp"]))
    assert trainable(model) == named(model, r"(?!.*(embed_tokens|mlp))")
    model = peft_ops.adapt(llama(), FullConfig(exclude_modules=r"model\.layers\.[01]"))
    assert trainable(model) == named(model, r"(?!model\.layers\.[01]\.)")


CHOICES = [
    ("llama", {"num_top_layers": 1}, r"model\.layers\.2\."),
    ("llama", {"num_top_layers": 3}, r"model\.layers\."),
    ("llama", {"frozen_bottom_layers": 1}, r"model\.layers\.[12]\."),
    ("llama", {"frozen_bottom_layers": 0}, r"model\.layers\."),
    ("llama", {"layers": [0, -1]}, r"model\.layers\.[02]\."),
    ("llama", {"layers": range(2)}, r"model\.layers\.[01]\."),
    ("llama", {"layers": 1}, r"model\.layers\.1\."),
    ("llama", {"layer_names": ["layers.1", "lm_head"]}, r"model\.layers\.1\.|lm_head"),
    ("llama", {"layer_names": r".*\.[12]\.mlp"}, r"model\.layers\.[12]\.mlp"),
    ("llama", {"num_top_layers": 1, "final_norm": True, "head": True}, r"model\.layers\.2\.|model\.norm|lm_head"),
    ("llama", {"layers": [0], "embeddings": True}, r"model\.layers\.0\.|model\.embed"),
    ("llama", {"num_top_layers": 1, "modules_to_save": ["lm_head"]}, r"model\.layers\.2\.|lm_head"),
    ("llama", {"head": True}, r"lm_head"),
    ("gpt2", {"num_top_layers": 1, "final_norm": True}, r"transformer\.(h\.1\.|ln_f)"),
    ("gpt2", {"layers": [0], "embeddings": True, "head": True}, r"transformer\.(h\.0\.|w[tp]e)"),
    ("bert", {"num_top_layers": 1, "task_type": "SEQ_CLS"}, r"bert\.encoder\.layer\.1\.|classifier"),
    ("bert", {"num_top_layers": 1, "head": True}, r"bert\.encoder\.layer\.1\.|classifier"),
    ("bert", {"embeddings": True}, r"bert\.embeddings\."),
    ("t5", {"num_top_layers": 1}, r"decoder\.block\.1\."),
    ("t5", {"num_top_layers": 3}, r"encoder\.block\.1\.|decoder\.block"),
    ("t5", {"layers": [0, 2]}, r"(en|de)coder\.block\.0\."),
    ("t5", {"layers_pattern": "encoder.block", "num_top_layers": 1}, r"encoder\.block\.1\."),
    ("t5", {"num_top_layers": 1, "final_norm": True}, r"decoder\.block\.1\.|(en|de)coder\.final_layer_norm"),
    ("t5", {"layers": [0], "embeddings": True, "head": True}, r"encoder\.block\.0\.|shared"),
]


@pytest.mark.parametrize(("name", "fields", "pattern"), CHOICES)
def test_partial_trains_what_is_chosen(name, fields, pattern):
    model = ALL[name]()
    before = snapshot(model)
    peft_ops.adapt(model, PartialConfig(**fields))
    expected = named(model, pattern)
    assert trainable(model) == expected != set()
    assert snapshot(model)["identities"] == before["identities"]
    numel = sum(p.numel() for n, p in model.named_parameters() if n in expected)
    assert peft_ops.trainable_parameters(model).trainable == numel
    train(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before["state"][n])}
    assert moved <= expected
    assert moved


class Plain(nn.Module):
    """No transformers model: two lists of layers, one within the other's layers, and an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)] * 5)}) for _ in "ab"])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = sum(expert(x) for expert in block["experts"])
        return x


def test_layers_of_any_module():
    model = peft_ops.adapt(Plain(), PartialConfig(num_top_layers=1))
    assert trainable(model) == named(model, r"blocks\.1\.")
    model = peft_ops.adapt(Plain(), PartialConfig(layers=[0], layers_pattern="stem"))
    assert trainable(model) == named(model, r"stem\.0\.")
    assert trainable(peft_ops.adapt(nn.Linear(2, 2), FullConfig())) == {"weight", "bias"}


def test_the_layers_are_the_language_models_where_another_stack_is_larger():
    model = llama()
    model.vision = nn.ModuleList([nn.Linear(200, 200) for _ in range(5)])
    peft_ops.adapt(model, PartialConfig(num_top_layers=1))
    assert trainable(model) == named(model, r"model\.layers\.2\.")


def test_counts_of_an_8b_llama():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    peft_ops.adapt(model, FullConfig())
    assert peft_ops.trainable_parameters(model).trainable == 8_030_261_248
    peft_ops.merge(model)
    peft_ops.adapt(model, PartialConfig(num_top_layers=2))
    attention, mlp = 4096 * 4096 * 2 + 4096 * 1024 * 2, 3 * 4096 * 14336
    assert peft_ops.trainable_parameters(model).trainable == 2 * (attention + mlp + 2 * 4096) == 436_224_000


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_full_fine_tuning(name):
    full = gradients(peft_ops.adapt(ALL[name]().double(), FullConfig()))
    partial = gradients(peft_ops.adapt(ALL[name]().double(), PartialConfig(num_top_layers=1)))
    assert 0 < len(partial) < len(full)
    for parameter, grad in partial.items():
        assert grad.abs().max() > 0, parameter
        torch.testing.assert_close(grad, full[parameter], rtol=1e-8, atol=1e-12)


def backward_flops(loss):
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_the_backward_ends_at_the_lowest_trained_layer():
    """It has the floating-point operations of the top layer alone, and nothing below is saved for it."""
    model = peft_ops.adapt(llama(), PartialConfig(num_top_layers=1)).train()
    running, saved, inputs = [None], {}, {}

    def enters(module, args, kwargs, i):
        running[0], inputs[i] = i, (args, kwargs)

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, a, k, i=i: enters(m, a, k, i), with_kwargs=True)

    def pack(tensor):
        saved[running[0]] = saved.get(running[0], 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
    assert saved.keys() == {2}
    assert [args[0].requires_grad for args, _ in inputs.values()] == [False, False, False]
    partial = backward_flops(loss)

    (hidden, *_), kwargs = inputs[2]
    top = model.lm_head(model.model.norm(model.model.layers[2](hidden, **kwargs)))
    assert partial == backward_flops(nn.functional.cross_entropy(top[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()))

    full = backward_flops(peft_ops.adapt(llama(), FullConfig())(tokens(), labels=tokens()).loss)
    assert 0 < partial < 0.5 * full


def enable_checkpointing(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


CHECKPOINTED = [
    ("llama", PartialConfig(num_top_layers=1)),
    ("llama", PartialConfig(layers=[0, 2])),
    ("llama", PartialConfig(layers=[1], embeddings=True)),
    ("llama", PartialConfig(head=True)),
    ("llama", FullConfig()),
    ("gpt2", PartialConfig(num_top_layers=1)),
    ("bert", PartialConfig(num_top_layers=1, task_type="SEQ_CLS")),
    ("bert", FullConfig()),
    ("t5", PartialConfig(num_top_layers=1)),
    ("t5", PartialConfig(layers=[1, 3])),
    ("t5", PartialConfig(layers=[0], final_norm=True)),
    ("t5", FullConfig()),
]


def with_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize(("name", "config"), CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients(name, config, reentrant, before):
    expected = gradients(peft_ops.adapt(with_dropout(ALL[name]().double()), config))
    model = with_dropout(ALL[name]().double())
    if before:
        enable_checkpointing(model, reentrant)
    peft_ops.adapt(model, config)
    if not before:
        enable_checkpointing(model, reentrant)
    actual = gradients(model)
    assert actual.keys() == expected.keys() == trainable(model)
    for parameter, grad in expected.items():
        assert grad.any(), parameter
        torch.testing.assert_close(actual[parameter], grad, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_checkpointing_computes_no_frozen_bottom_layer_again(reentrant, before):
    model, runs = llama(), [0, 0, 0]
    if before:
        enable_checkpointing(model, reentrant)
    peft_ops.adapt(model, PartialConfig(num_top_layers=1))
    if not before:
        enable_checkpointing(model, reentrant)

    def count(i):
        runs[i] += 1

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: count(i))
    assert gradients(model).keys() == named(model, r"model\.layers\.2\.")
    assert runs == [1, 1, 2]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_leaves_the_users_tensors():
    model = peft_ops.adapt(llama(), PartialConfig(layers=[0]))
    enable_checkpointing(model, reentrant=True)
    embedded = model.model.embed_tokens(tokens()).detach()
    model.train()(inputs_embeds=embedded, labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    assert not embedded.requires_grad
    assert embedded.grad is None


def test_layers_that_checkpoint_around_their_hooks_get_open_embeddings():
    """transformers 5.0 checkpoints `__call__`; there the old way is taken."""
    model = llama()
    kind = type(model.model.layers[0])

    class Layer(kind):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    for module in model.model.layers:
        module.__class__ = Layer
    enable_checkpointing(model, reentrant=True)
    assert peft_ops.adapt(model, PartialConfig(num_top_layers=1)).model.embed_tokens._forward_hooks
    plain = llama()
    enable_checkpointing(plain, reentrant=True)
    assert not peft_ops.adapt(plain, PartialConfig(num_top_layers=1)).model.embed_tokens._forward_hooks


@pytest.mark.parametrize("config", [FullConfig(), PartialConfig(num_top_layers=1)])
def test_no_copy_of_the_base_is_kept(config):
    model = peft_ops.adapt(llama(), config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(full|partial) fine-tuning trains .* keeps no copy of the base model"):
        peft_ops.adapters_disabled(model).__enter__()
    with pytest.raises(ValueError, match="nothing to eject"):
        peft_ops.eject(model)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("config", [FullConfig(), PartialConfig(num_top_layers=1)])
def test_merge_ends_it(config):
    model = peft_ops.adapt(llama(), config)
    train(model)
    trained = copy.deepcopy(model.state_dict())
    assert peft_ops.merge(model) is model
    assert_same_bytes(model.state_dict(), trained)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    peft_ops.adapt(model, LoRAConfig(r=2))
    assert_same_bytes({n: t for n, t in model.state_dict().items() if n in trained}, trained)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("config", [FullConfig(), PartialConfig(num_top_layers=1)])
def test_copies_are_exact_and_independent(config, tmp_path):
    model = peft_ops.adapt(llama(), config)
    train(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded
    state = copy.deepcopy(model.state_dict())
    for other in others:
        assert_same_bytes(other.state_dict(), state)
        assert trainable(other) == trainable(model)
        enable_checkpointing(other, reentrant=True)
        assert gradients(other).keys() == trainable(model)
        train(other)
        assert not torch.equal(logits(other), logits(model))
    assert_same_bytes(model.state_dict(), state)
    assert peft_ops.trainable_parameters(model.to(torch.bfloat16)) == peft_ops.trainable_parameters(others[0])


@pytest.mark.parametrize("kind", [FullConfig, PartialConfig])
def test_generates_from_a_cache_what_a_forward_gives(kind):
    model = peft_ops.adapt(llama(), kind(**({} if kind is FullConfig else {"num_top_layers": 2})))
    train(model)
    made = model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = model(made).logits.argmax(-1)
    assert torch.equal(made[:, 9:], again[:, 8:-1])


SAVED = [
    ("llama", FullConfig()),
    ("gpt2", FullConfig()),
    ("t5", FullConfig(fp32_masters=True)),
    ("llama", PartialConfig(num_top_layers=2, final_norm=True)),
    ("llama", PartialConfig(layers=range(2), modules_to_save=("lm_head",))),
    ("llama", PartialConfig(layer_names=r".*\.1\.mlp")),
    ("gpt2", PartialConfig(frozen_bottom_layers=1, embeddings=True, head=True)),
    ("bert", PartialConfig(num_top_layers=1, task_type="SEQ_CLS")),
    ("t5", PartialConfig(layers=-1, layers_pattern="encoder.block")),
]


@pytest.mark.parametrize(("name", "config"), SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_holds_what_was_trained(name, config, dtype, tmp_path):
    model = peft_ops.adapt(ALL[name]().to(dtype), config)
    train(model)
    peft_ops.save_adapter(model, tmp_path)
    tensors = peft_ops.checkpoint.files.read_safetensors(tmp_path / WEIGHTS)
    assert tensors.keys() == trainable(model)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert "peft_type" not in saved
    assert saved["peft_ops_method"] == ("FULL" if isinstance(config, FullConfig) else "PARTIAL")
    loaded = peft_ops.load_adapter(ALL[name]().to(dtype), tmp_path)
    assert_same_bytes(loaded.state_dict(), model.state_dict())
    assert trainable(loaded) == trainable(model)
    again = peft_ops.load_adapter(peft_ops.adapt(ALL[name]().to(dtype), config), tmp_path)
    assert_same_bytes(again.state_dict(), model.state_dict())


def test_buffers_that_are_kept_are_saved_with_what_is_trained(tmp_path):
    def norms():
        return nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)})

    model = peft_ops.adapt(norms(), PartialConfig(layer_names=["b"]))
    for norm in model.values():
        norm.train()(torch.randn(8, 4))
    peft_ops.save_adapter(model, tmp_path)
    fresh = peft_ops.load_adapter(norms(), tmp_path)
    assert torch.equal(fresh["b"].running_mean, model["b"].running_mean)
    assert fresh["b"].num_batches_tracked == 1
    assert fresh["a"].num_batches_tracked == 0


@pytest.mark.parametrize("config", [FullConfig(), PartialConfig(num_top_layers=2, head=True)])
def test_a_run_goes_on_from_a_checkpoint(config, tmp_path):
    def run(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = peft_ops.adapt(llama(), config)
    optimizer = peft_ops.optimizer_for(model, torch.optim.AdamW, lr=0.02)
    run(model, optimizer, 3)
    peft_ops.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = run(model, optimizer, 3)
    model = peft_ops.load_adapter(llama(), tmp_path)
    optimizer = peft_ops.optimizer_for(model, torch.optim.AdamW, lr=0.02)
    optimizer.load_state_dict(state)
    assert run(model, optimizer, 3) == expected


def spoil_config(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"num_top_layers": 9}))


def spoil_type(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"num_top_layers": "one"}))


def spoil_weights(folder):
    file = folder / WEIGHTS
    tensors = peft_ops.checkpoint.files.read_safetensors(file)
    first = min(tensors)
    tensors["unknown"] = tensors.pop(first)
    peft_ops.checkpoint.files.tensor_writer(tensors)(file)


def cut_short(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_config, ValueError, "num_top_layers=9, but the model has 3 layers"),
        (spoil_type, TypeError, r"adapter_config.json: num_top_layers must be an int, got 'one'"),
        (spoil_weights, ValueError, "missing keys: .*; unexpected keys: unknown"),
        (cut_short, ValueError, "adapter_model.safetensors is corrupt or truncated"),
    ],
)
def test_a_spoiled_checkpoint_leaves_the_model(spoil, error, message, tmp_path):
    peft_ops.save_adapter(peft_ops.adapt(llama(), PartialConfig(num_top_layers=1)), tmp_path)
    spoil(tmp_path)
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("adapted", "message"),
    [
        (PartialConfig(num_top_layers=2), "missing keys: model.layers.1"),
        (FullConfig(), "the checkpoint is of peft_ops_method PARTIAL"),
        (LoRAConfig(), "is of another method: the model was adapted with LoRA"),
    ],
)
def test_a_checkpoint_of_something_else_leaves_the_model(adapted, message, tmp_path):
    peft_ops.save_adapter(peft_ops.adapt(llama(), PartialConfig(num_top_layers=1)), tmp_path)
    model = peft_ops.adapt(llama(), adapted)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.load_adapter(model, tmp_path)
    assert_as_it_was(model, before)


def quantised():
    return peft_ops.merge(peft_ops.adapt(llama(), QLoRAConfig(r=2, target_modules="all-linear")), requantize=True)


def with_integers():
    model = llama()
    model.model.layers[1].mlp.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    return model


BAD = [
    (llama, PartialConfig(num_top_layers=4), r"num_top_layers=4, but the model has 3 layers \(model.layers.0 to model"),
    (llama, PartialConfig(frozen_bottom_layers=3), "=3 leaves none to train: the model has 3 layers"),
    (llama, PartialConfig(layers=[0, 3, -4]), "layers has 3, -4, but the model has 3 layers"),
    (llama, PartialConfig(layers=0, layers_pattern="blocks"), "has no list of layers at layers_pattern='blocks'"),
    (llama, PartialConfig(layer_names=["mlp", "mpl"]), "layer_names: 'mpl' matches no module; .* named model, .*mlp"),
    (llama, PartialConfig(layer_names="mlp"), "layer_names: 'mlp' matches no module"),
    (llama, PartialConfig(modules_to_save=["nrom"]), r"modules_to_save=\['nrom'\] matches no module"),
    (llama, PartialConfig(), "the config leaves nothing to train"),
    (bert, PartialConfig(final_norm=True), "final_norm=True, but BertForSequenceClassification has none"),
    (lambda: nn.Linear(2, 2), PartialConfig(num_top_layers=1), "Linear has no list of layers"),
    (gpt2, PartialConfig(num_top_layers=1, head=True), "lm_head.weight is tied to transformer.wte.weight, .* frozen"),
    (gpt2, PartialConfig(embeddings=True), "transformer.wte.weight is tied to lm_head.weight, .* frozen"),
    (gpt2, FullConfig(exclude_modules=["lm_head"]), "transformer.wte.weight is tied to lm_head.weight"),
    (llama, FullConfig(exclude_modules=["q_porj"]), r"exclude_modules=\['q_porj'\] matches no module; .*q_proj"),
    (llama, FullConfig(exclude_modules=r".*"), "the config leaves nothing to train"),
    (llama, FullConfig(modules_to_save=["nrom"]), r"modules_to_save=\['nrom'\] matches no module"),
    (quantised, FullConfig(), "model.layers.0.self_attn.q_proj is quantised to NF4 and cannot be trained in place"),
    (quantised, PartialConfig(num_top_layers=1), "model.layers.2.self_attn.q_proj is quantised to NF4"),
    (with_integers, FullConfig(), r"model.layers.1.mlp.codes \(torch.uint8\) cannot be trained in place"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "config", "message"), BAD)
def test_a_failed_adapt_leaves_the_model(build, config, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peft_ops.adapt(model, config)
    assert_as_it_was(model, before)


def test_what_is_not_quantised_of_an_nf4_model_is_trained():
    model = peft_ops.adapt(quantised(), PartialConfig(layer_names=["model.norm"], head=True))
    assert trainable(model) == {"model.norm.weight", "lm_head.weight"}
    assert train(model)[-1] < train(quantised_and_frozen())[0]


def quantised_and_frozen():
    return peft_ops.adapt(quantised(), PartialConfig(head=True))


def test_the_bias_of_a_head_that_its_parent_holds_too():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = peft_ops.adapt(transformers.BertForMaskedLM(config), PartialConfig(embeddings=True, head=True))
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert trainable(model) == named(model, r"bert\.embeddings") | {"cls.predictions.bias"}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_top_layers": 0}, ValueError, "num_top_layers must be at least 1, got 0"),
        ({"num_top_layers": True}, TypeError, "num_top_layers must be an int, got True"),
        ({"frozen_bottom_layers": -1}, ValueError, "frozen_bottom_layers must be at least 0, got -1"),
        ({"layers": "all"}, TypeError, "layers must be an int or a list of ints, got 'all'"),
        ({"layers": [1.5]}, TypeError, r"layers must be an int or a list of ints, got \[1.5\]"),
        ({"layers": True}, TypeError, "layers must be an int or a list of ints, got True"),
        ({"layers": []}, ValueError, "layers must name a layer, got none"),
        ({"layer_names": []}, ValueError, "layer_names must name a module, got none"),
        ({"layer_names": "("}, ValueError, "layer_names '.' is not a regular expression"),
        ({"layer_names": 3}, TypeError, "layer_names must be a string, a list of strings or None, got 3"),
        ({"layers": 1, "num_top_layers": 1}, ValueError, "give one of .*, got num_top_layers and layers"),
        ({"head": "yes"}, TypeError, "head must be True or False, got 'yes'"),
        ({"fp32_masters": 1}, TypeError, "fp32_masters must be True or False, got 1"),
        ({"layers_pattern": 1}, TypeError, "layers_pattern must be a string, a list of strings or None, got 1"),
        ({"task_type": "POETRY"}, ValueError, "task_type must be None or one of .*, got 'POETRY'"),
    ],
)
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        PartialConfig(**fields)


def test_bad_full_configs():
    with pytest.raises(TypeError, match="exclude_modules must be a string, a list of strings or None, got 3"):
        FullConfig(exclude_modules=3)
    with pytest.raises(TypeError, match="fp32_masters must be True or False, got 'no'"):
        FullConfig(fp32_masters="no")
