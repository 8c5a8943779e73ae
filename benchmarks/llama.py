"""Llamas of random weights, adapters on all seven linear layers of a block, by contender: `build(shape) -> model`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import peft_ops
from benchmarks.contenders import FUSED, OURS
from benchmarks.peers import ALPHA, R, _needs, bitsandbytes_linear
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU, Step

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(shape: Step) -> nn.Module:
    """The same weights for every contender, made where they stay."""
    transformers = _needs("transformers")
    config = transformers.LlamaConfig(
        hidden_size=shape.K, intermediate_size=shape.N, num_hidden_layers=shape.layers, vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, max_position_embeddings=shape.length,
        rope_theta=500000.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def ours(shape: Step) -> nn.Module:
    of_method = peft_ops.QLoRAConfig if shape.method == "QLoRA" else peft_ops.LoRAConfig
    config = of_method(r=R, lora_alpha=ALPHA, lora_dropout=shape.p, target_modules=LINEAR)
    return peft_ops.adapt(base(shape), config)


def ours_fused(shape: Step) -> nn.Module:
    if not hasattr(peft_ops, "fuse"):
        pytest.skip("this revision has no fuse")  # benchmarks.compare
    model = ours(shape)
    fused = peft_ops.fuse(model)
    assert fused.mlps, fused.left
    return model


def peft(shape: Step) -> nn.Module:
    """PEFT; over bitsandbytes' 4-bit layers where the method is QLoRA."""
    package, model = _needs("peft"), base(shape).requires_grad_(False)
    if shape.method == "QLoRA":
        for name, layer in list(model.named_modules()):
            if name.rpartition(".")[2] in LINEAR:
                model.set_submodule(name, bitsandbytes_linear(layer, shape.p))
        model.is_loaded_in_4bit = True
    config = package.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=shape.p, target_modules=list(LINEAR))
    return package.get_peft_model(model, config)


def full(shape: Step) -> nn.Module:
    """Every parameter trained, without adapters and dropout; on a CPU beside every row, whose targets it is."""
    if ON_GPU and (shape.method != "LoRA" or shape.p):
        pytest.skip("full fine-tuning is the same step in every row")
    return base(shape)


LLAMA = {OURS: ours, FUSED: ours_fused, "PEFT": peft, "full fine-tuning": full}


def training_step(model: nn.Module, shape: Step) -> tuple[Callable, torch.optim.Optimizer]:
    """A step without arguments (forward, backward and AdamW on random tokens; returns the loss), and its optimizer."""
    model.train()
    if shape.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(shape.vocabulary, (shape.M // shape.length, shape.length), device=DEVICE)

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer
