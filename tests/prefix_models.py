"""What the tests of prefix-tuning and P-tuning v2 share: models, inputs, prefixes written and read in one row."""

import torch
import transformers
from tiny_models import TASKS, _seeded, bert, gpt2, llama, t5, tokens

import peft_ops
from peft_ops import PrefixTuningConfig
from peft_ops.tuning.adaptation import adaptation_of

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.2, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
N = 4


def of(model_class: str, config_class: str, **changes):
    return lambda: _seeded(
        getattr(transformers, model_class), getattr(transformers, config_class)(**{**TINY, **changes})
    )


roberta = of(
    "RobertaForTokenClassification", "RobertaConfig", max_position_embeddings=34, pad_token_id=1, type_vocab_size=1,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
)  # fmt: skip
opt = of("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
neox = of("GPTNeoXForCausalLM", "GPTNeoXConfig", max_position_embeddings=32)
phi3 = of("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, max_position_embeddings=32)
qwen3 = of("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=16, max_position_embeddings=32)
gemma3 = of(
    "Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    sliding_window=64,
)  # fmt: skip
umt5 = of(
    "UMT5ForConditionalGeneration", "UMT5Config", d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
    decoder_start_token_id=0, dropout_rate=0.0, initializer_factor=2.0,
)  # fmt: skip
bart = of(
    "BartForConditionalGeneration", "BartConfig", d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    max_position_embeddings=32, dropout=0.0, decoder_start_token_id=0, eos_token_id=1,
)  # fmt: skip

BUILDERS = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "roberta": roberta, "opt": opt, "neox": neox, "phi3": phi3,
    "qwen3": qwen3, "gemma3": gemma3, "umt5": umt5, "bart": bart,
}  # fmt: skip
SEQ2SEQ = ("t5", "umt5", "bart")
TASK = {
    **dict.fromkeys(BUILDERS, "CAUSAL_LM"),
    **TASKS,
    "roberta": "TOKEN_CLS",
    "umt5": TASKS["t5"],
    "bart": TASKS["t5"],
}


def inputs(name: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of 9 tokens; where padded, the second is short: at its left for causal models, else at its right."""
    ids = tokens().clamp(min=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(0, 3) if TASK[name] == "CAUSAL_LM" else slice(6, 9)] = 0
        ids = torch.where(mask.bool(), ids, 1 if name == "roberta" else 0)
    decoder = {"decoder_input_ids": tokens(length=5)} if name in SEQ2SEQ else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def outputs(model: torch.nn.Module, name: str, padded: bool = False, **changes) -> torch.Tensor:
    """Logits of the tokens that are no padding."""
    given = inputs(name, padded)
    with torch.no_grad():
        logits = model(**given | changes).logits
    return logits[given["attention_mask"].bool()] if logits.shape[:2] == given["input_ids"].shape else logits


def adapted(name: str, config=PrefixTuningConfig, **fields) -> torch.nn.Module:
    """The model with prefixes of N(0, 1), so that they have a say."""
    fields = {"num_virtual_tokens": N, "task_type": TASK[name], **fields}
    return peft_ops.adapt(BUILDERS[name](), config(**fields))


def prefixes(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{path of the attention module: its prefix}."""
    adaptation = adaptation_of(model)
    return {site.path: adaptation.prefix(model, site) for site in adaptation.sites}


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    kind = TASK[name]
    labels = torch.tensor([0, 2]) if kind == "SEQ_CLS" else tokens() % 3 if kind == "TOKEN_CLS" else tokens()
    return model(**given, labels=labels).loss
