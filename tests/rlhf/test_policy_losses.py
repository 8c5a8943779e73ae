"""PPO and GRPO losses against their formulas, written out from OpenRLHF and TRL, and at the edges."""

import math

import pytest
import torch
from rlhf_batches import INF, NAN, close, f64, gradients, leaf, mask_of, poisoned, tokens

from peft_ops.rlhf import group_advantages, grpo_loss, kl_rewards, ppo_policy_loss, ppo_value_loss

MASK = mask_of(3, 0, 7, 1)
ADVANTAGES = f64([1.5, -2.0, -0.7, 0.4])
EMPTY = torch.zeros(4, 7, dtype=torch.bool)


def holes():
    """A mask with holes in it, as tool tokens make them."""
    mask = MASK.clone()
    mask[2, 2:4] = False
    return mask


def surrogate(logp, old, advantages, low, high):
    ratio = (logp - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def policy_by_hand(logp, old, advantages, mask, clip):
    """OpenRLHF, models/loss.py, PolicyLoss with token_level_loss; its clip ratio is where surr2 < surr1."""
    ratio = (logp - old).exp()
    loss = (surrogate(logp, old, advantages, clip, clip) * mask).sum() / mask.sum()
    smaller = ratio.clamp(1 - clip, 1 + clip) * advantages < ratio * advantages
    return loss, (smaller.double() * mask).sum() / mask.sum()


def value_by_hand(values, old, returns, mask, clip):
    """OpenRLHF, models/loss.py, ValueLoss with token_level_loss."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * (torch.max((clipped - returns) ** 2, (values - returns) ** 2) * mask).sum() / mask.sum()


def grpo_by_hand(logp, old, advantages, mask, reference, beta, low, high, reduction, max_length=None, num_tokens=None):
    """TRL 1.16, trainer/grpo_trainer.py, GRPOTrainer._compute_loss, one accumulation step and one process."""
    losses = surrogate(logp, old, advantages[:, None], low, high)
    losses = losses + beta * ((reference - logp).exp() - (reference - logp) - 1)
    sums, counts = (losses * mask).sum(1), mask.sum(1)
    return {
        "grpo": (sums / counts.clamp(min=1)).mean(),
        "bnpo": sums.sum() / counts.sum().clamp(min=1),
        "dr_grpo": sums.sum() / (len(sums) * (max_length or 1)),
        "dapo": sums.sum() / (num_tokens or counts.sum().clamp(min=1)),
    }[reduction]


GRPO = pytest.mark.parametrize(
    "settings",
    [
        dict(reduction="grpo"), dict(reduction="bnpo"), dict(reduction="dr_grpo", max_length=11),
        dict(reduction="dapo"), dict(reduction="dapo", num_tokens=29),
        dict(reduction="grpo", clip_low=0.1, clip_high=0.4),
    ],
    ids=str,
)  # fmt: skip


@pytest.mark.parametrize("mask", [MASK, holes()])
def test_ppo_policy_loss(mask):
    logp, old, advantages = leaf(tokens()), tokens(), torch.randn(4, 7).double()
    ours = ppo_policy_loss(logp, old, advantages, mask, 0.3)
    loss, clipped = policy_by_hand(logp, old, advantages, mask, 0.3)
    close(ours.loss, loss)
    close(ours.clip_fraction, clipped)
    assert 0 < clipped < 1
    close(gradients(ours.loss, logp)[0], gradients(loss, logp)[0])
    d = (logp - old)[mask].detach()
    close(ours.approx_kl, (d.exp() - 1 - d).mean())  # Schulman's k3 of KL(old ‖ new) on tokens of old
    assert not ours.approx_kl.requires_grad


@pytest.mark.parametrize("mask", [MASK, holes()])
def test_ppo_value_loss(mask):
    values, old, returns = leaf(torch.randn(4, 7).double()), torch.randn(4, 7).double(), torch.randn(4, 7).double()
    ours, by_hand = ppo_value_loss(values, old, returns, mask, 0.3), value_by_hand(values, old, returns, mask, 0.3)
    close(ours, by_hand)
    close(gradients(ours, values)[0], gradients(by_hand, values)[0])
    close(ppo_value_loss(values, old, returns, mask, None), value_by_hand(values, old, returns, mask, INF))
    assert ours > ppo_value_loss(values, old, returns, mask, None)  # the larger of two is larger


def test_what_clipping_does_by_hand():
    """Ratio 2, clip 0.2: a good token counts 1.2 without gradient, a bad one 2 with it; at ratio ½ the other way."""
    logp = leaf(f64([[2.0, 2, 0.5, 0.5]]).log())
    advantages = f64([[1.0, -1, 1, -1]])
    out = ppo_policy_loss(logp, torch.zeros(1, 4).double(), advantages, torch.ones(1, 4, dtype=torch.bool))
    close(out.loss, f64((-1.2 + 2 - 0.5 + 0.8) / 4))
    close(gradients(out.loss, logp)[0], f64([[0, 2, -0.5, 0]]) / 4)
    assert out.clip_fraction == 0.5
    higher = grpo_loss(logp, torch.zeros(1, 4).double(), advantages, logp < 9, clip_low=0.4, clip_high=0.5)
    close(higher.loss, f64((-1.5 + 2 - 0.5 + 0.6) / 4))


@GRPO
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("mask", [MASK, holes()])
def test_grpo_loss(settings, beta, mask):
    logp, old, reference = leaf(tokens()), tokens(), tokens()
    ours = grpo_loss(logp, old, ADVANTAGES, mask, reference, beta, **settings)
    clips = dict(low=settings.get("clip_low", 0.2), high=settings.get("clip_high", 0.2))
    rest = {k: v for k, v in settings.items() if not k.startswith("clip")}
    by_hand = grpo_by_hand(logp, old, ADVANTAGES, mask, reference, beta, **clips, **rest)
    close(ours.loss, by_hand)
    (grad,) = gradients(ours.loss, logp)
    close(grad, gradients(by_hand, logp)[0])
    assert (grad[~mask] == 0).all()
    if beta:
        d = (reference - logp)[mask].detach()
        close(ours.reference_kl, (d.exp() - d - 1).mean())
        assert (grad[mask] != 0).all()
    else:
        assert ours.reference_kl is None


def test_grpo_forms():
    logp, old, reference = leaf(tokens()), tokens(), tokens()
    first = grpo_loss(logp, None, ADVANTAGES, MASK, reduction="bnpo")  # on-policy: REINFORCE
    close(first.loss, -ADVANTAGES[:, None].expand(4, 7)[MASK].mean())
    close(gradients(first.loss, logp)[0], torch.where(MASK, -ADVANTAGES[:, None], 0) / MASK.sum())
    assert first.approx_kl == 0
    per_token = grpo_loss(logp, old, ADVANTAGES[:, None].expand(4, 7), MASK, reference, 0.1).loss
    close(per_token, grpo_loss(logp, old, ADVANTAGES, MASK, reference, 0.1).loss)
    tensor = grpo_loss(logp, old, ADVANTAGES, MASK, num_tokens=torch.tensor(29)).loss
    close(tensor, grpo_loss(logp, old, ADVANTAGES, MASK, num_tokens=29).loss)
    halves = [
        grpo_loss(logp[i:j], old[i:j], ADVANTAGES[i:j], MASK[i:j], num_tokens=11).loss for i, j in ((0, 2), (2, 4))
    ]
    close(sum(halves), grpo_loss(logp, old, ADVANTAGES, MASK).loss)  # dapo: as if it were one batch


def losses(mask=MASK, dtype=torch.float64):
    """{name: (function of what is trained and of what to do to the other [B, T] arguments, what is trained)}."""
    logp, old, reference, advantages = (t.to(dtype) for t in (tokens(), tokens(), tokens(), torch.randn(4, 7)))
    near = logp + 0.1 * torch.randn_like(logp)  # few ratios are clipped
    return {
        "policy": (lambda x, bad: ppo_policy_loss(x, bad(near), bad(advantages), mask).loss, logp),
        "value": (lambda x, bad: ppo_value_loss(x, bad(old), bad(advantages), mask), advantages + 1),
        **{
            reduction: (
                lambda x, bad, reduction=reduction: (
                    grpo_loss(
                        x, bad(near), ADVANTAGES.to(dtype), mask, bad(reference), 0.1, reduction=reduction, max_length=9
                    ).loss
                ),
                logp,
            )
            for reduction in ("grpo", "bnpo", "dr_grpo", "dapo")
        },
    }


EVERY = pytest.mark.parametrize("name", ["policy", "value", "grpo", "bnpo", "dr_grpo", "dapo"])
AS_IT_IS = lambda t: t


@EVERY
def test_gradcheck(name):
    function, x = losses()[name]
    assert torch.autograd.gradcheck(lambda t: function(t, AS_IT_IS), leaf(x))


@EVERY
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_reaches_neither_value_nor_gradient(name, poison):
    function, x = losses(holes())[name]
    x = leaf(x)
    clean = function(x, AS_IT_IS)
    bad = poisoned(x, holes(), poison)
    out = function(bad, lambda t: poisoned(t, holes(), poison))
    close(out, clean)
    grad = gradients(out, bad)[0]
    close(grad, gradients(clean, x)[0])
    assert (grad[~holes()] == 0).all()
    assert (grad[holes()] != 0).any()


def test_what_was_measured_before_is_constant():
    """old_logp, advantages, old_values, returns and the reference get no gradient, though they could."""
    x, others, rows = leaf(tokens()), [leaf(tokens()) for _ in range(3)], leaf(ADVANTAGES)
    for out in (
        ppo_policy_loss(x, *others[:2], MASK).loss,
        ppo_value_loss(x, *others[:2], MASK),
        grpo_loss(x, others[0], rows, MASK, others[1], 0.1).loss,
        grpo_loss(x, others[0], others[2], MASK, others[1], 0.1).loss,
    ):
        grad, *rest = gradients(out, x, *others, rows)
        assert grad.any()
        assert rest == [None] * 4


def test_advantages_of_padding_and_of_empty_answers_do_not_matter():
    logp, old = tokens(), tokens()
    per_token = poisoned(ADVANTAGES[:, None].expand(4, 7), MASK)
    per_row = ADVANTAGES.clone()
    per_row[1] = NAN  # of the empty answer
    expected = grpo_loss(logp, old, ADVANTAGES, MASK, reduction="grpo")
    for advantages in (per_token, per_row):
        out = grpo_loss(logp, old, advantages, MASK, reduction="grpo")
        close(out.loss, expected.loss)
        close(out.clip_fraction, expected.clip_fraction)


def test_a_token_without_advantage_is_not_clipped():
    one = torch.ones(1, 1, dtype=torch.bool)
    for advantage, clipped in ((0.0, 0), (1.0, 1), (-1.0, 0)):
        out = ppo_policy_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), advantage), one)
        assert out.clip_fraction == clipped


@EVERY
def test_no_tokens_at_all_is_zero(name):
    function, x = losses(EMPTY)[name]
    x = leaf(torch.full_like(x, NAN))
    out = function(x, lambda t: torch.full_like(t, NAN))
    assert out == 0
    assert (gradients(out, x)[0] == 0).all()


@EVERY
def test_a_nan_row_is_loud_and_leaves_other_gradients(name):
    function, x = losses()[name]
    x = x.clone()
    x[2, 1] = NAN
    x = leaf(x)
    out = function(x, AS_IT_IS)
    assert out.isnan()
    grad = gradients(out, x)[0]
    assert grad[[0, 1, 3]].isfinite().all()
    assert grad[2, [0, *range(2, 7)]].isfinite().all()
    assert grad[0].any()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_cast_once(name, dtype):
    function, x = losses(dtype=dtype)[name]
    x, wide = leaf(x), leaf(x.float())
    out, expected = function(x, AS_IT_IS), function(wide, torch.Tensor.float)
    assert out.dtype == torch.float32
    assert out == expected
    grad = gradients(out, x)[0]
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, gradients(expected, wide)[0].to(dtype))


@pytest.mark.parametrize("size", [50.0, 80.0, 1000.0])
def test_extreme_ratios(size):
    """Where the clipped ratio is the smaller its gradient is 0, never NaN; an unbounded loss is Inf at worst."""
    log_ratio = torch.tensor([[size, -size, size, -size, size, -size, 0.0]])
    advantages = torch.tensor([[1.0, 1, -1, -1, 0, 0, 1]])
    expected = [-1.2, -math.exp(-size), math.exp(size) if size < 88 else INF, 0.8, 0.0, 0.0, -1.0]
    for i, value in enumerate(expected):
        logp, here = leaf(log_ratio), torch.zeros(1, 7, dtype=torch.bool)
        here[0, i] = True
        out = ppo_policy_loss(logp, torch.zeros(1, 7), advantages, here)
        assert out.loss.item() == pytest.approx(value, rel=1e-5)
        grad = gradients(out.loss, logp)[0]
        if i == 0 and size > 88:
            assert gradients(surrogate(logp, 0.0, advantages, 0.2, 0.2)[0, 0], logp)[0][0, 0].isnan()  # what is avoided
        slope = value if i in (1, 2, 6) else 0.0  # of −ρA by log ρ, where it is not clipped
        assert grad[0, i].item() == pytest.approx(slope, rel=1e-5)
        assert (grad[~here] == 0).all()


def test_group_advantages_by_hand():
    """Group 1: mean 2, deviations −1, 0, 1, std √(2/2) = 1. Group 2: mean 5, deviations −4, 2, 2, std √(24/2)."""
    rewards = f64([1.0, 2, 3, 1, 7, 7])
    std = f64([1.0, 1, 1, *[12**0.5] * 3])
    deviations = f64([-1.0, 0, 1, -4, 2, 2])
    close(group_advantages(rewards, 3), deviations / (std + 1e-4))
    close(group_advantages(rewards, 3, scale=False), deviations)
    close(group_advantages(rewards, 3, eps=0.5), deviations / (std + 0.5))
    assert group_advantages(rewards.to(torch.bfloat16), 3).dtype == torch.float32
    x = torch.randn(12).double() * 100
    groups = x.view(3, 4)  # TRL 1.16: torch.std, which divides by n − 1
    close(group_advantages(x, 4), ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1))


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3e30])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_have_no_advantage(value, eps):
    assert (group_advantages(torch.full((9,), value), 3, eps=eps) == 0).all()
    assert (group_advantages(torch.full((9,), value), 1, eps=eps) == 0).all()


def test_a_nan_reward_stays_in_its_group():
    out = group_advantages(torch.tensor([1.0, NAN, 1, 2, INF, 0, 3, 4]), 2)
    assert out.isnan().tolist() == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


def test_kl_rewards_by_hand():
    """−0.5 · (logp − reference), and the score at the last token."""
    logp = f64([[-1.0, -2, -3, NAN], [-1, -1, -1, -1], [NAN] * 4, [NAN, -1, NAN, -1]])
    reference = f64([[-2.0, -2, -1, INF], [-1, -2, -1, -3], [NAN] * 4, [NAN, -2, NAN, -2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    out = kl_rewards(f64([10.0, -5, 7, 1]), logp, reference, mask, 0.5)
    close(out, f64([[-0.5, 0, 11, 0], [0, -0.5, 0, -6], [0, 0, 0, 0], [0, -0.5, 0, 0.5]]))
    k3 = kl_rewards(torch.zeros(4).double(), logp, reference, mask, 0.5, "k3")
    assert k3[0, 0].item() == pytest.approx(-0.5 * math.exp(-1))  # e^−1 − (−1) − 1
    assert kl_rewards(torch.zeros(4), logp[:, :0], reference[:, :0], mask[:, :0]).shape == (4, 0)


X, ROWS = tokens(), torch.randn(4)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: ppo_policy_loss(X, X, X, MASK.long()), TypeError, "mask must be a bool tensor, got torch.int64"),
        (lambda: ppo_policy_loss(X, X[:1], X, MASK), ValueError, r"old_logp must be \(4, 7\) as logp is, got \(1, 7\)"),
        (lambda: ppo_policy_loss(X, X, ROWS, MASK), ValueError, r"advantages must be \[B, T\], got \(4,\)"),
        (lambda: ppo_policy_loss(X, X, X, MASK[:2]), ValueError, r"mask must be \(4, 7\) as logp is, got \(2, 7\)"),
        (lambda: ppo_policy_loss(X, X, X, MASK, 0.0), ValueError, "clip must be positive, got 0.0"),
        (lambda: ppo_value_loss(X, X, None, MASK), TypeError, "returns must be a floating-point tensor .* got None"),
        (lambda: ppo_value_loss(X, X, X, MASK, -0.2), ValueError, "clip must be positive, got -0.2"),
        (lambda: kl_rewards(X, X, X, MASK), ValueError, r"scores must be \[B\], got \(4, 7\)"),
        (lambda: kl_rewards(ROWS[:3], X, X, MASK), ValueError, r"scores must be \[4\] to fit logp .* got \(3,\)"),
        (lambda: kl_rewards(ROWS, X, X, MASK, -1.0), ValueError, "kl_coef must be at least 0, got -1.0"),
        (lambda: kl_rewards(ROWS, X, X, MASK, estimator="k0"), ValueError, "estimator must be one of 'k1', 'k2', 'k3'"),
        (lambda: group_advantages(ROWS, 3), ValueError, "group_size must divide the 4 rewards, got 3"),
        (lambda: group_advantages(ROWS, 0), ValueError, "group_size must be at least 1, got 0"),
        (lambda: group_advantages(ROWS, 2.0), TypeError, "group_size must be an int, got 2.0"),
        (lambda: group_advantages(ROWS.long(), 2), TypeError, "rewards must be a floating-point tensor"),
        (lambda: group_advantages(ROWS, 2, eps=-1.0), ValueError, "eps must be at least 0"),
        (lambda: grpo_loss(X, X, ROWS, MASK, reduction="mean"), ValueError,
         "reduction must be one of 'dapo', 'grpo', 'bnpo', 'dr_grpo', got 'mean'"),
        (lambda: grpo_loss(X, X, ROWS, MASK, reduction="dr_grpo"), ValueError, "'dr_grpo' needs max_length"),
        (lambda: grpo_loss(X, X, ROWS, MASK, reduction="dr_grpo", max_length=0), ValueError, "max_length must be at"),
        (lambda: grpo_loss(X, X, ROWS, MASK, beta=0.1), ValueError, "beta=0.1 needs reference_logp"),
        (lambda: grpo_loss(X, X, ROWS, MASK, X, -0.1), ValueError, "beta must be at least 0, got -0.1"),
        (lambda: grpo_loss(X, X, ROWS, MASK, clip_low=1.5), ValueError, r"clip_low must be in \[0, 1\], got 1.5"),
        (lambda: grpo_loss(X, X, ROWS, MASK, clip_high=-0.1), ValueError, "clip_high must be at least 0"),
        (lambda: grpo_loss(X, X, ROWS[:2], MASK), ValueError, r"advantages must be \[4\] to fit logp .* got \(2,\)"),
        (lambda: grpo_loss(X, X, X[:, :2], MASK), ValueError, r"advantages must be \(4, 7\) as logp is, got \(4, 2\)"),
        (lambda: grpo_loss(X, X, ROWS, MASK, X[:, :2], 0.1), ValueError, r"reference_logp must be \(4, 7\)"),
        (lambda: grpo_loss(X, X, ROWS, MASK, num_tokens=0), ValueError, "num_tokens must be positive, got 0"),
    ],
)  # fmt: skip
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act()
