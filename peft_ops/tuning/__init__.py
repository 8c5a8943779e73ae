"""The fine-tuning methods: a config and what it does to a model."""

from .adapt import adapt as adapt
from .bottleneck_config import AdapterConfig as AdapterConfig
from .counts import trainable_parameters as trainable_parameters
from .full import FullConfig as FullConfig
from .fuse import fuse as fuse
from .fuse import unfuse as unfuse
from .layerwise import LayerwiseSchedule as LayerwiseSchedule
from .lora_config import LoRAConfig as LoRAConfig
from .lora_config import QLoRAConfig as QLoRAConfig
from .lora_plus import lora_plus_groups as lora_plus_groups
from .masters import MasterWeights as MasterWeights
from .merge import eject as eject
from .merge import merge as merge
from .named import adapter_names as adapter_names
from .named import delete_adapter as delete_adapter
from .named import set_adapter as set_adapter
from .optimizer import optimizer_for as optimizer_for
from .partial import PartialConfig as PartialConfig
from .prefix_config import PrefixTuningConfig as PrefixTuningConfig
from .prefix_config import PTuningV2Config as PTuningV2Config
from .prompt_config import PromptTuningConfig as PromptTuningConfig
from .prompt_config import PTuningConfig as PTuningConfig
from .switch import adapters_disabled as adapters_disabled
from .weighted import add_weighted_adapter as add_weighted_adapter
