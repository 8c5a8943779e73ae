"""Log-probs through a LoRA'd head inside DDP and FSDP2 over two processes: the gradients of one process."""

import copy
import os
import time
from datetime import timedelta

import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peft_ops
from peft_ops.rlhf.trl import use_fused_head

pytest.importorskip("trl")  # needs Python >= 3.11

CASES = [("ddp", "dense"), ("fsdp2", "dense"), ("fsdp2", "nf4")]


def model_of(base):
    torch.manual_seed(0)
    model = tiny_models.llama()
    if base == "nf4":
        model.lm_head = peft_ops.nn.NF4Linear.from_linear(model.lm_head)
    config = peft_ops.LoRAConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return use_fused_head(peft_ops.adapt(model, config))


def loss_of(model, rank, world):
    tokens = torch.randint(64, (4, 10), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    return -model(tokens, labels=tokens, fused_lm_head=True).log_probs.mean()


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    for wrap, base in CASES:
        compare(rank, wrap, base)
    dist.barrier()
    os._exit(0)  # tearing gloo down beside a process that has left already can wait for ever


def compare(rank, wrap, base):
    alone = model_of(base)
    loss_of(alone, 0, 1).backward()
    model = copy.deepcopy(alone)
    model.zero_grad()
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    for layer in (*model.model.layers, model) if wrap == "fsdp2" else ():
        fully_shard(layer)
    loss_of(wrapped, rank, 2).backward()
    parameters = dict(model.named_parameters())
    trained = [name for name, p in alone.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained)
    for name in trained:
        expected = dict(alone.named_parameters())[name].grad
        assert expected.abs().max() > 0, name
        message = lambda m, n=name: f"{wrap}, {base}: {n}: {m}"
        torch.testing.assert_close(full(parameters[name].grad), expected, msg=message)


@pytest.mark.unpoisoned
def test_gradients_are_those_of_one_process(tmp_path):
    both = torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not both.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes wait for each other"
    finally:
        for process in both.processes:
            process.kill()
