"""Triton kernels and their launchers. Installed as peft_ops.kernels; imports torch, triton and siblings only."""

if __name__ == "kernels":  # the repository's root on sys.path: no module is loaded under two names, and transformers,
    __path__ = []  # which imports a package called kernels where it finds one, sees an empty one without a version
