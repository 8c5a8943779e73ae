"""The prefix's part of attention over [prefix; text] on a CPU; its keys, values and all sums are float32."""

import torch

from . import heads, native

_CHUNKS = 8  # of the batch, whose parts of the prefix's gradients are summed last: as many threads find work


def prefix_merge_(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    bias: torch.Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Turns (out, lse) of attention over the text into those over [prefix; text], in place, and returns them."""
    q, key, value, bias, masks, held = _prepared(
        query, prefix_key, prefix_value, bias, dropout_p, dropout_seed, prefix_p, prefix_seed
    )
    rows = heads.rows(out)
    native.lib.prefix_merge(
        rows.data_ptr(), lse.data_ptr(), q.data_ptr(), key.data_ptr(), value.data_ptr(), native.address(bias),
        native.DTYPES[q.dtype], heads.strides(rows, lse, q, bias), heads.sizes(q, key, value), scaling, *masks,
        heads.threads(q, key),
    )  # fmt: skip
    del held
    torch.autograd.graph.increment_version((out, lse))
    if rows is not out:
        out.copy_(rows)
    return out, lse


def prefix_gradients(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor,
    prefix_value: torch.Tensor, bias: torch.Tensor | None, dq: torch.Tensor | None, need_dprefix: bool, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(dq, dprefix_key, dprefix_value) from merged out and lse: the prefix's part is added to dq in place, where there
    is one; the prefix's own gradients, summed over the batch, are float32, or None where not needed."""
    q, key, value, bias, masks, held = _prepared(
        query, prefix_key, prefix_value, bias, dropout_p, dropout_seed, prefix_p, prefix_seed
    )
    dout, out = map(heads.rows, (dout, out))
    rows = None if dq is None else heads.rows(dq)
    chunks = max(1, min(_CHUNKS, q.shape[0]))
    of_keys, of_values = (torch.empty(chunks, *t.shape, dtype=torch.float32) for t in (key, value))
    native.lib.prefix_gradients(
        native.address(rows), of_keys.data_ptr(), of_values.data_ptr(), chunks, dout.data_ptr(), q.data_ptr(),
        out.data_ptr(), lse.data_ptr(), key.data_ptr(), value.data_ptr(), native.address(bias),
        native.DTYPES[q.dtype], heads.strides(rows, dout, q, out, lse, bias), heads.sizes(q, key, value), scaling,
        *masks, heads.threads(q, key),
    )  # fmt: skip
    del held
    if dq is not None and rows is dq:
        torch.autograd.graph.increment_version(dq)
    elif dq is not None and rows is not None:
        dq.copy_(rows)
    return dq, *((of_keys.sum(0), of_values.sum(0)) if need_dprefix else (None, None))


def _prepared(query, key, value, bias, p, seed, prefix_p, prefix_seed):
    """(query, key, value, bias [B, H, T, n], arguments of both masks, what they point to)."""
    key, value = (t.float().contiguous() for t in (key, value))
    bias = heads.bias_rows(None if bias is None else bias.unsqueeze(0), query, key.shape[-2])
    seeds = [native.seeds(s) for s in (seed, prefix_seed)]
    masks = (*_mask(p, seeds[0]), *_mask(prefix_p, seeds[1]))
    return heads.rows(query), key, value, bias, masks, seeds


def _mask(p: float, seed: torch.Tensor | None) -> tuple:
    """As native.dropout_arguments; at p = 1 what a mask keeps is multiplied by zero."""
    if p < 1.0:
        return native.dropout_arguments(p, seed, 1)
    return *native.dropout_arguments(0.5, seed, 1)[:3], 0.0
