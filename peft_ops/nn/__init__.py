"""Drop-in layers: thin modules around the ops."""

from .bottleneck_adapter import BottleneckAdapter as BottleneckAdapter
from .dora_linear import DoRALinear as DoRALinear
from .gated_mlp import GatedMLP as GatedMLP
from .head import Head as Head
from .head import head_of as head_of
from .lora_embedding import LoRAEmbedding as LoRAEmbedding
from .lora_linear import LoRALinear as LoRALinear
from .nf4_linear import NF4Linear as NF4Linear
