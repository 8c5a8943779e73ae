"""Differentiable operations: one autograd.Function and one public function per op."""

from .bottleneck_adapter import bottleneck_adapter as bottleneck_adapter
from .lora_linear import lora_linear as lora_linear
from .nf4_linear import nf4_linear as nf4_linear
