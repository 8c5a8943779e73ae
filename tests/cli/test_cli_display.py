"""What a run shows, on a terminal and elsewhere."""

from io import StringIO

import pytest
from rich.console import Console

from peft_ops.cli.display import progress
from peft_ops.cli.report import smoothed


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_and_speed(terminal):
    out = StringIO()
    with progress(Console(file=out, force_terminal=terminal, width=118, highlight=False), "lora", steps=2) as observer:
        observer.held_out(0, 2.5)
        observer.step(1, 1.25, 12345.6)
        observer.step(2, 1.125, 54321.0)
    shown = out.getvalue()
    for text in ("lora", "loss 1.125", "54,321 tokens/s"):
        assert text in shown
    assert ("held-out loss 2.500" if not terminal else "held out 2.500") in shown
    assert ("\x1b" in shown) == terminal


def test_smoothing_keeps_a_constant_and_a_mean():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    bumpy = smoothed([0.0, 2.0] * 200)
    assert bumpy[200] == pytest.approx(1.0, abs=1e-3)
    assert len(bumpy) == 400
