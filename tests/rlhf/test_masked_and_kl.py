"""Masked sums, means and whitening; KL estimates; the controllers of its coefficient."""

import math

import pytest
import torch
from rlhf_batches import INF, NAN, close, f64, gradients, leaf, mask_of, poisoned, tokens

from peft_ops.rlhf import AdaptiveKL, FixedKL, kl_estimate, masked_mean, masked_sum, whiten

MASK = mask_of(3, 0, 7, 1)


def test_sums_and_means_are_those_of_the_masked_values():
    x = tokens()
    rows = [row[m] for row, m in zip(x, MASK, strict=True)]
    close(masked_sum(x, MASK), torch.stack([row.sum() for row in rows]))
    close(masked_sum(x, MASK, None), x[MASK].sum())
    close(masked_mean(x, MASK), x[MASK].mean())
    close(masked_mean(x, MASK, -1), torch.stack([row.mean() if len(row) else row.sum() for row in rows]))
    close(masked_mean(x, MASK, 0)[0], x[[0, 2, 3], 0].mean())


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_reaches_neither_value_nor_gradient(poison):
    x, direction = leaf(tokens()), tokens()
    bad = poisoned(x, MASK, poison)
    for f in (lambda t: masked_sum(t, MASK), lambda t: masked_mean(t, MASK, -1), lambda t: whiten(t, MASK)):
        ours, theirs = f(bad), f(x)
        close(ours, theirs)
        weight = direction[:, 0] if ours.dim() == 1 else direction
        close(gradients((ours * weight).sum(), bad)[0], gradients((theirs * weight).sum(), x)[0])


def test_nothing_is_zero_with_zero_gradient():
    x, nothing = leaf(torch.full((2, 3), NAN)), torch.zeros(2, 3, dtype=torch.bool)
    for out in (masked_sum(x, nothing), masked_mean(x, nothing), masked_mean(x, nothing, -1), whiten(x, nothing)):
        assert (out == 0).all()
        assert (gradients(out.sum(), x)[0] == 0).all()
    assert masked_mean(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)) == 0


def test_16_bit_values_are_summed_in_float32():
    x = torch.full((1, 4096), 1.01, dtype=torch.bfloat16)
    out = masked_sum(x, torch.ones(1, 4096, dtype=torch.bool))
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(4096 * x[0, 0].item(), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_whitened_values_have_mean_and_variance(shift):
    x = 3 + 5 * torch.randn(4, 7, dtype=torch.float64)
    white = whiten(x, MASK, shift)
    assert (white[~MASK] == 0).all()
    assert white[MASK].mean().item() == pytest.approx(0 if shift else x[MASK].mean().item(), abs=1e-12)
    assert white[MASK].var(correction=0).item() == pytest.approx(1)
    # OpenRLHF, trainer/ppo_utils/experience_maker.py: (A − mean) · rsqrt(clamp(var, 1e-8)), var over n
    mean, var = x[MASK].mean(), x[MASK].square().mean() - x[MASK].mean() ** 2
    close(white[MASK], (x[MASK] - mean) / var.sqrt() + (0 if shift else mean))


def test_equal_values_are_whitened_to_zero():
    assert (whiten(torch.full((2, 4), 2.5), torch.ones(2, 4, dtype=torch.bool)) == 0).all()
    one = mask_of(1, 0, T=3)
    assert (whiten(torch.randn(2, 3), one) == 0).all()


def test_kl_estimates_are_schulmans():
    logp, reference = tokens(), tokens()
    ratio = (reference - logp).exp()  # r = p / q of samples from q, joschu.net/blog/kl-approx.html
    close(kl_estimate(logp, reference, "k1"), -ratio.log())
    close(kl_estimate(logp, reference, "k2"), ratio.log() ** 2 / 2)
    close(kl_estimate(logp, reference), (ratio - 1) - ratio.log())
    assert (kl_estimate(logp, logp, "k3") == 0).all()


def test_kl_estimates_estimate_the_kl():
    p, q = f64([0.5, 0.3, 0.2]), f64([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):  # the expectation over the policy's own tokens, exactly
        close((p * kl_estimate(p.log()[None], q.log()[None], estimator)[0]).sum(), exact)


def test_small_k3_is_exact_and_never_negative_in_float32():
    d = torch.cat([10 ** torch.linspace(-20, 0.5, 400), torch.tensor([0.4999999, 0.5, 0.5000001])])
    d = torch.cat([d, -d])[None]
    ours = kl_estimate(torch.zeros_like(d), d)
    exact = torch.tensor([float(_k3_by_hand(float(v))) for v in d[0]], dtype=torch.float64)[None]
    assert (ours >= 0).all()
    kept = exact > 1e-37
    assert ((ours.double() - exact).abs() / exact)[kept].max() < 1e-6
    x = leaf(d)
    (slope,) = gradients(kl_estimate(torch.zeros_like(d), x).sum(), x)
    torch.testing.assert_close(slope, torch.expm1(d), rtol=1e-5, atol=0)


def _k3_by_hand(d):
    if abs(d) > 1:
        return math.expm1(d) - d
    total, term = 0.0, d * d / 2
    for n in range(3, 40):
        total, term = total + term, term * d / n
    return total


def test_extreme_k3_is_finite_while_the_truth_is():
    logp, reference = torch.zeros(1, 4), torch.tensor([[-1000.0, -50, 50, 80]])
    x = leaf(logp)
    out = kl_estimate(x, reference)
    close(out, (reference.double().exp() - reference - 1), rtol=1e-6)
    assert gradients(out.sum(), x)[0].isfinite().all()
    assert kl_estimate(logp, torch.full((1, 4), 1000.0)).isposinf().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradients_and_padding(estimator):
    logp, reference = leaf(tokens()), leaf(tokens())
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator, MASK), (logp, reference))
    near = leaf(logp + 1e-3 * torch.randn_like(logp))
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator), (logp, near), eps=1e-7, atol=1e-6)
    bad = poisoned(logp, MASK)
    out = kl_estimate(bad, poisoned(reference, MASK, INF), estimator, MASK)
    close(out, torch.where(MASK, kl_estimate(logp, reference, estimator), 0))
    assert (gradients(out.sum(), bad)[0][~MASK] == 0).all()


def test_adaptive_kl_by_hand():
    control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    control.update(6.6, 100)  # error 0.1: 0.1 · (1 + 0.1 · 0.1)
    assert control.value == pytest.approx(0.101)
    control.update(60.0, 500)  # error clipped to 0.2: 0.101 · (1 + 0.2 · 0.5)
    assert control.value == pytest.approx(0.1111)
    control.update(0.0, 1000)  # error clipped to −0.2: 0.1111 · 0.8
    assert control.value == pytest.approx(0.08888)
    control.update(0.0, 10**9)  # beyond the horizon: as the horizon
    assert control.value == pytest.approx(0.08888 * 0.8)
    with pytest.raises(ValueError, match="kl must be finite, got nan"):
        control.update(NAN, 1)
    assert control.value == pytest.approx(0.08888 * 0.8)
    fixed = FixedKL(0.05)
    fixed.update(100.0, 1000)
    assert fixed.value == 0.05


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda x: masked_sum(x, MASK.float()), TypeError, "mask must be a bool tensor, got torch.float32"),
        (lambda x: masked_sum(x, MASK[:, :6]), ValueError, r"mask must be \(4, 7\) as values is, got \(4, 6\)"),
        (lambda x: masked_mean(x, None), TypeError, "mask must be a bool tensor, got NoneType"),
        (lambda x: masked_mean([1.0], MASK), TypeError, "values must be a tensor, got list"),
        (lambda x: whiten(x.to("meta"), MASK), ValueError, "mask must be on meta as values is, got cpu"),
        (lambda x: kl_estimate(x, x, "k4"), ValueError, "estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (lambda x: kl_estimate(x, x[:2]), ValueError, r"reference_logp must be \(4, 7\) as logp is, got \(2, 7\)"),
        (lambda x: kl_estimate(x[0], x[0]), ValueError, r"logp must be \[B, T\], got \(7,\)"),
        (
            lambda x: kl_estimate(x.long(), x),
            TypeError,
            r"logp must be a floating-point tensor \[B, T\], got torch.int",
        ),
        (lambda x: AdaptiveKL(0.1, target=0.0), ValueError, "target must be positive, got 0.0"),
        (lambda x: AdaptiveKL("0.1"), TypeError, "value must be a number, got '0.1'"),
        (lambda x: FixedKL(-1.0), ValueError, "value must be at least 0, got -1.0"),
    ],
)
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act(tokens())
