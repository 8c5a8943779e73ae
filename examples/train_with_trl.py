"""TRL's trainers on a model adapted by peft-ops, our log-prob op in them. Needs trl; runs on a CPU in seconds, offline.

python examples/train_with_trl.py [sft|dpo|kto|grpo|reward] [folder for the adapter]
"""

import inspect
import json
import logging
import random
import sys
import tempfile

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import peft_ops
from peft_ops.rlhf.trl import ReferenceModel, use_fused_head, use_reference

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, one for padding and one for the end; nothing to download."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<end>"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def tiny(cls: type = transformers.LlamaForCausalLM, **changes) -> transformers.PreTrainedModel:
    """An untrained Llama for those tokens."""
    torch.manual_seed(0)
    special = dict(pad_token_id=256, eos_token_id=257, bos_token_id=None)
    return cls(transformers.LlamaConfig(vocab_size=258, **special, **SIZES, **changes))


def data(trainer: str, n: int = 32) -> Dataset:
    """Python's documentation of itself: how a docstring goes on is good, how another does is bad."""
    members = [member for module in (inspect, random, json, logging) for _, member in inspect.getmembers(module)]
    texts = [doc for member in members if callable(member) and len(doc := inspect.getdoc(member) or "") > 80][:n]
    rows = [
        {"prompt": doc[:32], "chosen": doc[32:64], "rejected": other[-32:]}
        for doc, other in zip(texts, reversed(texts), strict=True)
    ]
    if trainer == "sft":
        return Dataset.from_list([{"text": doc[:80]} for doc in texts])
    if trainer == "kto":
        good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
        bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows]
        return Dataset.from_list([row for pair in zip(good, bad, strict=True) for row in pair])
    return Dataset.from_list([{"prompt": row["prompt"]} for row in rows] if trainer == "grpo" else rows)


def letters(completions: list[str], **_) -> list[float]:
    """The reward of GRPO: the share of letters."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def bare(trainer: str, model: transformers.PreTrainedModel, out: str, **settings) -> transformers.Trainer:
    """The trainer as TRL makes it, of a model that is adapted."""
    common = dict(
        output_dir=out, report_to="none", use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        learning_rate=1e-2, per_device_train_batch_size=4, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    common.update(settings)
    given = dict(model=model, processing_class=byte_tokenizer(), train_dataset=data(trainer))
    if trainer == "grpo":  # beta stays at 0 here: with another, TRL would load a second model
        arguments = trl.GRPOConfig(num_generations=4, max_completion_length=8, temperature=0.9, **common)
        return trl.GRPOTrainer(args=arguments, reward_funcs=letters, **given)
    if trainer == "sft":
        return trl.SFTTrainer(args=trl.SFTConfig(max_length=96, **common), **given)
    if trainer == "reward":
        return trl.RewardTrainer(args=trl.RewardConfig(max_length=96, **common), **given)
    given["ref_model"] = ReferenceModel(model)  # without one, TRL would load a second model
    if trainer == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(max_length=96, **common), **given)
    return trl.KTOTrainer(args=trl.KTOConfig(max_length=96, **common), **given)


def make(trainer: str, model: transformers.PreTrainedModel, out: str, **settings) -> transformers.Trainer:
    """The same with our head, and the model itself as the reference."""
    made = bare(trainer, model, out, **settings)
    if trainer == "grpo":
        use_reference(made, beta=0.04)
    return made if trainer == "reward" else use_fused_head(made)  # a reward is no log-prob


def main(trainer: str = "dpo", folder: str = "adapter", steps: int = 10) -> list[float]:
    if trainer == "reward":
        model = tiny(transformers.LlamaForSequenceClassification, num_labels=1)
        config = peft_ops.LoRAConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")  # trains `score` whole
    else:
        model = tiny()
        config = peft_ops.LoRAConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    peft_ops.adapt(model, config)
    print(peft_ops.trainable_parameters(model))
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        made = make(trainer, model, out, max_steps=int(steps))
        made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    peft_ops.save_adapter(model, folder)  # the adapter alone; trainer.save_model would write the whole model
    print(f"{trainer}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter saved in {folder}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
