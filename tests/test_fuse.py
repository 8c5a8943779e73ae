"""peft_ops.fuse: the same model, its gated MLPs and its query, key and value projections in one op each."""

import copy
import pickle

import pytest
import tiny_models
import torch
from tiny_models import assert_same, outcome
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_ops
from peft_ops.nn import GatedMLP, LoRALinear
from peft_ops.ops.gated_mlp import activation_of

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
)  # fmt: skip
FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")
CONFIGS = {
    "LoRA": lambda **c: peft_ops.LoRAConfig(
        **{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **c}
    ),
    "QLoRA": lambda **c: peft_ops.QLoRAConfig(
        **{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **c}
    ),
    "PiSSA": lambda **c: peft_ops.LoRAConfig(
        **{"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa", **c}
    ),
}


def build(family="Llama"):
    torch.manual_seed(1)
    options = {"head_dim": 8} if family in ("Qwen3", "Gemma") else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def adapted(family="Llama", method="LoRA", **changes):
    model = build(family)
    torch.manual_seed(5)
    return peft_ops.adapt(model, CONFIGS[method](**changes))


def groups(model):
    return [m._peft_ops_projections for m in model.modules() if hasattr(m, "_peft_ops_projections")]


@pytest.fixture
def calls(monkeypatch):
    """How often each op was called."""
    from peft_ops.nn import gated_mlp, projection_group

    counted = {"gated_mlp": 0, "lora_projections": 0}

    def count(module, name):
        op = getattr(module, name)

        def counting(*args):
            counted[name] += 1
            return op(*args)

        monkeypatch.setattr(module, name, counting)

    count(gated_mlp, "gated_mlp")
    count(projection_group, "lora_projections")
    return counted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "p"), [("LoRA", 0.0), ("LoRA", 0.2), ("QLoRA", 0.2), ("PiSSA", 0.0)])
def test_logits_and_gradients_are_those_of_the_model(family, method, p, calls):
    """With dropout too, whose masks are drawn in the same order."""
    model = adapted(family, method, lora_dropout=p).train()
    expected = outcome(model)
    fused = peft_ops.fuse(model)
    assert len(fused.mlps) == len(fused.projections) == 2
    assert fused.left == {}
    assert set(fused.projections.values()) == {("q_proj", "k_proj", "v_proj")}
    assert_same(outcome(model), expected)
    assert calls == {"gated_mlp": 2 + 4, "lora_projections": 2}  # each MLP was tried twice


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradient_checkpointing(reentrant, p, calls):
    model = adapted(lora_dropout=p).train()
    expected = outcome(model)
    peft_ops.fuse(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(outcome(model), expected)
    assert_same(outcome(model), expected)
    assert all(group.active and group._pending is None for group in groups(model))
    assert calls["lora_projections"] == 8  # two layers, forward and again, twice


def test_it_trains_as_the_model_does():
    losses = []
    for fuse in (False, True):
        model = adapted()
        if fuse:
            peft_ops.fuse(model)
        losses.append(tiny_models.train(model, steps=4))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_unfuse_puts_everything_back(method):
    """Types, identities, flags, attributes, state; twice fused is as once."""
    model = adapted(method=method).train()
    modules, before = dict(model.named_modules()), tiny_models.snapshot(model)
    state = model.state_dict().keys()
    first = peft_ops.fuse(model)
    assert model.state_dict().keys() == state
    assert peft_ops.fuse(model) == first
    peft_ops.unfuse(model)
    tiny_models.assert_as_it_was(model, before)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert not groups(model)
    assert all(layer._group is None for layer in model.modules() if isinstance(layer, LoRALinear))
    assert peft_ops.unfuse(model) is model


def test_hooks_of_a_block_stay_through_it():
    model = adapted()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    peft_ops.fuse(model)
    assert not seen  # the trial goes past them
    tiny_models.logits(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("second"))
    peft_ops.unfuse(model)
    tiny_models.logits(model)
    assert seen == ["GatedMLP", "LlamaMLP", "second"]
    handle.remove()


def test_the_trial_leaves_the_generator_and_modes_alone():
    model = adapted(lora_dropout=0.2).train()
    model.model.layers[0].mlp.gate_proj.eval()
    state, modes = torch.get_rng_state(), {n: m.training for n, m in model.named_modules()}
    peft_ops.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "PiSSA"])
def test_switching_off_and_merging(method):
    model = adapted(method=method)
    on = tiny_models.logits(model)
    with peft_ops.adapters_disabled(model):
        off = tiny_models.logits(model)
    peft_ops.fuse(model)
    torch.testing.assert_close(tiny_models.logits(model), on, rtol=1e-4, atol=1e-4)
    with peft_ops.adapters_disabled(model):
        torch.testing.assert_close(tiny_models.logits(model), off, rtol=1e-4, atol=1e-4)
    layer = model.model.layers[0].self_attn.k_proj
    if method == "LoRA":
        layer.merge()
        torch.testing.assert_close(tiny_models.logits(model), on, rtol=1e-4, atol=1e-4)
        layer.unmerge()
    peft_ops.merge(model)
    torch.testing.assert_close(tiny_models.logits(model), on, rtol=1e-3, atol=1e-3)
    peft_ops.unfuse(model)
    torch.testing.assert_close(tiny_models.logits(model), on, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(m, GatedMLP | LoRALinear) for m in model.modules())


def test_layers_that_are_replaced_are_freed():
    """After a merge nothing of the adapter is held."""
    import gc
    import weakref

    model = adapted()
    peft_ops.fuse(model)
    tiny_models.logits(model)
    layers = [weakref.ref(m) for m in model.modules() if isinstance(m, LoRALinear)]
    peft_ops.merge(model)
    gc.collect()
    assert all(layer() is None for layer in layers)


def test_saving_and_loading(tmp_path):
    """Into a fused model and out of one; one that was fused before it was adapted is grouped then."""
    model = adapted()
    expected = tiny_models.logits(model)
    peft_ops.fuse(model)
    peft_ops.save_adapter(model, tmp_path)
    fresh = build()
    peft_ops.fuse(fresh)
    assert not groups(fresh)
    peft_ops.load_adapter(fresh, tmp_path)
    assert len(groups(fresh)) == 2
    torch.testing.assert_close(tiny_models.logits(fresh), expected, rtol=1e-4, atol=1e-4)
    plain = peft_ops.load_adapter(build(), tmp_path)
    torch.testing.assert_close(tiny_models.logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_named_adapters(calls):
    """Exchanged layers are grouped again, DoRA's are called alone."""
    model = peft_ops.adapt(build(), CONFIGS["LoRA"](), adapter_name="first")
    peft_ops.adapt(model, CONFIGS["LoRA"](r=2, target_modules=["q_proj", "v_proj", "up_proj"]), adapter_name="second")
    peft_ops.adapt(model, CONFIGS["LoRA"](use_dora=True), adapter_name="third")
    expected = {}
    for name in ("third", "second", "first"):
        peft_ops.set_adapter(model, name)
        expected[name] = outcome(model)
    peft_ops.fuse(model)
    for name, grouped in (("second", 2), ("third", 0), ("first", 2)):
        peft_ops.set_adapter(model, name)
        calls["lora_projections"] = 0
        assert_same(outcome(model), expected[name])
        assert calls["lora_projections"] == grouped, name
    peft_ops.unfuse(model)
    peft_ops.set_adapter(model, "second")
    assert_same(outcome(model), expected["second"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_independent(how, calls):
    model = adapted().train()
    peft_ops.fuse(model)
    outcome(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    calls["lora_projections"] = 0
    expected = outcome(model)
    assert_same(outcome(copied), expected)
    assert calls["lora_projections"] == 4
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert_same(outcome(model), expected)
    peft_ops.unfuse(copied)
    assert not any(isinstance(m, GatedMLP) for m in copied.modules())


def test_a_layer_is_copied_without_its_group():
    model = adapted()
    peft_ops.fuse(model)
    layer = model.model.layers[0].self_attn.q_proj
    alone = copy.deepcopy(layer)
    assert alone._group is None
    x = torch.randn(3, 32)
    torch.testing.assert_close(alone(x), layer(x))  # the group's sums are of another width
    assert len(pickle.dumps(alone)) < 4 * sum(p.nbytes for p in alone.parameters())


class Block(nn.Module):
    """A gated MLP; `change` makes it another."""

    def __init__(self, change=None):
        super().__init__()
        self.gate_proj, self.up_proj = (LoRALinear(16, 24, r=2) for _ in range(2))
        self.down_proj, self.act_fn, self.change = LoRALinear(24, 16, r=2), nn.SiLU(), change
        if change == "child":
            self.norm = nn.LayerNorm(16)
        if change == "activation":
            self.act_fn = nn.Mish()
        if change == "DoRA":
            self.up_proj = LoRALinear.from_linear(nn.Linear(16, 24), use_dora=True)
        if change == "hook":
            self.up_proj.register_forward_hook(lambda *_: None)

    def forward(self, x):
        if self.change == "raises":
            raise RuntimeError("no")
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h = nn.functional.dropout(h, 0.2, self.training and self.change == "dropout")
        return self.down_proj(h * 1.01 if self.change == "scale" else h)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("child", "block has also norm"),
        ("activation", "one op cannot compute act_fn"),
        ("DoRA", r"one op cannot compute up_proj \(DoRALinear\)"),
        ("hook", r"one op cannot compute up_proj \(LoRALinear\)"),
        ("scale", "its forward is not down_proj"),
        ("dropout", "its forward is not down_proj"),
        ("raises", "its forward raises RuntimeError on two tokens: no"),
        ("meta", "it is on the meta device"),
    ],
)
def test_what_is_left_and_why(change, reason):
    model = nn.Sequential(Block(change), Block())
    model[0].to("meta" if change == "meta" else "cpu")
    before = model[0]
    fused = peft_ops.fuse(model)
    assert fused.mlps == ["1"]
    assert model[0] is before
    import re

    assert re.match(reason, fused.left["0"]), fused.left


def test_a_gated_mlp_calls_its_children_where_it_has_to(calls):
    """Hooks that came later, another activation, an exchanged child; and what the op does not know."""
    block = Block()
    mlp, x = GatedMLP.from_block(block), torch.randn(3, 16)
    torch.testing.assert_close(mlp(x), block(x))
    seen = []
    handle = block.down_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(mlp(x), block(x))
    assert len(seen) == 2
    handle.remove()
    assert calls["gated_mlp"] == 1
    mlp.act_fn = nn.Mish()
    torch.testing.assert_close(mlp(x), block(x))
    assert calls["gated_mlp"] == 1
    mlp.act_fn = nn.SiLU()
    mlp.up_proj = nn.Identity()
    assert block.up_proj is mlp.up_proj
    with pytest.raises(TypeError, match="block lacks act_fn, down_proj, gate_proj, up_proj"):
        GatedMLP.from_block(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_new"), (nn.ReLU(), "relu"),
        (nn.functional.silu, "silu"), (transformers.activations.ACT2FN["gelu_new"], "gelu_new"),
        (transformers.activations.ACT2FN["gelu_pytorch_tanh"], "gelu_new"), (nn.LeakyReLU(0.1), None),
        (transformers.activations.ACT2FN["quick_gelu"], None), (transformers.activations.ACT2FN["gelu_10"], None),
        (nn.ReLU6(), None), (nn.PReLU(), None), (nn.Softmax(-1), None), (len, None),
    ],
)  # fmt: skip
def test_activations_are_known_by_what_they_compute(function, name):
    assert activation_of(function) == name


def test_a_shared_block_stays_shared():
    block = Block()
    model = nn.ModuleDict({"a": block, "b": block})
    peft_ops.fuse(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], GatedMLP)
    peft_ops.unfuse(model)
    assert model["a"] is model["b"] is block


class Attention(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (LoRALinear(16, n, r=2, lora_dropout=p) for n in (16, 8, 8))
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.lora_B)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return self.q_proj(x), self.k_proj(memory), self.v_proj(memory)


def attention():
    """(one that is fused, its group, one like it that is not)."""
    plain = Attention()
    model = nn.ModuleDict({"attention": copy.deepcopy(plain)})
    peft_ops.fuse(model)
    return model["attention"], groups(model)[0], plain


def assert_as(ours, theirs):
    for y, z in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


def test_cross_attention_turns_its_group_off(calls):
    layer, group, plain = attention()
    x, memory = torch.randn(3, 16), torch.randn(5, 16)
    for _ in range(3):
        assert_as(layer(x, memory), plain(x, memory))
    assert not group.active
    assert group._pending is None
    assert calls["lora_projections"] == 1


def test_results_are_for_the_very_x_alone(calls):
    """Not for an equal one, nor for one that was written to."""
    layer, group, plain = attention()
    x = torch.randn(3, 16)
    layer.q_proj(x)
    y = layer.k_proj(x.clone())
    torch.testing.assert_close(y, plain.k_proj(x))
    x.mul_(2)
    torch.testing.assert_close(layer.k_proj(x), plain.k_proj(x))
    torch.testing.assert_close(layer.v_proj(x), plain.v_proj(x))
    assert calls["lora_projections"] == 1
    assert group.active


@pytest.mark.parametrize("change", ["step", "mode", "off", "merge", "scaling", "replaced", "grad", "autocast"])
def test_results_are_for_the_layers_as_they_were(change):
    """What happens between two layers is seen by the second."""
    layer, _, plain = attention()
    x = torch.randn(3, 16)
    layer.q_proj(x)
    for k in (layer.k_proj, plain.k_proj):
        if change == "step":
            with torch.no_grad():
                k.lora_A.add_(1.0)
        if change == "replaced":
            k.lora_A = nn.Parameter(torch.ones(2, 16))
        if change == "mode":
            k.lora_dropout = 1.0
        if change == "off":
            k.adapter_enabled = False
        if change == "merge":
            k.merge()
        if change == "scaling":
            k.scaling = 7.0
    with torch.set_grad_enabled(change != "grad"), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        y, expected = layer.k_proj(x), plain.k_proj(x)
    torch.testing.assert_close(y, expected)
    assert y.requires_grad == expected.requires_grad


@pytest.mark.parametrize("how", ["off", "merged", "hooked", "inference", "vmap"])
def test_where_layers_compute_alone(how, calls):
    layer, group, plain = attention()
    x = torch.randn(2, 3, 16)
    for module in (layer, plain):
        if how == "off":
            module.v_proj.adapter_enabled = False
        if how == "merged":
            module.v_proj.merge()
        if how == "hooked":
            module.v_proj.register_forward_hook(lambda m, args, y: y + 1)
    if how == "inference":
        with torch.inference_mode():
            x = torch.randn(2, 3, 16)
            assert_as(layer(x), plain(x))
    elif how == "vmap":
        assert_as(torch.vmap(layer)(x), plain(x))
    else:
        assert_as(layer(x), plain(x))
    assert calls["lora_projections"] == 0
    assert group.active
    assert group._pending is None


def test_an_exception_between_two_layers_does_no_harm():
    layer, _, plain = attention()
    x, other = torch.randn(3, 16), torch.randn(3, 16)
    layer.q_proj(x)
    with pytest.raises(ValueError, match="x must be"):
        layer.k_proj(torch.randn(3, 15))
    for given in (other, x, other):
        assert_as(layer(given), plain(given))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_attention_alone(reentrant):
    layer, group, plain = attention()
    results = []
    for module in (layer, plain):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2):
            ys = checkpoint(module, x, use_reentrant=reentrant)
            sum(y.square().sum() for y in ys).backward()
        results.append([x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == 7
    assert_as(*results)
    assert group.active


def test_outputs_may_be_written_to():
    """As by a model that scales its queries in place."""
    layer, _, plain = attention()
    grads = []
    for module in (layer, plain):
        x = torch.ones(3, 16, requires_grad=True)
        q, k, v = module(x)
        (q.mul_(0.5).sum() + k.square().sum() + v.sum()).backward()
        grads.append((x.grad, module.q_proj.lora_B.grad))
    assert_as(*grads)


@pytest.mark.unpoisoned
def test_torch_compile_traces_the_layers_alone():
    layer, group, plain = attention()
    mlp = GatedMLP.from_block(block := Block())
    x = torch.randn(3, 16)
    compiled = torch.compile(lambda x: (*layer(x), mlp(x)), backend="aot_eager", fullgraph=True)
    assert_as(compiled(x), (*plain(x), block(x)))
    assert group.active
    assert group._pending is None
    torch._dynamo.reset()


def saved_bytes(function, x, own):
    """Bytes that autograd keeps, but for what lies in the parameters; what is kept twice counts once."""
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(x)
    del y
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("p", "most"), [(0.0, 0.60), (0.1, 0.45)])
def test_a_block_keeps_less_than_pefts(p, most):
    """bf16 base, float32 adapters as get_peft_model makes them; Llama's proportions."""
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(**SIZES | dict(hidden_size=64, intermediate_size=224, num_hidden_layers=1))
    options = dict(r=8, lora_dropout=p, target_modules=["gate_proj", "up_proj", "down_proj"])
    bytes_kept = {}
    for name in ("peft", "ours"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
        if name == "peft":
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).base_model.model
        else:
            peft_ops.adapt(model, peft_ops.LoRAConfig(**options))
            assert peft_ops.fuse(model).mlps
        mlp = model.train().model.layers[0].mlp
        own = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        assert any(p.dtype == torch.float32 for p in mlp.parameters())
        x = torch.randn(2, 64, 64).bfloat16().requires_grad_()
        bytes_kept[name] = saved_bytes(mlp, x, own)
    rows, s = 128, 3 * 8 * 4
    assert bytes_kept["ours"] == rows * (2 * (64 + 2 * 224) + s) + (24 if p else 0)
    assert bytes_kept["ours"] <= most * bytes_kept["peft"]


@pytest.mark.parametrize(
    "config",
    [
        peft_ops.AdapterConfig.parallel(mh_adapter=True, bottleneck=4, task_type="CAUSAL_LM"),
        peft_ops.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft_ops.FullConfig(task_type="CAUSAL_LM"),
    ],
    ids=["parallel adapters", "prefix-tuning", "full"],
)
def test_models_of_other_methods(config):
    """Their MLPs are frozen, have hooks, or are trained whole."""
    model = peft_ops.adapt(build(), config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p) * p.requires_grad)
    expected = outcome(model)
    fused = peft_ops.fuse(model)
    assert len(fused.mlps) == 2
    assert fused.projections == {}
    assert_same(outcome(model), expected)
    peft_ops.unfuse(model)
    assert_same(outcome(model), expected)
