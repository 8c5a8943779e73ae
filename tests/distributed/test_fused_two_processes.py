"""Case 42 of a fused model: DDP and FSDP2 over two processes give the gradients of one. gloo, on CPUs."""

import copy
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peft_ops

CASES = [("ddp", "lora"), ("ddp", "qlora"), ("fsdp2", "lora")]


def model_of(method):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.2)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    kind = peft_ops.QLoRAConfig if method == "qlora" else peft_ops.LoRAConfig
    model = transformers.LlamaForCausalLM(config)
    return peft_ops.adapt(model, kind(r=4, target_modules="all-linear", init_lora_weights=False))


def loss_of(model, rank, world):
    tokens = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    return model(tokens, use_cache=False).logits.square().mean()


def one_of_two(rank, folder):
    """Runs in each process; raises where its gradients are not those of one process and of the model unfused."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    for wrap, method in CASES:
        compare(rank, wrap, method)
    dist.barrier()
    os._exit(0)  # tearing gloo down beside a process that has left already can wait for ever


def compare(rank, wrap, method):
    alone = model_of(method)
    loss_of(alone, 0, 1).backward()
    model = copy.deepcopy(alone)
    model.zero_grad()
    fused = peft_ops.fuse(model)
    assert len(fused.mlps) == len(fused.projections) == 2, fused
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    for part in (*model.model.layers, model) if wrap == "fsdp2" else ():
        fully_shard(part)
    loss_of(wrapped, rank, 2).backward()
    parameters = dict(model.named_parameters())
    for name, expected in alone.named_parameters():
        if expected.requires_grad:
            grad = parameters[name].grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(
                grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{wrap}, {method}: {n}: {m}"
            )  # fmt: skip
    assert all(m._peft_ops_projections.active for m in model.modules() if hasattr(m, "_peft_ops_projections"))


@pytest.mark.unpoisoned
def test_gradients_are_those_of_one_process(tmp_path):
    both = torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not both.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes do not end"
    finally:
        for process in both.processes:
            process.kill()
