"""Every op in plain PyTorch: the specification that kernels are held against, and the path where there are none."""

from . import attention as attention
from . import bottleneck_adapter as bottleneck_adapter
from . import dora as dora
from . import down_project as down_project
from . import gated as gated
from . import linear_logprob as linear_logprob
from . import linear_low_rank as linear_low_rank
from . import low_rank as low_rank
from . import nf4 as nf4
from . import nf4_linear as nf4_linear
from . import prefix_attention as prefix_attention
