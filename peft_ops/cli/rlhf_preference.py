"""The stages that learn from pairs: supervised fine-tuning, the reward model, DPO."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..nn.head import head_of
from ..rlhf import DPOLoss, PreferenceLoss, masked_mean, masked_sum, reference_policy, reward_loss
from ..rlhf.rollout import IGNORED, Completions, completion_hidden, pad, sequence_hidden
from .files import write_file
from .rlhf_data import Pair
from .rlhf_stage import Metrics, Shared, Stage

_AT_ONCE = 32  # pairs, where nothing is learnt
_CENTERING = 0.01
_SIDES = ("chosen_rewards", "rejected_rewards")


def encode_prompts(shared: Shared, pairs: Sequence[Pair]) -> list[list[int]]:
    return [shared.tokenizer.start + shared.tokenizer.encode(pair.prompt) for pair in pairs]


def encode(shared: Shared, pairs: Sequence[Pair], *sides: str) -> Completions:
    """The completions of one side after another, each with the end token."""
    prompts = encode_prompts(shared, pairs) * len(sides)
    texts = [getattr(pair, side) for side in sides for pair in pairs]
    return pad(prompts, [[*shared.tokenizer.encode(text), shared.end] for text in texts]).to(shared.device)


def chunks(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    return (pairs[i : i + _AT_ONCE] for i in range(0, len(pairs), _AT_ONCE))


class ScalarHead(nn.Linear):
    """A number per hidden state, 0 at the start; float32 whatever the states are."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared.model.config.get_text_config().hidden_size, 1, bias=False, device=shared.device)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.to(self.weight.dtype))


class SFT(Stage):
    """Cross-entropy of real continuations and of their prompts, which are real text too."""

    name, number = "sft", 0

    def step(self, number: int) -> Metrics:
        batch = encode(self.shared, self.batch(number), "chosen")
        mask = batch.attention_mask[:, :-1] & batch.attention_mask[:, 1:]
        targets = torch.where(mask, batch.tokens[:, 1:], IGNORED)
        hidden = sequence_hidden(self.shared.model, batch)[:, :-1]
        loss = -head_of(self.shared.model).log_probs(hidden, targets).logp.sum() / mask.sum()
        self.update(loss)
        return {"loss": loss.item()}

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """accuracy: pairs whose real continuation is the likelier one, what the later stages start from."""
        logp, lengths = [], []
        for pairs in chunks(self.shared.pairs.held_out):
            batch = encode(self.shared, pairs, "chosen", "rejected")
            hidden = completion_hidden(self.shared.model, batch)
            found = head_of(self.shared.model).log_probs(hidden, batch.targets).logp
            logp.append(torch.stack(masked_sum(found, batch.mask).chunk(2)))
            lengths.append(batch.mask.sum(dim=1).chunk(2)[0])
        chosen, rejected = torch.cat(logp, dim=1)
        loss = -chosen.sum() / torch.cat(lengths).sum()
        return {"loss": loss.item(), "accuracy": accuracy(chosen, rejected)}


class Reward(Stage):
    """An adapter and a scalar head, by Bradley and Terry.

    The head is on the mean of a completion's hidden states rather than on the last one: the embedded model has three
    layers, too few to gather at one token what is wrong with the others, and does not learn the pairs from it.
    """

    name, number = "reward", 1

    def own_heads(self) -> dict[str, nn.Linear]:
        self.score = self.shared.heads.setdefault("score", ScalarHead(self.shared))
        return {"score": self.score}

    def step(self, number: int) -> Metrics:
        result = self.loss(self.batch(number))
        self.update(result.loss)
        return {"loss": result.loss.item(), "accuracy": result.accuracy.item()}

    def loss(self, pairs: Sequence[Pair]) -> PreferenceLoss:
        batch = encode(self.shared, pairs, "chosen", "rejected")
        chosen, rejected = scores(self.shared, self.score, batch).chunk(2)
        loss = reward_loss(chosen, rejected, centering=_CENTERING)
        return PreferenceLoss(loss, chosen.detach(), rejected.detach())

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        return measured([self.loss(pairs) for pairs in chunks(self.shared.pairs.held_out)])

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        super().save(folder)
        tensors = {"score.weight": self.score.weight.detach().cpu().contiguous()}
        write_file(folder / "score_head.safetensors", lambda partial: save_file(tensors, partial))


def scores(shared: Shared, head: nn.Module, batch: Completions) -> torch.Tensor:
    """[B]: the mean over a completion's tokens, but the end token, of what the head says after each of them.

    With the end token PPO would learn to end as early as it may, where that one weighs most.
    """
    hidden = sequence_hidden(shared.model, batch)[:, batch.prompts.shape[1] :]
    return masked_mean(head(hidden)[..., 0], batch.mask & (batch.completions != shared.end), dim=1)


class DPO(Stage):
    """Direct preference optimisation; the reference policy is the sft adapter."""

    name, number = "dpo", 2

    def step(self, number: int) -> Metrics:
        result = self.loss(self.batch(number))
        self.update(result.loss)
        return {"loss": result.loss.item(), "accuracy": result.accuracy.item()}

    def loss(self, pairs: Sequence[Pair]) -> PreferenceLoss:
        model, batch = self.shared.model, encode(self.shared, pairs, "chosen", "rejected")
        with reference_policy(model, "sft"):
            reference = completion_hidden(model, batch)
        hidden = completion_hidden(model, batch)
        return DPOLoss(self.plan.beta)(head_of(model), hidden, batch.targets, reference)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        return measured([self.loss(pairs) for pairs in chunks(self.shared.pairs.held_out)])


def measured(parts: Sequence[PreferenceLoss]) -> Metrics:
    """Of all pairs: the share in the right order and by how much on average."""
    chosen, rejected = (torch.cat([getattr(part, side) for part in parts]) for side in _SIDES)
    return {"accuracy": accuracy(chosen, rejected), "margin": (chosen - rejected).mean().item()}


def accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs in the right order, a tie counting half."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()
