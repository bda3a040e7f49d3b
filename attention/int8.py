"""This pack's own attention: int8 scores, e4m3 or 16-bit values, as one torch operator; needs nothing but Triton."""

from __future__ import annotations

import torch

from ..kernels.attention_hopper import QUERY_BLOCK, attend_hopper, can_copy_in_bulk
from ..kernels.attention_int8 import attend_int8, tiles_for
from ..kernels.attention_quantize import quantize_attention
from ..kernels.operators import register_operator
from ..kernels.runtime import GLUON_FOUND, HOPPER, INTERPRETED, compute_capability, kernels_run_on


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    fp8_values: bool = True,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(q k^T scale) v with int8 scores, and the log-sum-exp of the scores when it is asked for.

    Args:
        q: (batch, heads, queries, head_dim) float16 or bfloat16, any strides, head dim up to 128.
        k: (batch, kv_heads, keys, head_dim), heads a multiple of kv_heads.
        v: as k.
        mask: (batch or 1, keys) bool, True where a key counts. Masked keys are not read: they may hold NaN. A batch
            whose keys are all masked gives zeros and a log-sum-exp of minus infinity.
        scale: of the scores, None for head_dim ** -0.5.
        fp8_values: multiply weights and V in e4m3 (cc 8.9 and newer) instead of in their own 16 bits.
        with_lse: return the log-sum-exp.

    Returns:
        (batch, heads, queries, head_dim) in q's dtype, tokens first in memory; (batch, heads, queries) float32 or None.
    """
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return int8_attention(q, k, v, mask, scale, fp8_values, with_lse)
    batch, heads, queries, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32) if with_lse else None
    capability = HOPPER if INTERPRETED and not q.is_cuda else compute_capability(q.device.index or 0)
    hopper = capability == HOPPER and GLUON_FOUND
    tiles = tiles_for(capability, fp8_values)
    quantized = quantize_attention(
        q, k, v, mask, scale, QUERY_BLOCK if hopper else tiles.rows, fp8_values, shift=with_lse
    )
    if mask is not None and not fp8_values:
        v = v.masked_fill(~mask[:, None, :, None], 0)
    if hopper:
        v = v if fp8_values or can_copy_in_bulk(v) else v.contiguous()
        attend_hopper(quantized, v, mask, out, lse)
    else:
        attend_int8(quantized, v, mask, out, lse, tiles)
    return out, lse


def missing_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, None when they can."""
    if kernels_run_on(torch.empty(0, device=device)):
        return None
    return "without a Triton that can build kernels here (3.4 or newer, and a C compiler)"


_SCHEMA = "int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, bool fp8_values) -> Tensor"


def _int8_attention_op(q, k, v, mask, scale, fp8_values):
    return int8_attention(q, k, v, mask, scale, fp8_values)[0]


def _int8_attention_fake(q, k, v, mask, scale, fp8_values):
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)


register_operator("int8_attention", _SCHEMA, _int8_attention_op, _int8_attention_fake)
