"""A training step (forward and backward) of a Llama by what of it is trained: the backward ends at the lowest layer."""

import pytest
import torch

from benchmarks.measure import peak_bytes, sample, saved_bytes
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU, Shape
from peft_ops import FullConfig, PartialConfig, adapt

TRAINED = {
    "all": lambda layers: FullConfig(),
    "all layers": lambda layers: PartialConfig(num_top_layers=layers),
    "top half": lambda layers: PartialConfig(num_top_layers=layers // 2),
    "top quarter": lambda layers: PartialConfig(num_top_layers=layers // 4),
    "bottom quarter": lambda layers: PartialConfig(layers=range(layers // 4)),
}
# (batch, length, hidden size, MLP, layers, vocabulary)
SIZES = {"gpu": (4, 1024, 2048, 5632, 16, 32000), "cpu": (2, 128, 512, 1408, 8, 2048), "tiny": (2, 8, 32, 48, 4, 64)}


@pytest.mark.parametrize("contender", TRAINED)
def test_step(benchmark, note, request, contender):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tiny = request.config.getoption("--quick") or request.config.getoption("--benchmark-disable")
    batch, length, hidden, mlp, layers, vocabulary = SIZES["tiny" if tiny else "gpu" if ON_GPU else "cpu"]
    note("Llama step by what is trained", Shape(batch * length, mlp, hidden), f"{layers} layers")
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 32, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(DEVICE, DTYPE)
    adapt(model, TRAINED[contender](layers)).train()
    ids = torch.randint(vocabulary, (batch, length), device=DEVICE)

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    owned = [*model.parameters(), *model.buffers()]
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: model(ids, labels=ids).loss, owned)
    if ON_GPU:
        benchmark.extra_info["peak_bytes"] = peak_bytes(step)
    sample(benchmark, step, ON_GPU)
