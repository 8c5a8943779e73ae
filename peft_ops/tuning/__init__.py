"""The fine-tuning methods: a config and what it does to a model."""

from .adapt import adapt as adapt
from .counts import trainable_parameters as trainable_parameters
from .lora_config import LoRAConfig as LoRAConfig
from .lora_config import QLoRAConfig as QLoRAConfig
from .merge import eject as eject
from .merge import merge as merge
from .prefix_config import PrefixTuningConfig as PrefixTuningConfig
from .prefix_config import PTuningV2Config as PTuningV2Config
from .switch import adapters_disabled as adapters_disabled
