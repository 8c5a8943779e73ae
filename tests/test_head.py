"""head_of: what a model's output embeddings compute, in whatever state they are."""

import pytest
import tiny_models
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_ops
from peft_ops.nn import Head, NF4Linear, head_of

HEAD = dict(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False)


def llama(config=None, quantised=False):
    model = tiny_models.llama()
    if quantised:
        model.lm_head = NF4Linear.from_linear(model.lm_head)
    return model if config is None else peft_ops.adapt(model, config)


def adapted(**changes):
    model = llama(peft_ops.LoRAConfig(**(HEAD | changes)))
    if changes:
        with torch.no_grad():
            model.lm_head.lora_B.normal_()
    return model


def disabled(model):
    model.context = peft_ops.adapters_disabled(model)
    model.context.__enter__()
    return model


def merged(model):
    model.lm_head.merge()
    return model


HEADS = {
    "dense": llama,
    "4 bits": lambda: llama(quantised=True),
    "LoRA": lambda: adapted(),
    "LoRA over 4 bits": lambda: llama(peft_ops.LoRAConfig(**HEAD), quantised=True),
    "rsLoRA": lambda: adapted(use_rslora=True),
    "PiSSA": lambda: adapted(init_lora_weights="pissa"),
    "PiSSA, off": lambda: disabled(adapted(init_lora_weights="pissa")),
    "LoftQ": lambda: llama(peft_ops.QLoRAConfig(**(HEAD | {"init_lora_weights": "loftq"}))),
    "LoftQ, off": lambda: disabled(llama(peft_ops.QLoRAConfig(**(HEAD | {"init_lora_weights": "loftq"})))),
    "LoRA, off": lambda: disabled(adapted()),
    "LoRA, merged": lambda: merged(adapted()),
    "DoRA, off": lambda: disabled(adapted(use_dora=True)),
    "trained whole": lambda: llama(peft_ops.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tied": lambda: peft_ops.adapt(tiny_models.gpt2(), peft_ops.LoRAConfig(r=2, target_modules=["c_attn"])),
}


@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_are_those_of_the_layer(kind):
    model = HEADS[kind]().eval()
    layer = model.get_output_embeddings()
    hidden = torch.randn(2, 5, model.config.hidden_size)
    logs = layer(hidden).float().log_softmax(-1)
    targets = torch.randint(logs.shape[-1], (2, 5))
    out = head_of(model).log_probs(hidden, targets, entropy=True)
    torch.testing.assert_close(out.logp, logs.gather(-1, targets[..., None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(logs.exp() * logs).sum(-1), rtol=1e-4, atol=1e-5)


def test_dropout_is_of_training_alone():
    model = adapted(lora_dropout=0.5)
    assert head_of(model.train()).dropout_p == 0.5
    assert head_of(model.eval()).dropout_p == 0.0


def test_a_transposed_layer():
    class Model(nn.Module):
        config = llama().config

        def get_output_embeddings(self):
            return self.head

    model = Model()
    model.head = Conv1D(11, 8)
    hidden, targets = torch.randn(4, 8), torch.randint(11, (4,))
    expected = model.head(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(head_of(model).log_probs(hidden, targets).logp, expected)
    model.head = nn.Embedding(11, 8)
    with pytest.raises(TypeError, match="the output head is a Embedding, not a linear layer"):
        head_of(model)


def test_dora_is_refused_while_it_is_on():
    with pytest.raises(TypeError, match="a DoRALinear scales its outputs"):
        head_of(adapted(use_dora=True))


def test_by_hand():
    """A Head of one's own takes what linear_logprob takes."""
    weight = torch.randn(11, 8)
    hidden, targets = torch.randn(4, 8), torch.randint(11, (4,))
    logs = (3.0 * torch.tanh(hidden @ weight.t() * 0.5 / 3.0) / 0.7).log_softmax(-1)
    out = Head(weight, logit_scale=0.5, softcap=3.0).log_probs(hidden, targets, temperature=0.7)
    torch.testing.assert_close(out.logp, logs.gather(-1, targets[:, None])[:, 0])
