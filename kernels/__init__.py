"""Triton kernels and their launchers. Installed as peft_ops.kernels; imports torch, triton and siblings only.

Under its bare name (the repository's root on sys.path) the package is empty: no module is loaded under two names, and
transformers, which imports a package called kernels where it finds one, sees one without a version.
"""

if __name__ == "kernels":
    __path__ = []
else:
    import os

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

    if os.environ.get("PEFT_OPS_AUTOTUNE") == "1":
        from . import autotune

        autotune.enable()
