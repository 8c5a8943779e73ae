"""Fused operations and drop-in layers for parameter-efficient fine-tuning."""

from . import nf4 as nf4
from . import nn as nn
from . import ops as ops
from .checkpoint import load_adapter as load_adapter
from .checkpoint import save_adapter as save_adapter
from .tuning import AdapterConfig as AdapterConfig
from .tuning import FullConfig as FullConfig
from .tuning import LayerwiseSchedule as LayerwiseSchedule
from .tuning import LoRAConfig as LoRAConfig
from .tuning import MasterWeights as MasterWeights
from .tuning import PartialConfig as PartialConfig
from .tuning import PrefixTuningConfig as PrefixTuningConfig
from .tuning import PromptTuningConfig as PromptTuningConfig
from .tuning import PTuningConfig as PTuningConfig
from .tuning import PTuningV2Config as PTuningV2Config
from .tuning import QLoRAConfig as QLoRAConfig
from .tuning import adapt as adapt
from .tuning import adapters_disabled as adapters_disabled
from .tuning import eject as eject
from .tuning import lora_plus_groups as lora_plus_groups
from .tuning import merge as merge
from .tuning import optimizer_for as optimizer_for
from .tuning import trainable_parameters as trainable_parameters
