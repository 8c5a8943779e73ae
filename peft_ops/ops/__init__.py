"""Differentiable operations: one autograd.Function and one public function per op."""

from .lora_linear import lora_linear as lora_linear
from .nf4_linear import nf4_linear as nf4_linear
from .prefix_attention import prefix_attention as prefix_attention
