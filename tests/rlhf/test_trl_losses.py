"""The losses against TRL's own code: its trainers' loss methods, run on log-probs without model or trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from rlhf_batches import close, f64, gradients, leaf, mask_of, sequences, tokens

from peft_ops.rlhf import dpo_loss, group_advantages, grpo_loss, kto_kl, kto_loss, log1mexp, orpo_loss, simpo_loss

pytest.importorskip("trl")

B, T = 4, 7
MASK = mask_of(3, 0, 7, 1)


class OneProcess:
    """An accelerate.Accelerator of one process, as far as a loss asks."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


class Settings(SimpleNamespace):
    """A trainer's attributes: those given, and None, False or 0 for what else its loss looks at."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def trainer(**settings):
    common = dict(model=torch.nn.Module(), accelerator=OneProcess(), _metrics=defaultdict(lambda: defaultdict(list)))
    return Settings(
        **common, args=Settings(use_bias_correction_kl=False), _total_train_tokens=0, _tp_size=1, **settings
    )


def outputs(logp, mask):
    """What TRL's patched forward gives: log-probs that are 0 outside of the completion."""
    none = torch.zeros_like(logp)
    return SimpleNamespace(
        log_probs=torch.where(mask, logp, 0), entropy=none, mean_logits=none, is_top1=torch.zeros_like(mask)
    )


def batch(mask):
    """A prompt of one token before the completion."""
    prompt = torch.zeros(mask.shape[0], 1, dtype=torch.bool)
    ids = torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.long)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=torch.cat([prompt, mask], 1).long())


@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(reduction, beta):
    from trl.trainer.grpo_trainer import GRPOTrainer

    logp, old, reference = leaf(tokens()), tokens(), tokens()
    advantages = torch.randn(B, dtype=torch.float64)
    theirs = trainer(
        importance_sampling_level="token", beta=beta, epsilon_low=0.2, epsilon_high=0.28, loss_type=reduction,
        top_entropy_quantile=1.0, max_completion_length=11, current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    theirs.args.steps_per_generation = 1
    prompt = torch.zeros(B, 1, dtype=torch.long)
    inputs = dict(
        prompt_ids=prompt, prompt_mask=prompt, completion_ids=MASK.long(), completion_mask=MASK.long(),
        advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference,
        num_items_in_batch=torch.tensor(29),
    )  # fmt: skip
    expected = GRPOTrainer._compute_loss(theirs, None, inputs)
    rest = dict(reduction=reduction, max_length=11, num_tokens=29)
    ours = grpo_loss(logp, old, advantages, MASK, reference, beta, 0.2, 0.28, **rest).loss
    close(ours, expected)
    close(gradients(ours, logp)[0], gradients(expected, logp)[0])


def test_group_advantages():
    from trl.trainer.utils import nanstd

    rewards = torch.randn(12, dtype=torch.float64)
    groups = rewards.view(3, 4)
    expected = (groups - groups.mean(1, True)) / (nanstd(groups, 1, keepdim=True) + 1e-4)
    close(group_advantages(rewards, 4), expected.view(-1), rtol=1e-6)  # its n / (n − 1) is a float32


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("ipo", 0.0)])
def test_dpo(loss_type, smoothing):
    from trl.trainer.dpo_trainer import DPOTrainer

    logp, reference = leaf(tokens()), sequences(B)
    theirs = trainer(
        beta=0.2, loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing, precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
    )  # fmt: skip
    inputs = batch(MASK) | dict(ref_chosen_logps=reference[:2], ref_rejected_logps=reference[2:])
    expected = DPOTrainer._compute_loss(theirs, lambda **_: outputs(logp, MASK), inputs, False)
    sums = torch.where(MASK, logp, 0).sum(1)
    lengths = MASK.sum(1)
    ours = dpo_loss(*sums.chunk(2), reference[:2], reference[2:], 0.2, loss_type, smoothing, lengths[:2], lengths[2:])
    close(ours.loss, expected)
    close(gradients(ours.loss, logp)[0], gradients(expected, logp)[0])
    metrics = theirs._metrics["train"]
    close(ours.chosen_rewards.mean(), f64(metrics["rewards/chosen"][0]))
    close(ours.accuracy, f64(metrics["rewards/accuracies"][0]))


def test_kto():
    from trl.trainer.kto_trainer import KTOTrainer

    logp, reference, mismatched, mismatched_reference = leaf(tokens()), sequences(B), tokens(), sequences(B)
    desirable = torch.tensor([True, False, False, True])
    theirs = trainer(
        beta=0.2, desirable_weight=1.3, undesirable_weight=0.7, loss_type="kto", calculate_KL=True,
        precompute_ref_logps=True, _compute_kl_logps=lambda *_: torch.where(MASK, mismatched, 0).sum(1),
    )  # fmt: skip
    inputs = batch(MASK) | dict(label=desirable, ref_logps=reference, ref_KL_logps=mismatched_reference)
    expected = KTOTrainer._compute_loss(theirs, lambda **_: outputs(logp, MASK), inputs, False)
    kl = kto_kl(torch.where(MASK, mismatched, 0).sum(1), mismatched_reference)
    ours = kto_loss(torch.where(MASK, logp, 0).sum(1), reference, desirable, kl, 0.2, 1.3, 0.7).loss
    close(ours, expected)
    close(gradients(ours, logp)[0], gradients(expected, logp)[0])


def test_orpo():
    from trl.experimental.orpo import orpo_trainer

    chosen, rejected = leaf(sequences().float()), leaf(sequences().float())  # TRL's is a float32 loss
    expected = -orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), chosen, rejected)[0].mean()
    ours = orpo_loss(chosen, rejected, torch.tensor(0.0), 0.3).loss
    close(ours, expected, rtol=1e-6)
    for grad, wanted in zip(gradients(ours, chosen, rejected), gradients(expected, chosen, rejected), strict=True):
        close(grad, wanted, rtol=1e-4, atol=1e-7)
    x = -(10 ** torch.linspace(-12, 2, 99, dtype=torch.float64))
    close(log1mexp(x), orpo_trainer.log1mexp(x))


def test_simpo():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen, rejected = leaf(sequences()), leaf(sequences())
    settings = trainer(beta=2.5, simpo_gamma=0.7, label_smoothing=0.1, loss_type="simpo", alpha=0.0)
    losses, chosen_rewards, _ = CPOTrainer.cpo_loss(settings, chosen, rejected)
    ours = simpo_loss(chosen, rejected, 2.5, 0.7, 0.1)
    close(ours.loss, losses.mean())
    close(ours.chosen_rewards, chosen_rewards)
    close(gradients(ours.loss, rejected)[0], gradients(losses.mean(), rejected)[0])
