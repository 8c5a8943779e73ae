"""The stages that learn from their own samples: PPO on the reward model, GRPO on the reward that can be checked."""

from abc import abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from ..nn.head import head_of
from ..ops import TokenLogProbs
from ..rlhf import (
    gae,
    group_advantages,
    grpo_loss,
    kl_rewards,
    log1mexp,
    masked_sum,
    ppo_policy_loss,
    ppo_value_loss,
    reference_policy,
    whiten,
)  # fmt: skip
from ..rlhf.rollout import IGNORED, Completions, completion_hidden, pad, sample
from ..tuning.named import activated
from .rlhf_data import Pair
from .rlhf_preference import ScalarHead, encode_prompts, scores
from .rlhf_stage import Metrics, Shared, Stage
from .rlhf_verify import LENGTH_FLOOR, verified_share

_MEASURED = 128  # held-out prompts
_MISSING_END = 1.0  # what is taken off the score of a sample that does not end; the reward model saw none
_EPOCHS, _MINIBATCHES = 2, 2
_VALUE_WEIGHT = 0.1


class Scored(NamedTuple):
    """logp, reference: [B, C] of the policy and of the sft adapter; hidden: [B, C, K] of the policy."""

    logp: torch.Tensor
    reference: torch.Tensor
    hidden: torch.Tensor


def log_probs(
    shared: Shared, hidden: torch.Tensor, batch: Completions, least: int, reference_hidden: torch.Tensor | None = None
) -> TokenLogProbs:
    """Of samples, [B, C], as they were drawn: where the end token was ruled out, the others share its probability.

    Without that a policy could raise the probability of an end that is not drawn, and so lower that of what is: its KL
    would fall, and PPO would be paid for it.
    """
    head = head_of(shared.model)
    found = head.log_probs(hidden, batch.targets, reference_hidden=reference_hidden)
    if not least:
        return found
    early = batch.mask.clone()
    early[:, least:] = False
    ends = torch.where(early, shared.end, IGNORED)
    end = head.log_probs(hidden, ends, reference_hidden=reference_hidden)
    logp, reference = (
        None if of is None or at is None else of - torch.where(early, log1mexp(torch.where(early, at, -1.0)), 0.0)
        for of, at in ((found.logp, end.logp), (found.reference, end.reference))
    )
    assert logp is not None
    return TokenLogProbs(logp, reference=reference)


def score_policy(shared: Shared, batch: Completions, least: int) -> Scored:
    """Log-probs of samples under the active adapter and, in the same pass of the head, under the reference."""
    with reference_policy(shared.model, "sft"):
        reference_hidden = completion_hidden(shared.model, batch)
    hidden = completion_hidden(shared.model, batch)
    found = log_probs(shared, hidden, batch, least, reference_hidden)
    assert found.reference is not None
    return Scored(found.logp, found.reference, hidden)


def divergence(found: Scored, batch: Completions) -> float:
    """KL to the reference, nats per completion: the mean log-ratio of what the policy drew."""
    return masked_sum(found.logp.detach() - found.reference, batch.mask).mean().item()


def verified(shared: Shared, pairs: Sequence[Pair], batch: Completions) -> torch.Tensor:
    """[B]: the reward that can be checked."""
    texts = [shared.tokenizer.decode([t for t in row if t != shared.end]) for row in batch.lists()]
    rewards = [verified_share(pair.prompt, text) for pair, text in zip(pairs, texts, strict=True)]
    return torch.tensor(rewards, device=shared.device)


class Online(Stage):
    """A stage that is measured by samples for held-out prompts, drawn with the same seed each time.

    least: tokens of a sample before it may end.
    """

    least = 0

    def roll_out(self, pairs: Sequence[Pair], generator: torch.Generator) -> Completions:
        """A sample of the active adapter for the prompt of every pair."""
        shared, most = self.shared, self.plan.max_new_tokens
        prompts = pad(encode_prompts(shared, pairs), [[]] * len(pairs)).to(shared.device)
        return sample(
            shared.model, prompts.prompts, prompts.prompt_mask, most, shared.end,
            generator=generator, min_new_tokens=self.least,
        )  # fmt: skip

    def evaluate(self) -> Metrics:
        pairs = self.shared.pairs.held_out[:_MEASURED]
        batch = self.roll_out(pairs, self.generator(-1))
        with torch.no_grad():
            found = score_policy(self.shared, batch, self.least)
        length = batch.mask.sum(dim=1).float().mean().item()
        return self.rewards(pairs, batch) | {"kl": divergence(found, batch), "length": length}

    @abstractmethod
    def rewards(self, pairs: Sequence[Pair], batch: Completions) -> Metrics:
        """What is measured of samples, `reward` first."""


class PPO(Online):
    """Proximal policy optimisation: reward model minus KL to the sft adapter, GAE, clipped policy and value.

    The value is a linear head on the policy's hidden states, which it does not train: they are detached.
    """

    name, number = "ppo", 3
    least = LENGTH_FLOOR  # the pairs have nothing shorter: a sample that ends at once is nothing the reward model knows

    def own_heads(self) -> dict[str, nn.Linear]:
        self.value = ScalarHead(self.shared)
        return {"value": self.value}

    def rewards(self, pairs: Sequence[Pair], batch: Completions) -> Metrics:
        reward = self.model_scores(batch).mean().item()
        return {"reward": reward, "verified": verified(self.shared, pairs, batch).mean().item()}

    @torch.no_grad()
    def model_scores(self, batch: Completions) -> torch.Tensor:
        """[B]: of the reward model, less for a sample without its end."""
        with activated(self.shared.model, "reward"):
            found = scores(self.shared, self.shared.heads["score"], batch)
        ended = ((batch.completions == self.shared.end) & batch.mask).any(dim=1)
        return found - _MISSING_END * (~ended).float()

    def step(self, number: int) -> Metrics:
        pairs = self.batch(number)
        batch = self.roll_out(pairs, self.generator(number))
        reward = self.model_scores(batch)
        with torch.no_grad():
            old = score_policy(self.shared, batch, self.least)
            values = self.value(old.hidden)[..., 0]
            per_token = kl_rewards(reward, old.logp, old.reference, batch.mask, self.plan.kl_coef)
            advantages, returns = gae(per_token, values, batch.mask)
            advantages = whiten(advantages, batch.mask)
        generator, clipped = self.generator(number), []
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(batch), generator=generator).to(reward.device).chunk(_MINIBATCHES):
                part = batch[rows]
                hidden = completion_hidden(self.shared.model, part)
                logp = log_probs(self.shared, hidden, part, self.least).logp
                policy = ppo_policy_loss(logp, old.logp[rows], advantages[rows], part.mask)
                found = self.value(hidden.detach())[..., 0]
                value = ppo_value_loss(found, values[rows], returns[rows], part.mask)
                self.update(policy.loss + _VALUE_WEIGHT * value)
                clipped.append(policy.clip_fraction.item())
        return {"reward": reward.mean().item(), "kl": divergence(old, batch), "clipped": fmean(clipped)}


class GRPO(Online):
    """Group-relative policy optimisation of the reward that can be checked; one update per batch of groups."""

    name, number = "grpo", 4

    def rewards(self, pairs: Sequence[Pair], batch: Completions) -> Metrics:
        return {"reward": verified(self.shared, pairs, batch).mean().item()}

    def step(self, number: int) -> Metrics:
        pairs = [pair for pair in self.batch(number) for _ in range(self.plan.group_size)]
        batch = self.roll_out(pairs, self.generator(number))
        reward = verified(self.shared, pairs, batch)
        advantages = group_advantages(reward, self.plan.group_size)
        found = score_policy(self.shared, batch, self.least)
        beta = self.plan.kl_coef
        self.update(grpo_loss(found.logp, None, advantages, batch.mask, found.reference, beta).loss)
        return {"reward": reward.mean().item(), "kl": divergence(found, batch)}
