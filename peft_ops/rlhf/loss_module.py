"""The base of the losses that are modules."""

from torch import nn


class LossModule(nn.Module):
    """A loss whose settings are its public attributes."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")
