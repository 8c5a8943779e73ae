"""Triton kernels and their launchers. Installed as peft_ops.kernels; imports torch, triton and siblings only."""

if __name__ == "kernels":
    raise ImportError("import peft_ops.kernels, not kernels")
