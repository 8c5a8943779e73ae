"""Reward model, DPO, KTO, ORPO and SimPO against their formulas, written out from the papers, and at the edges."""

import mpmath
import pytest
import torch
from rlhf_batches import INF, NAN, close, f64, gradients, leaf, sequences

from peft_ops.rlhf import dpo_loss, kto_kl, kto_loss, log1mexp, orpo_loss, reward_loss, simpo_loss

LENGTHS = torch.tensor([3, 1, 0, 9, 4, 2]), torch.tensor([1, 5, 2, 0, 4, 8])
LABELS = torch.tensor([True, False, True, True, False, False])
MARGIN = f64([0.0, 1.0, 0.5, 3.0, 0.1, 2.0])
NLL = f64(1.5)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def odds(logp):
    return logp.exp() / (1 - logp.exp())


def dpo_by_hand(loss_type, e=0.0, beta=0.3):
    def loss(pc, pr, rc, rr):
        chosen, rejected = pc - rc, pr - rr
        good, bad = -sigmoid(beta * (chosen - rejected)).log(), -sigmoid(-beta * (chosen - rejected)).log()
        if loss_type == "sigmoid":
            return ((1 - e) * good + e * bad).mean()
        if loss_type == "robust":
            return (((1 - e) * good - e * bad) / (1 - 2 * e)).mean()
        lengths = [n.clamp(min=1) for n in LENGTHS] if loss_type == "ipo" else [1, 1]
        return ((chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2).mean()

    return loss


def ours_dpo(loss_type, e=0.0, beta=0.3):
    lengths = dict(chosen_length=LENGTHS[0], rejected_length=LENGTHS[1]) if loss_type == "ipo" else {}
    return lambda *x: dpo_loss(*x, beta, "ipo" if loss_type == "ipo sums" else loss_type, e, **lengths).loss


def kto_by_hand(p, r):
    kl, delta = 0.7, p - r
    good, bad = 1 - sigmoid(0.2 * (delta - kl)), 1 - sigmoid(0.2 * (kl - delta))
    return torch.cat([1.5 * good[LABELS], 0.5 * bad[~LABELS]]).mean()


# name: (ours, by hand, how many arguments, which of them are constants)
LOSSES = {
    "reward": (reward_loss, lambda c, r: -sigmoid(c - r).log().mean(), 2, ()),
    "reward margin": (
        lambda c, r: reward_loss(c, r, MARGIN, 0.01),
        lambda c, r: -sigmoid(c - r - MARGIN).log().mean() + 0.01 * ((c + r) ** 2).mean(), 2, (),
    ),
    "dpo": (ours_dpo("sigmoid"), dpo_by_hand("sigmoid"), 4, (2, 3)),
    "dpo conservative": (ours_dpo("sigmoid", 0.2), dpo_by_hand("sigmoid", 0.2), 4, (2, 3)),
    "dpo robust": (ours_dpo("robust", 0.2), dpo_by_hand("robust", 0.2), 4, (2, 3)),
    "dpo ipo": (ours_dpo("ipo"), dpo_by_hand("ipo"), 4, (2, 3)),
    "dpo ipo sums": (ours_dpo("ipo sums"), dpo_by_hand("ipo sums"), 4, (2, 3)),
    "kto": (lambda p, r: kto_loss(p, r, LABELS, NLL * 0 + 0.7, 0.2, 1.5, 0.5).loss, kto_by_hand, 2, (1,)),
    "orpo": (
        lambda c, r: orpo_loss(c, r, NLL, 0.3).loss,
        lambda c, r: NLL - 0.3 * sigmoid((odds(c) / odds(r)).log()).log().mean(), 2, (),
    ),
    "simpo": (
        lambda c, r: simpo_loss(c, r, 2.5, 0.7).loss,
        lambda c, r: -sigmoid(2.5 * c - 2.5 * r - 0.7).log().mean(), 2, (),
    ),
    "simpo smoothed": (
        lambda c, r: simpo_loss(c, r, 2.5, 0.7, 0.1).loss,
        lambda c, r: -(
            0.9 * sigmoid(2.5 * (c - r) - 0.7).log() + 0.1 * sigmoid(-2.5 * (c - r) + 0.7).log()).mean(), 2, (),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", LOSSES)


@EVERY
def test_value_and_gradient_are_the_formulas(name):
    ours, by_hand, n, constants = LOSSES[name]
    leaves = [leaf(sequences(scale=4.0)) for _ in range(n)]
    value, expected = ours(*leaves), by_hand(*leaves)
    close(value, expected)
    assert value.shape == ()
    for i, (grad, wanted) in enumerate(zip(gradients(value, *leaves), gradients(expected, *leaves), strict=True)):
        if i in constants:
            assert grad is None
        else:
            close(grad, wanted)
            assert (grad != 0).all()


@EVERY
def test_gradcheck(name):
    ours, _, n, constants = LOSSES[name]
    leaves = [sequences(scale=4.0).requires_grad_(i not in constants) for i in range(n)]
    assert torch.autograd.gradcheck(ours, leaves)


@EVERY
@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_extreme_log_ratios(name, size):
    """Values and gradients in float32 stay finite, and are those of float64 where that is exact."""
    ours, _, n, _ = LOSSES[name]
    signs = torch.tensor([1.0, -1, 1, -1, 1, 0])
    rows = [-size * (1 + signs * (1 if i % 2 else -1)) / 2 - 0.01 for i in range(n)]
    leaves, exact = [leaf(r) for r in rows], [leaf(r.double()) for r in rows]
    value, truth = ours(*leaves), ours(*exact)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(gradients(value, *leaves), gradients(truth, *exact), strict=True):
        if grad is not None:
            assert grad.isfinite().all()
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-7)


def test_extreme_losses_are_their_asymptotes():
    """−log σ(−1000 β) is 1000 β, not Inf; −log σ(1000 β) is 0 with a gradient that is gone."""
    far, zero = torch.tensor([-1000.0]), torch.zeros(1)
    assert dpo_loss(far, zero, zero, zero, 1.0).loss == 1000
    assert dpo_loss(zero, far, zero, zero, 1.0).loss == 0
    assert dpo_loss(zero, far, zero, zero, 1.0, label_smoothing=0.25).loss == 250
    assert dpo_loss(far, zero, zero, zero, 1.0, "robust", 0.25).loss == pytest.approx(1500)
    assert reward_loss(far, zero, centering=1.0) == 1000 + 1e6
    assert kto_loss(far, zero, torch.tensor([True]), torch.tensor(0.0)).loss == 1
    assert kto_loss(far / 20, zero, torch.tensor([False]), torch.tensor(0.0), 1.0).loss > 0  # 1 − σ(50) is 0


@EVERY
def test_a_nan_row_is_loud_and_leaves_other_gradients(name):
    ours, _, n, _ = LOSSES[name]
    leaves = [leaf(sequences()) for _ in range(n)]
    with torch.no_grad():
        leaves[0][2] = NAN
    value = ours(*leaves)
    assert value.isnan()
    for grad in gradients(value, *leaves):
        if grad is not None:
            assert grad[[0, 1, 3, 4, 5]].isfinite().all()
            assert grad[2].isnan()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_cast_once(name, dtype):
    ours, _, n, _ = LOSSES[name]
    rows = [sequences(dtype=torch.float32, scale=4.0).to(dtype) for _ in range(n)]
    leaves, wide = [leaf(r) for r in rows], [leaf(r.float()) for r in rows]
    value, expected = ours(*leaves), ours(*wide)
    assert value.dtype in (torch.float32, torch.float64)  # float64 where a constant of the test is
    assert value == expected
    for grad, wanted in zip(gradients(value, *leaves), gradients(expected, *wide), strict=True):
        if grad is not None:
            assert grad.dtype == dtype
            torch.testing.assert_close(grad, wanted.to(dtype))


def test_a_margin_is_constant():
    chosen, margin = leaf(sequences()), leaf(MARGIN)
    assert gradients(reward_loss(chosen, sequences(), margin), chosen, margin)[1] is None


def test_rewards_and_accuracy():
    pc, pr, rc, rr = (torch.tensor(v) for v in ([-1.0, -2, -3], [-2.0, -1, -3], [-1.5, -1, -2], [-1.5, -2, -2]))
    out = dpo_loss(leaf(pc), leaf(pr), rc, rr, 0.5)
    close(out.chosen_rewards, torch.tensor([0.25, -0.5, -0.5]))
    close(out.rejected_rewards, torch.tensor([-0.25, 0.5, -0.5]))
    assert out.accuracy.item() == pytest.approx(1 / 3)  # a tie is none
    assert not out.chosen_rewards.requires_grad
    close(simpo_loss(pc, pr, 2.0).chosen_rewards, 2 * pc)
    close(orpo_loss(pc, pr, torch.tensor(0.0), 0.1).rejected_rewards, 0.1 * pr)
    close(kto_loss(pc, rc, torch.tensor([True, False, True]), torch.tensor(0.0), 0.5).rewards, 0.5 * (pc - rc))


def test_an_empty_batch_is_zero():
    none, zero = torch.zeros(0, requires_grad=True), torch.tensor(0.0)
    outs = [
        reward_loss(none, none, centering=0.1), dpo_loss(*[none] * 4).loss, simpo_loss(none, none).loss,
        orpo_loss(none, none, zero).loss, kto_loss(none, none, none.bool(), zero).loss, kto_kl(none, none),
    ]  # fmt: skip
    assert all(out == 0 for out in outs)
    outs[0].backward()
    assert dpo_loss(*[none] * 4).accuracy == 0


def test_empty_answers_have_the_documented_loss():
    """Both answers empty: a constant; the pair counts."""
    zero = torch.zeros(2)
    log2 = torch.tensor(2.0).log()
    close(dpo_loss(zero, zero, zero, zero).loss, log2)
    close(orpo_loss(zero, zero, torch.tensor(0.0), 1.0).loss, log2)
    close(simpo_loss(zero, zero, gamma=0.0).loss, log2)
    close(kto_loss(zero, zero, torch.tensor([True, False]), torch.tensor(0.0)).loss, torch.tensor(0.5))


def test_kto_kl():
    policy, reference = leaf(sequences()), sequences()
    for sign in (1, -1):
        kl = kto_kl(sign * policy, sign * reference)
        close(kl, (sign * (policy.detach() - reference)).mean().clamp(min=0))
        assert not kl.requires_grad
    shift = torch.full_like(reference, 0.5)
    close(kto_kl(reference + shift, reference), torch.tensor(0.5))
    assert kto_kl(reference - shift, reference) == 0
    kl = leaf(torch.tensor(0.3))  # no gradient, even if it is not detached
    assert gradients(kto_loss(policy, reference, LABELS, kl).loss, kl)[0] is None


def test_log1mexp_is_exact_on_both_sides():
    x = torch.cat([-(10 ** torch.linspace(-38, 2.9, 300)), torch.tensor([-0.6931471, -0.6931472, -0.6931473])])
    with mpmath.workdps(60):
        exact = torch.tensor([float(mpmath.log(-mpmath.expm1(v))) for v in x.tolist()], dtype=torch.float64)
    kept = exact.abs() > 1e-37
    ours = log1mexp(x).double()
    assert ((ours - exact).abs() / exact.abs())[kept].max() < 3e-7
    x = leaf(x)
    (slope,) = gradients(log1mexp(x).sum(), x)
    wanted = torch.tensor([float(-1 / mpmath.expm1(-v)) for v in x.tolist()], dtype=torch.float64)
    kept = wanted.abs() > 1e-37
    assert ((slope.double() - wanted).abs() / wanted.abs())[kept].max() < 1e-6
    assert log1mexp(torch.zeros(1)).isneginf()
    assert log1mexp(torch.ones(1)).isnan()


def test_orpo_of_certain_answers():
    """p = 1 to within rounding, or above by rounding: finite, with a finite gradient."""
    mean = torch.tensor([0.0, -1e-9, 1e-9, -1e-7, -3.0, 0.0])
    chosen, rejected = leaf(mean), leaf(mean.flip(0))
    out = orpo_loss(chosen, rejected, torch.tensor(0.0), 1.0)
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(out.loss, chosen, rejected))
    assert out.loss > 0


PC = sequences()


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: dpo_loss(PC, PC, PC, PC, loss_type="hinge"), ValueError,
         "loss_type must be one of 'sigmoid', 'ipo', 'robust', got 'hinge'"),
        (lambda: dpo_loss(PC, PC[:3], PC, PC), ValueError, r"policy_rejected must be \(6,\) as policy_chosen is"),
        (lambda: dpo_loss(PC[None], PC, PC, PC), ValueError, r"policy_chosen must be \[B\], got \(1, 6\)"),
        (lambda: dpo_loss(PC, PC, PC.long(), PC), TypeError, "reference_chosen must be a floating-point tensor"),
        (lambda: dpo_loss(PC, PC, PC, None), TypeError, "reference_rejected .* got NoneType"),
        (lambda: dpo_loss(PC, PC, PC, PC.to("meta")), ValueError, "reference_rejected must be on cpu"),
        (lambda: dpo_loss(PC, PC, PC, PC, beta=0.0), ValueError, "beta must be positive, got 0.0"),
        (lambda: dpo_loss(PC, PC, PC, PC, beta=NAN), ValueError, "beta must be finite, got nan"),
        (lambda: dpo_loss(PC, PC, PC, PC, beta="0.1"), TypeError, "beta must be a number, got '0.1'"),
        (lambda: dpo_loss(PC, PC, PC, PC, label_smoothing=0.5), ValueError, r"must be in \[0, 0.5\), got 0.5"),
        (lambda: dpo_loss(PC, PC, PC, PC, 0.1, "ipo", 0.1), ValueError, "must be 0 with loss_type 'ipo', got 0.1"),
        (lambda: dpo_loss(PC, PC, PC, PC, 0.1, "ipo", chosen_length=LENGTHS[0]), ValueError, "both or neither"),
        (lambda: dpo_loss(PC, PC, PC, PC, 0.1, "ipo", 0.0, LENGTHS[0], LENGTHS[1][:2]), ValueError, "rejected_length"),
        (lambda: reward_loss(PC, PC, PC[:2]), ValueError, r"margin must be \(6,\) as chosen is, got \(2,\)"),
        (lambda: reward_loss(PC, PC, centering=-0.1), ValueError, "centering must be at least 0, got -0.1"),
        (lambda: kto_loss(PC, PC, LABELS.float(), NLL), TypeError, "desirable must be a bool tensor, got torch"),
        (lambda: kto_loss(PC, PC, LABELS[:2], NLL), ValueError, r"desirable must be \(6,\) as policy is, got \(2,\)"),
        (lambda: kto_loss(PC, PC, LABELS, PC), ValueError, r"kl must be \[\], got \(6,\)"),
        (lambda: kto_loss(PC, PC, LABELS, 0.1), TypeError, r"kl must be a floating-point tensor \[\], got float"),
        (lambda: kto_loss(PC, PC, LABELS, NLL, -0.1), ValueError, "beta must be positive, got -0.1"),
        (lambda: kto_loss(PC, PC, LABELS, NLL, desirable_weight=-1.0), ValueError, "desirable_weight must be at least"),
        (lambda: kto_kl(PC, PC[:1]), ValueError, r"reference_mismatched must be \(6,\) as policy_mismatched is"),
        (lambda: orpo_loss(PC, PC, PC), ValueError, r"nll must be \[\], got \(6,\)"),
        (lambda: orpo_loss(PC, PC, NLL, -0.1), ValueError, "beta must be at least 0, got -0.1"),
        (lambda: simpo_loss(PC, PC, INF), ValueError, "beta must be finite, got inf"),
        (lambda: simpo_loss(PC, PC, gamma=-0.5), ValueError, "gamma must be at least 0, got -0.5"),
        (lambda: simpo_loss(PC, PC, label_smoothing=0.7), ValueError, "label_smoothing must be in"),
    ],
)  # fmt: skip
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act()
