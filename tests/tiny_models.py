"""Small transformers models from configs, and what it means that a model is as it was."""

import copy

import torch
import transformers


def llama(**changes) -> torch.nn.Module:
    """Causal LM with grouped-query attention (k and v are narrower than q)."""
    config = transformers.LlamaConfig(
        initializer_range=0.2,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **changes,
    )
    return _seeded(transformers.LlamaForCausalLM, config)


def gpt2() -> torch.nn.Module:
    """Causal LM of Conv1D layers, weight [in, out], its head tied to the embedding."""
    config = transformers.GPT2Config(
        initializer_range=0.2,
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _seeded(transformers.GPT2LMHeadModel, config)


def bert() -> torch.nn.Module:
    """Sequence classification with biases everywhere and a classifier of its own."""
    config = transformers.BertConfig(
        initializer_range=0.2,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _seeded(transformers.BertForSequenceClassification, config)


def t5() -> torch.nn.Module:
    """Sequence to sequence: three kinds of attention, relative positions, no biases, an untied head."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=0.5,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return _seeded(transformers.T5ForConditionalGeneration, config)


BUILDERS = {"llama": llama, "gpt2": gpt2, "bert": bert}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def _seeded(cls, config) -> torch.nn.Module:
    torch.manual_seed(1)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(2))


def labels(model: torch.nn.Module) -> torch.Tensor:
    return torch.tensor([0, 2]) if hasattr(model, "classifier") else tokens()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def outcome(model: torch.nn.Module, mask: torch.Tensor | None = None, seed: int = 6) -> dict[str, torch.Tensor]:
    """{name: tensor}: logits and every gradient of a causal model on `tokens`; the seed is of dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    given = tokens()
    out = model(given, attention_mask=mask, labels=given)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two outcomes, to float32's rounding; one that is zero proves nothing."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.norm() > 0, name
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def train(model: torch.nn.Module, steps: int = 3, lr: float = 0.05) -> list[float]:
    """Losses of some steps of AdamW on one batch; leaves the model in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(tokens(), labels=labels(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def snapshot(model: torch.nn.Module) -> dict:
    """Everything that a failed operation must leave: values, types, flags, attributes of the root."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "identities": {name: id(tensor) for name, tensor in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": set(vars(model)),
    }


def assert_as_it_was(model: torch.nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert_same_bytes(after.pop("state"), before["state"])
    for what, value in after.items():
        assert value == before[what], what


def assert_same_bytes(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
