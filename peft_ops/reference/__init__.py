"""Every op in plain PyTorch: the specification that kernels are held against, and the path where there are none."""
