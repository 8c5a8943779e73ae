"""A whole training step of a Llama (forward, backward, AdamW): tokens per second and peak memory.

LoRA and QLoRA on all seven linear layers of every block; under QLoRA PEFT stands over bitsandbytes.
"""

import pytest

from benchmarks.llama import LLAMA, training_step
from benchmarks.measure import sample, total_peak_bytes
from benchmarks.shapes import ON_GPU


@pytest.mark.parametrize("contender", LLAMA)
def test_step(benchmark, note, step_shape, contender):
    note("Llama step", step_shape, step_shape.variant)
    model = LLAMA[contender](step_shape)
    step, optimizer = training_step(model, step_shape)
    step()  # the optimizer's state is made
    state = [t for of_one in optimizer.state.values() for t in of_one.values()]
    held = [*model.parameters(), *model.buffers(), *state]
    benchmark.extra_info["peak_bytes"] = total_peak_bytes(step, held)
    sample(benchmark, step, ON_GPU)
    if not benchmark.disabled:
        benchmark.extra_info["tokens_per_s"] = step_shape.M / benchmark.stats.stats.median
