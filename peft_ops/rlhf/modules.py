"""The losses as modules which take hidden states and a Head, whose log_probs never builds the logits."""

from .policy_modules import ActorCriticLoss as ActorCriticLoss
from .policy_modules import GRPOLoss as GRPOLoss
from .policy_modules import PPOLoss as PPOLoss
from .preference_modules import DPOLoss as DPOLoss
from .preference_modules import KTOLoss as KTOLoss
from .preference_modules import ORPOLoss as ORPOLoss
from .preference_modules import RewardLoss as RewardLoss
from .preference_modules import SimPOLoss as SimPOLoss
