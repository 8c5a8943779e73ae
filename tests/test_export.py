"""Cases 27 and 30: torch.export keeps each op as one node, a 4-bit weight in 4 bits, and the results of eager."""

import io

import pytest
import torch

from peft_ops import nf4, ops

x, w = torch.randn(3, 64), torch.randn(32, 64)
a, b = torch.randn(4, 64), torch.randn(32, 4)
seed = torch.tensor(7)
q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
pk, pv = (torch.randn(4, 3, 16) for _ in range(2))
down, up = torch.randn(8, 64), torch.randn(64, 8)

PLAIN, NESTED = nf4.quantize(w), nf4.quantize(w, double_quant=True)

CALLS = {  # op -> a call of one dynamic input
    "nf4_linear": (lambda x: ops.nf4_linear(x, PLAIN, torch.ones(32)), x),
    "lora_linear": (lambda x: ops.lora_linear(x, w, None, a, b, 0.5, 0.1, seed), x),
    "lora_linear over nf4": (lambda x: ops.lora_linear(x, NESTED, None, a, b, 0.5), x),
    "dora_linear": (lambda x: ops.dora_linear(x, w, torch.ones(32), a, b, torch.ones(32), 0.5), x),
    "lora_embedding": (lambda i: ops.lora_embedding(i, w, torch.randn(4, 32), torch.randn(64, 4), 0.5),
                       torch.tensor([3, 1, 4])),
    "bottleneck_adapter": (lambda x: ops.bottleneck_adapter(x, down, None, up, torch.ones(64), residual=x), x),
    "prefix_attention": (lambda q: ops.prefix_attention(q, k, v, pk, pv, is_causal=True), q),
}  # fmt: skip


class Called(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


def operators(program):
    return [str(node.target) for node in program.graph.nodes if "peft_ops" in str(node.target)]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", CALLS)
def test_export_keeps_the_op(name):
    call, example = CALLS[name]
    state = torch.get_rng_state()
    expected = call(example)
    program = torch.export.export(Called(call), (example,), strict=False)
    assert operators(program) == [f"peft_ops.{name.split()[0]}.default"]
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    torch.set_rng_state(state)
    torch.testing.assert_close(torch.export.load(saved).module()(example), expected)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_layer_is_exported_with_rows_of_any_number(base):
    from peft_ops import nn

    linear = torch.nn.Linear(64, 32)
    layer = nn.LoRALinear.from_linear(nn.NF4Linear.from_linear(linear) if base == "nf4" else linear, r=4).eval()
    torch.nn.init.normal_(layer.lora_B)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert operators(program) == ["peft_ops.lora_linear.default"]
    stored = sum(t.nbytes for name, t in program.state_dict.items() if "lora" not in name)
    assert stored < 32 * 64 if base == "nf4" else stored >= 4 * 32 * 64
    more = torch.randn(9, 64)
    torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_fused_block_keeps_its_layers(base):
    from peft_ops import nn

    block = torch.nn.Module()
    for name, (n, k) in {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}.items():
        linear = torch.nn.Linear(k, n)
        layer = nn.LoRALinear.from_linear(nn.NF4Linear.from_linear(linear) if base == "nf4" else linear, r=4)
        torch.nn.init.normal_(layer.lora_B)
        block.add_module(name, layer)
    block.act_fn = torch.nn.SiLU()
    mlp = nn.GatedMLP.from_block(block).eval()
    program = torch.export.export(mlp, (x,), strict=False)
    assert operators(program) == ["peft_ops.lora_linear.default"] * 3
    torch.testing.assert_close(program.module()(x), mlp(x), rtol=1e-4, atol=1e-4)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("weight", [PLAIN, NESTED, w], ids=["nf4", "nested", "dense"])
def test_registered_ops_keep_torchs_rules(weight):
    from peft_ops.ops._exported import stored_weight

    arguments = x, *stored_weight(weight), None, a, b, 0.5, 0.1, seed
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(torch.ops.peft_ops.lora_linear.default, arguments, test_utils=checks)
