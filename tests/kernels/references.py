"""What kernels compute, in plain torch, rounding where they round."""

from __future__ import annotations

import torch

from lowbit.kernels.attention_int8 import NO_SCORE, VALUE_SHIFT
from lowbit.kernels.attention_quantize import KEY_BLOCK, padded_head_dim, sylvester
from lowbit.kernels.matmul_split import FLOAT8_TERM
from lowbit.kernels.quantize_rows import INTEGER_TERM, SMALLEST_SCALE, apply_activation
from lowbit.kernels.runtime import INTERPRETED, ceil_div


def matmul_rows_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(a @ b.T) x row_scale[:, None] x column_scale[None, :] + bias, exact sums for int8.

    Args:
        a: (M, K) int8 or float8.
        b: (N, K), same dtype.
        row_scale: (M,) float32.
        column_scale: (N,) or (1,) float32.
        bias: (N,) or None.
        dtype: of the (M, N) result.
    """
    product = a.double() @ b.double().t()
    product = product * row_scale.double().unsqueeze(1) * column_scale.double().reshape(1, -1)
    if bias is not None:
        product = product + bias.double()
    return product.to(dtype)


def split_rows_reference(
    x: torch.Tensor, terms: int, integer: bool, activation: str | None = None, planes: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms, M, K) int8 or e4m3 and (M,) float32 so that x ~ scale x sum over t of terms[t] / base ** t.

    base is 254 for int8 (each term covers half a step of the one before) and 16 for e4m3. With planes 2 the even columns
    come first and the odd ones after them.
    """
    wide = apply_activation(x.float(), activation)
    wide = torch.cat([wide[:, plane::planes] for plane in range(planes)], dim=1)
    largest = wide.abs().amax(dim=1)
    if integer:
        scale = (largest / 127.0).clamp(min=SMALLEST_SCALE)
    else:
        scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=SMALLEST_SCALE))) - 7.0)
        scale = torch.where(largest.isfinite(), scale, largest)
    rest = torch.nan_to_num(wide / scale.unsqueeze(1), nan=0.0, posinf=0.0, neginf=0.0)
    parts = []
    for _ in range(terms):
        part = rest.round() if integer else rest.to(torch.float8_e4m3fn).float()
        parts.append(part)
        rest = (rest - part) * (INTEGER_TERM if integer else FLOAT8_TERM)
    return torch.stack(parts).to(torch.int8 if integer else torch.float8_e4m3fn), scale


def attention_int8_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    fp8_values: bool,
) -> torch.Tensor:
    """What the kernels compute, in float32 with the same codes: (batch, heads, queries, head_dim).

    q, k, v: (batch, heads or kv_heads, length, head_dim). mask: (batch or 1, keys) bool.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    d, blocks = padded_head_dim(head_dim), ceil_div(keys, KEY_BLOCK)
    kept = torch.ones(batch, keys, dtype=torch.bool, device=q.device) if mask is None else mask.expand(batch, keys)
    kept = kept[:, None, :, None]
    matrix = sylvester(d, q.device, torch.float32)
    pad = torch.nn.functional.pad

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return pad(x, (0, d - head_dim)).to(torch.float32 if INTERPRETED else torch.bfloat16).float() @ matrix

    k32, v32 = torch.where(kept, k.float(), 0.0), torch.where(kept, v.float(), 0.0)
    mean = k32.sum(2, keepdim=True) / kept.sum(2, keepdim=True).clamp_min(1)
    k32 = pad(rotated(torch.where(kept, k32 - mean, 0.0)), (0, 0, 0, blocks * KEY_BLOCK - keys))
    grouped = k32.view(batch, kv_heads, blocks, KEY_BLOCK, d)
    k_scale = (grouped.abs().amax((3, 4), keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    k32 = ((grouped / k_scale).round() * k_scale).reshape(k32.shape)[:, :, :keys]
    q32 = rotated(q.float())
    q_scale = (q32.abs().amax(3, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    q32 = (q32 / q_scale).round() * q_scale
    k32, v32 = (x.repeat_interleave(heads // kv_heads, 1) for x in (k32, v32))
    scores = (q32 @ k32.transpose(2, 3) * (scale * d)).masked_fill(~kept.transpose(2, 3), -torch.inf)
    weights = torch.exp(scores - scores.amax(3, keepdim=True).clamp_min(NO_SCORE))
    total = weights.sum(3, keepdim=True)
    if fp8_values:
        v_scale = (v32.abs().amax(2, keepdim=True) / 448).clamp_min(SMALLEST_SCALE)
        v32 = (v32 / v_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * v_scale
        most = 2.0**VALUE_SHIFT
        weights = (weights * most).to(torch.float8_e4m3fn).float() / most
    else:
        weights = weights.to(v.dtype).float()
    out = weights @ v32 / total.clamp_min(1e-30)
    limit = torch.finfo(q.dtype).max
    return out.clamp(-limit, limit).to(q.dtype)
