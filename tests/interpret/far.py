"""Tensors whose elements lie beyond 2**31 of each other, on any machine."""

import torch

FAR = 2**30 + 64  # three rows of this stride end beyond 2**31


def far_rows(values):
    """The same values [rows, columns] with rows beyond 2**31 elements: untouched pages cost no memory."""
    rows, columns = values.shape
    store = torch.empty((rows - 1) * FAR + columns, dtype=values.dtype)
    view = store.as_strided((rows, columns), (FAR, 1))
    view.copy_(values)
    return view
