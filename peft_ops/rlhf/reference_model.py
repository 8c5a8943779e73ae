"""The reference policy: the adapted model itself, with its adapters switched off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..tuning import adapters_disabled


class ReferenceModel(nn.Module):
    """What `policy` was before it was adapted, as a model of its own that holds no weights.

    Every call runs `policy` in eval mode with its adapters off and without gradients, and leaves its modes as they
    were; so arguments and outputs are the policy's, whatever its forward is by then. It has no parameters or buffers,
    and the policy is not a child of it: what moves or wraps or saves the policy does so once. A forward that is set on
    it is not used.

    Raises:
        ValueError: the policy has no base to go back to (it is not adapted, or trained in place).

    Source: Rafailov et al., "Direct Preference Optimization", 2023, for what a reference is; Hugging Face TRL 1.16
    does the same with PEFT's models.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        with adapters_disabled(policy):
            pass
        object.__setattr__(self, "policy", policy)

    policy: nn.Module

    @property
    def config(self) -> Any:
        return self.policy.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), _in_eval_mode(self.policy), adapters_disabled(self.policy):
            return self.policy(*args, **kwargs)

    __call__ = forward

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's while its adapters are off: it tells one reference from another."""
        with adapters_disabled(self.policy):
            return self.policy.state_dict(*args, **kwargs)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
