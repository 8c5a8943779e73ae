"""The coefficient of the KL penalty over a run: fixed, or steered to a target."""

from __future__ import annotations

from ._arguments import check_number, check_positive


class FixedKL:
    """A coefficient that stays: `value` is what it was given.

    Raises:
        ValueError: value is negative or not finite.
    """

    def __init__(self, value: float = 0.05) -> None:
        check_number("value", value, 0.0)
        self.value = float(value)

    def update(self, kl: float, n_steps: int) -> None:
        """Nothing."""


class AdaptiveKL:
    """A coefficient that grows by 20% of n_steps / horizon at most while the KL is above its target, and shrinks alike.

    value ← value · (1 + clip(kl / target − 1, −0.2, 0.2) · n_steps / horizon). `value` is all its state.

    Args:
        value: the first coefficient.
        target: the KL in nats per completion that is wanted.
        horizon: over how many completions the coefficient may change by 20%.

    Raises:
        TypeError, ValueError: an argument that is not a positive number.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.
    """

    def __init__(self, value: float = 0.2, target: float = 6.0, horizon: float = 10_000) -> None:
        for name, number in (("value", value), ("target", target), ("horizon", horizon)):
            check_positive(name, number)
        self.value, self.target, self.horizon = float(value), target, horizon

    def update(self, kl: float, n_steps: int) -> None:
        """After n_steps completions whose mean KL to the reference was kl, a number.

        n_steps beyond the horizon count as the horizon: five of them would otherwise make the coefficient negative.

        Raises:
            ValueError: kl is NaN or infinite, n_steps negative; the coefficient stays as it was.
        """
        check_number("kl", kl)
        check_number("n_steps", n_steps, 0)
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * min(n_steps / self.horizon, 1.0)
