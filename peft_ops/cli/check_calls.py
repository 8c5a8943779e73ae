"""How `peft-ops check` calls each op: `package` is ops, or the formulas with the same names and arguments."""

import torch

from .. import ops

P, SEED, SCALING = 0.1, 7, 2.0


def nf4_linear(package, weight, x, bias):
    return package.nf4_linear(x, weight, bias)


def lora_linear(p, package, weight, x, bias, a, b):
    return package.lora_linear(x, weight, bias, a, b, SCALING, p, torch.tensor(SEED, device=x.device))


def lora_projections(package, weight, x, bias, a, b, a2):
    """[M, 2 N]: two layers over one weight."""
    seeds = torch.arange(SEED, SEED + 2, device=x.device)
    return torch.cat(package.lora_projections(x, _two(weight, bias, a, b, a2), seeds), 1)


def gated_mlp(package, weight, x, bias, a, b, a2, down):
    seeds = torch.arange(SEED, SEED + 3, device=x.device)
    return package.gated_mlp(x, *_two(weight, bias, a, b, a2), ops.Projection(down), "silu", seeds)


def _two(weight, bias, a, b, a2):
    return ops.Projection(weight, bias, a, b, SCALING, P), ops.Projection(weight, None, a2, b, SCALING, P)


def dora_linear(package, weight, x, bias, a, b, magnitude):
    seed = torch.tensor(SEED, device=x.device)
    return package.dora_linear(x, weight, bias, a, b, magnitude, SCALING, P, seed)


def bottleneck_adapter(package, _, x, down, down_bias, up, up_bias, residual=None):
    onto = x if residual is None else residual
    return package.bottleneck_adapter(x, down, down_bias, up, up_bias, "gelu", SCALING, onto)


def lora_embedding(x, package, _, table, a, b):
    return package.lora_embedding(x, table, a, b, SCALING)


def linear_logprob(targets, package, weight, x, bias, a=None, b=None):
    """[2, M]: log-probabilities and entropies, of capped logits."""
    if package is ops:
        out = ops.linear_logprob(
            x, weight, bias, targets, a, b, SCALING, logit_scale=SCALING, softcap=5.0, temperature=0.7, entropy=True
        )
        assert out.entropy is not None
        return torch.stack((out.logp, out.entropy))
    results = package.linear_logprob(x, weight, bias, a, b, targets, SCALING, 0.0, None, SCALING, 5.0, 0.7, -100)
    return torch.stack(results)


def prefix_attention(p, package, weight, q, k, v, pk, pv):
    seed = torch.tensor(SEED, device=q.device)
    return package.prefix_attention(q, k, v, pk, pv, q.shape[-1] ** -0.5, None, True, None, 0.0, p, seed)


def attention(package, weight, q, k, v):
    """Row t of M sees keys up to t + 2 of M + 2, but for key 1."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(2)
    mask[:, 1] = False
    return package.attention(q, k, v, q.shape[-1] ** -0.5, mask, False)
