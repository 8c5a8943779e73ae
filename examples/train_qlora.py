"""QLoRA on a small Llama, the whole loop: adapt, train, save, load again, merge. Runs on a CPU in seconds.

python examples/train_qlora.py [folder for the adapter]
"""

import inspect
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_ops

SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def main(folder: str = "adapter", steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **SIZES)
    base = LlamaForCausalLM(config).state_dict()

    def fresh() -> LlamaForCausalLM:
        model = LlamaForCausalLM(config)
        model.load_state_dict(base)
        return model

    wanted = peft_ops.QLoRAConfig(
        r=8, lora_alpha=16, target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],  # this base is untrained: its bytes are learnt too
    )  # fmt: skip
    model = peft_ops.adapt(fresh(), wanted)
    print(peft_ops.trainable_parameters(model))

    text = torch.tensor(list(inspect.getsource(inspect).encode()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 64, (8,))
        batch = torch.stack([text[s : s + 64] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")

    peft_ops.save_adapter(model, folder)
    again = peft_ops.load_adapter(fresh(), folder)  # over the dense base: what NF4 rounds away comes back
    peft_ops.merge(again)
    print(f"last loss {losses[-1]:.3f}; adapter saved in {folder}, loaded and merged into a dense model")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
