"""Looks tokens up in a table of embeddings, plain or quantized, and decodes no row but theirs."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ..kernels.decode import decode_reference
from ..kernels.stored_weight import FP8, INT8
from ..ops.linear_weight import FLOAT8_DTYPES, stored_weight


def embedded(table: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(T, K) rows of tokens (T,), without waiting for the device.

    Args:
        table: (V, K) tensor, or a comfy-kitchen `QuantizedTensor`.
        tokens: int64, on the device of the table.
        dtype: of what is decoded from 8 bits or fewer; a wider table gives rows of its own dtype.
    """
    if not hasattr(table, "_layout_cls"):
        rows = F.embedding(tokens, table)
        return rows.to(dtype) if table.dtype in FLOAT8_DTYPES else rows
    stored = stored_weight(table)
    if stored is None or stored.kind not in (FP8, INT8):
        return F.embedding(tokens, table.dequantize()).to(dtype)
    found = dataclasses.replace(stored, data=F.embedding(tokens, stored.data), rows=tokens.shape[0])
    if stored.scale is not None and stored.scale.numel() > 1:
        found = dataclasses.replace(found, scale=stored.scale.index_select(0, tokens))
    return decode_reference(found, dtype)
