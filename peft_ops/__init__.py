"""Fused operations and drop-in layers for parameter-efficient fine-tuning."""

from . import nf4 as nf4
from . import ops as ops
