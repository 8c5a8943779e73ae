"""Triton kernels and their launchers, and the native CPU library. Installed as peft_ops.kernels; imports torch, triton
and siblings only.

Importing it imports no kernel, so that `cpu` is reached without triton. Under its bare name (the repository's root on
sys.path) the package is empty: no module is loaded under two names, and transformers, which imports a package called
kernels where it finds one, sees one without a version.
"""

if __name__ == "kernels":
    __path__ = []
