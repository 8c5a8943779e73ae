"""Generalised advantage estimation: worked by hand, against OpenRLHF's recursion, and with padding anywhere."""

import pytest
import torch
from rlhf_batches import INF, NAN, close, f64, mask_of

from peft_ops.rlhf import gae

# γ = 0.9, λ = 0.5, so γλ = 0.45; three tokens with rewards 1, 0, 2 and values 0.5, 1, 0.8:
#   δ₂ = 2 + 0.9 · 0   − 0.8 = 1.2       A₂ = 1.2                            R₂ = 1.2 + 0.8      = 2
#   δ₁ = 0 + 0.9 · 0.8 − 1   = −0.28     A₁ = −0.28 + 0.45 · 1.2   = 0.26    R₁ = 0.26 + 1       = 1.26
#   δ₀ = 1 + 0.9 · 1   − 0.5 = 1.4       A₀ = 1.4   + 0.45 · 0.26  = 1.517   R₀ = 1.517 + 0.5    = 2.017
# and one token with reward −1 and value 0.25:
#   δ₀ = −1 − 0.25 = −1.25               A₀ = −1.25                          R₀ = −1
THREE, THREE_RETURNS = [1.517, 0.26, 1.2], [2.017, 1.26, 2.0]


def test_by_hand_with_padding_of_several_lengths():
    rewards = f64([[1, 0, 2, NAN, 9], [-1, NAN, INF, 5, 5], [NAN] * 5])
    values = f64([[0.5, 1, 0.8, 7, NAN], [0.25, 3, 3, 3, 3], [INF] * 5])
    advantages, returns = gae(rewards, values, mask_of(3, 1, 0, T=5), gamma=0.9, lam=0.5)
    close(advantages, f64([[*THREE, 0, 0], [-1.25, 0, 0, 0, 0], [0] * 5]))
    close(returns, f64([[*THREE_RETURNS, 0, 0], [-1, 0, 0, 0, 0], [0] * 5]))


def test_padding_on_the_left_and_holes_are_passed_over():
    """The same three tokens, wherever they stand."""
    for places in ([0, 1, 2], [3, 4, 5], [0, 2, 5], [1, 2, 4]):
        rewards, values = torch.full((1, 6), NAN).double(), torch.full((1, 6), -INF).double()
        mask = torch.zeros(1, 6, dtype=torch.bool)
        rewards[0, places] = f64([1.0, 0, 2])
        values[0, places] = f64([0.5, 1, 0.8])
        mask[0, places] = True
        advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
        close(advantages[mask], f64(THREE))
        close(returns[mask], f64(THREE_RETURNS))
        assert (advantages[~mask] == 0).all()
        assert (returns[~mask] == 0).all()


def openrlhf(values, rewards, action_mask, gamma, lambd):
    """OpenRLHF, trainer/ppo_utils/experience_maker.py, get_advantages_and_returns, row by row as a double sum:
    A_t = Σ_k (γλ)^k δ_{t+k} with values and rewards multiplied by the mask."""
    values, rewards = values * action_mask, rewards * action_mask
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta, T = rewards + gamma * after - values, values.shape[1]
    weight = f64([[(gamma * lambd) ** (k - t) if k >= t else 0.0 for t in range(T)] for k in range(T)])
    advantages = delta @ weight
    return advantages * action_mask, (advantages + values) * action_mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_against_openrlhf(gamma, lam):
    mask = mask_of(9, 4, 1, 0, 8)
    rewards, values = torch.randn(5, 9).double(), torch.randn(5, 9).double() * 3
    for ours, theirs in zip(
        gae(rewards, values, mask, gamma, lam), openrlhf(values, rewards, mask, gamma, lam), strict=True
    ):
        close(ours, theirs)


def test_limits():
    """λ = 1, γ = 1: the return is the sum of what is still to come. λ = 0: one step ahead."""
    rewards, values, mask = torch.randn(2, 5).double(), torch.randn(2, 5).double(), mask_of(5, 5)
    close(gae(rewards, values, mask, 1.0, 1.0)[1], rewards.flip(1).cumsum(1).flip(1))
    after = torch.cat([values[:, 1:], torch.zeros(2, 1).double()], 1)
    close(gae(rewards, values, mask, 0.9, 0.0)[1], rewards + 0.9 * after)


def test_dtypes_and_edges():
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5, requires_grad=True), mask_of(5, 2)
    advantages, returns = gae(rewards.bfloat16(), values, mask)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0])[0].shape == (2, 0)
    assert gae(rewards[:0], values[:0], mask[:0])[0].shape == (0, 5)
    bad = rewards.clone()
    bad[0, 2] = NAN  # stays in its row
    advantages, _ = gae(bad, values, mask)
    assert advantages[0, :3].isnan().all()
    assert advantages[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(gamma=1.5), ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        (dict(lam=-0.1), ValueError, r"lam must be in \[0, 1\], got -0.1"),
        (dict(lam=NAN), ValueError, "lam must be in \\[0, 1\\], got nan"),
        (dict(mask=torch.ones(2, 5)), TypeError, "mask must be a bool tensor, got torch.float32"),
        (dict(values=torch.zeros(2, 6)), ValueError, r"values must be \(2, 5\) as rewards is, got \(2, 6\)"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(rewards=torch.zeros(2, 5), values=torch.zeros(2, 5), mask=mask_of(5, 2)) | change
    with pytest.raises(error, match=message):
        gae(**arguments)
