"""Differentiable operations: one autograd.Function and one public function per op."""

from .attention import attention as attention
from .bottleneck_adapter import bottleneck_adapter as bottleneck_adapter
from .dora_linear import dora_linear as dora_linear
from .dora_linear import dora_norm as dora_norm
from .gated_mlp import gated_mlp as gated_mlp
from .linear_logprob import TokenLogProbs as TokenLogProbs
from .linear_logprob import linear_cross_entropy as linear_cross_entropy
from .linear_logprob import linear_logprob as linear_logprob
from .lora_embedding import lora_embedding as lora_embedding
from .lora_linear import lora_linear as lora_linear
from .lora_projections import lora_projections as lora_projections
from .nf4_linear import nf4_linear as nf4_linear
from .prefix_attention import prefix_attention as prefix_attention
from .projection import Projection as Projection
