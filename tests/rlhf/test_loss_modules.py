"""Modules over hidden states and a head: the functions on log-probs of materialised logits, for every kind of head."""

import pytest
import torch
from rlhf_batches import INF, NAN, close, gradients, leaf, mask_of
from torch import nn

from peft_ops import nf4
from peft_ops.nn import Head
from peft_ops.rlhf import (
    DPOLoss,
    GRPOLoss,
    KTOLoss,
    ORPOLoss,
    PPOLoss,
    RewardLoss,
    SimPOLoss,
    completion_log_probs,
    dpo_loss,
    grpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reward_loss,
    simpo_loss,
)

B, T, K, V, R = 4, 6, 8, 11, 3
MASK = mask_of(6, 2, 0, 4)
LABELS = torch.tensor([True, False, True, False])


def make(*shape, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def head_of_kind(kind):
    lora = dict(lora_a=make(R, K), lora_b=make(V, R), scaling=0.5) if kind != "dense" else {}
    if kind == "nf4":
        return Head(nf4.quantize(make(V, K).detach().float(), 32), **lora)
    return Head(make(V, K), make(V), logit_scale=0.8, softcap=5.0, **lora)


def logp_by_hand(head, hidden, targets, temperature=1.0, adapted=True):
    """log softmax of materialised logits at the targets; 0 where there are none."""
    dense = head.weight if isinstance(head.weight, torch.Tensor) else nf4.dequantize(head.weight, torch.float64)
    if adapted and head.lora_a is not None:
        dense = dense + head.scaling * head.lora_b @ head.lora_a
    z = (hidden @ dense.T + (0 if head.bias is None else head.bias)) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    chosen = (z / temperature).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0, chosen)


class Problem:
    def __init__(self, kind):
        self.head, self.hidden, self.reference_hidden = head_of_kind(kind), make(B, T, K), make(B, T, K).detach()
        self.targets = torch.randint(V, (B, T)).masked_fill(~MASK, -100)
        self.reference = logp_by_hand(self.head, self.reference_hidden, self.targets, adapted=False).detach()
        self.old = (self.logp() + 0.2 * torch.randn(B, T)).detach()
        self.advantages, self.values, self.old_values = make(B).detach(), make(B, T), make(B, T).detach()
        self.inputs = (self.head, self.hidden, self.targets)

    def logp(self, temperature=1.0):
        return logp_by_hand(self.head, self.hidden, self.targets, temperature)

    def leaves(self):
        tensors = (self.hidden, self.head.weight, self.head.bias, self.head.lora_a, self.head.lora_b)
        return [t for t in tensors if isinstance(t, torch.Tensor)]


def means(logp):
    return logp.sum(1) / MASK.sum(1).clamp(min=1)


def ours_and_by_hand(name, p):
    logp, reference = p.logp(), p.reference
    pairs = [*logp.sum(1).chunk(2), *reference.sum(1).chunk(2)]
    if name.startswith("dpo"):
        module = DPOLoss(0.2, name[4:] or "sigmoid")
        lengths = MASK.sum(1).chunk(2)
        expected = dpo_loss(*pairs, 0.2, name[4:] or "sigmoid", 0.0, *lengths)
        return module(*p.inputs, p.reference_hidden), expected
    if name == "kto":
        kl = torch.tensor(0.1)
        expected = kto_loss(logp.sum(1), reference.sum(1), LABELS, kl, 0.2, 1.3, 0.7)
        return KTOLoss(0.2, 1.3, 0.7)(*p.inputs, LABELS, kl, p.reference_hidden), expected
    if name == "orpo":
        expected = orpo_loss(*means(logp).chunk(2), -logp[:2].sum() / 8, 0.2)
        return ORPOLoss(0.2)(*p.inputs), expected
    if name == "simpo":
        return SimPOLoss(1.5, 0.3, 0.1)(*p.inputs), simpo_loss(*means(logp).chunk(2), 1.5, 0.3, 0.1)
    if name == "grpo":
        expected = grpo_loss(p.logp(0.7), p.old, p.advantages, MASK, reference, 0.1, 0.2, 0.3, "dr_grpo", 9)
        module = GRPOLoss(0.1, 0.2, 0.3, "dr_grpo", 9, temperature=0.7)
        return module(*p.inputs, p.advantages, p.old, reference_logp=p.reference), expected
    policy = ppo_policy_loss(p.logp(0.7), p.old, p.old_values, MASK, 0.1)
    value = ppo_value_loss(p.values, p.old_values, p.old, MASK, 0.3)
    out = PPOLoss(0.1, 0.3, 0.5, 0.7)(*p.inputs, p.values, p.old, p.old_values, p.old_values, p.old)
    return out, policy._replace(loss=policy.loss + 0.5 * value)


NAMES = ["dpo", "dpo ipo", "dpo robust", "kto", "orpo", "simpo", "grpo", "ppo"]


@pytest.mark.parametrize("kind", ["dense", "lora", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_modules_are_the_functions_on_materialised_logits(name, kind):
    p = Problem(kind)
    ours, expected = ours_and_by_hand(name, p)
    loose = dict(rtol=1e-5, atol=1e-6) if kind == "nf4" else {}
    close(ours.loss, expected.loss, **loose)
    for grad, wanted in zip(gradients(ours.loss, *p.leaves()), gradients(expected.loss, *p.leaves()), strict=True):
        close(grad, wanted, **loose)
        assert grad.any(), tuple(grad.shape)
    assert (gradients(ours.loss, p.hidden)[0][~MASK] == 0).all()
    for ours_too, expected_too in zip(ours[1:], expected[1:], strict=name != "ppo"):
        if isinstance(expected_too, torch.Tensor) and name != "ppo":
            close(ours_too, expected_too, **loose)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_through_the_head(name):
    p = Problem("lora")

    def loss(hidden, a, b):
        p.hidden, p.head = hidden, Head(p.head.weight, p.head.bias, a, b, 0.5, logit_scale=0.8, softcap=5.0)
        p.inputs = (p.head, hidden, p.targets)
        return ours_and_by_hand(name, p)[0].loss

    leaves = p.hidden, p.head.lora_a, p.head.lora_b  # undefined gradients are the op's matter
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_of_padding_do_not_matter(name, poison):
    p = Problem("dense")
    expected = gradients(ours_and_by_hand(name, p)[0].loss, *p.leaves())
    p.hidden = leaf(p.hidden.detach().masked_fill(~MASK[..., None], poison))
    p.reference_hidden = p.reference_hidden.masked_fill(~MASK[..., None], poison)
    p.inputs = (p.head, p.hidden, p.targets)
    for grad, wanted in zip(gradients(ours_and_by_hand(name, p)[0].loss, *p.leaves()), expected, strict=True):
        close(grad, wanted)


def test_the_reference_is_the_head_without_its_adapter():
    p = Problem("lora")
    out = completion_log_probs(*p.inputs, p.reference_hidden)
    close(out.reference_logp, p.reference)
    assert not out.reference_logp.requires_grad
    assert torch.equal(out.mask, MASK)
    ours = DPOLoss()(*p.inputs, p.reference_hidden)
    close(ours.loss, DPOLoss()(*p.inputs, reference_logp=p.reference).loss)
    at_start = DPOLoss()(*p.inputs, reference_logp=p.logp().detach())
    close(at_start.loss, torch.tensor(2.0).log(), rtol=1e-7)


def test_kto_kl_of_mismatched_pairs():
    p = Problem("dense")
    kl = KTOLoss().kl(*p.inputs, p.reference_hidden)
    close(kl, kto_kl(p.logp().sum(1), p.reference.sum(1)))
    assert not kl.requires_grad


def test_reward_loss_scores_the_last_token():
    score, hidden = nn.Linear(K, 1, bias=False).double(), make(B, T, K)
    out = RewardLoss(0.1)(score, hidden, MASK, margin=torch.tensor([0.5, 0.0]))
    last = score(torch.stack([hidden[0, 5], hidden[1, 1], hidden[2, 0], hidden[3, 3]]))[:, 0]
    close(out.loss, reward_loss(last[:2], last[2:], torch.tensor([0.5, 0.0]), 0.1))
    close(out.chosen_rewards, last[:2].detach())
    assert gradients(out.loss, score.weight)[0].any()
    assert not out.rejected_rewards.requires_grad


def test_ppo_reports_its_parts():
    p = Problem("dense")
    out = PPOLoss(vf_coef=0.1)(*p.inputs, p.values, p.old, p.old_values, p.old_values, p.old)
    close(out.loss, out.policy.loss + 0.1 * ppo_value_loss(p.values, p.old_values, p.old, MASK))
    assert gradients(out.loss, p.values)[0].any()


def test_16_bit_hidden_states():
    p = Problem("dense")
    hidden, weight = leaf(p.hidden.bfloat16()), leaf(p.head.weight.bfloat16())
    out = GRPOLoss()(Head(weight), hidden, p.targets, p.advantages.float())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert hidden.grad.any()


def test_settings_are_shown():
    assert repr(DPOLoss(0.2, "ipo")) == "DPOLoss(beta=0.2, loss_type='ipo', label_smoothing=0.0)"
    assert not list(PPOLoss().parameters())


def test_bad_input():
    p = Problem("dense")
    head, hidden, targets = p.inputs
    odd = hidden[:3], targets[:3]
    for act, error, message in (
        (lambda: DPOLoss()(nn.Linear(K, V), hidden, targets), TypeError, "head must be a peft_ops.nn.Head .*Linear"),
        (lambda: DPOLoss()(head, hidden, targets.int()), TypeError, "targets must be an int64 tensor, got torch.int32"),
        (lambda: DPOLoss()(head, hidden[:, 1:], targets), ValueError, r"hidden must be \[B, T, K\] to fit targets"),
        (lambda: DPOLoss()(*p.inputs), ValueError, "reference_hidden or reference_logp must be given"),
        (lambda: DPOLoss()(*p.inputs, p.reference_hidden, p.reference), ValueError, "only one can be given"),
        (lambda: DPOLoss()(*p.inputs, p.reference_hidden[1:]), ValueError, "reference_hidden must be"),
        (lambda: GRPOLoss(beta=0.1)(*p.inputs, p.advantages), ValueError, "reference_hidden or reference_logp"),
        (lambda: SimPOLoss()(head, *odd), ValueError, "hidden must have as many chosen rows as rejected ones, got 3"),
        (lambda: RewardLoss()(nn.Linear(K, 1), hidden, MASK[:2]), ValueError, r"mask must be \[2B, T\] to fit hidden"),
        (lambda: PPOLoss(vf_coef=-1.0), ValueError, "vf_coef must be at least 0"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            act()
