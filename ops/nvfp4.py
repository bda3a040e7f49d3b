"""Chooses NVFP4 block scales by error, not by the block's maximum alone, and packs the weight."""

from __future__ import annotations

import torch
from comfy_kitchen.float_utils import to_blocked

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0

_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

BLOCK_MAXIMA = (6.0, 4.0)
"""Grid values that a block's largest weight may land on ("Four over six", arXiv 2512.02010): E2M1 is coarsest near 6,
so a block with many weights near its maximum is better off with the maximum on 4."""


def quantize_nvfp4(weight: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to E2M1 with an E4M3 scale per 16 columns.

    Args:
        weight: (rows, columns) float32, columns a multiple of 16.
        tensor_scale: float32 scalar (`weight_scale_2`).

    Returns:
        `qdata` (rows, columns / 2) uint8, the earlier column in the high nibble, and `block_scale`
        float8_e4m3fn in cuBLAS' blocked layout (rows rounded up to 128, columns / 16 rounded up to 4).
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=-1)
    best_scale = best_codes = best_error = None
    for target in BLOCK_MAXIMA:
        scale = (largest / (target * tensor_scale)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        step = (scale.float() * tensor_scale).unsqueeze(-1)
        codes, error = _round_to_e2m1(blocks, step)
        if best_error is None:
            best_scale, best_codes, best_error = scale, codes, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
        best_scale = torch.where(better, scale.view(torch.uint8), best_scale.view(torch.uint8)).view(
            torch.float8_e4m3fn
        )
    codes = best_codes.reshape(rows, columns // 2, 2)
    return (codes[..., 0] << 4) | codes[..., 1], to_blocked(best_scale, flatten=False)


def _round_to_e2m1(blocks: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Four-bit codes of `blocks / step`, sign in bit 3, and each block's squared error."""
    scaled = torch.where(step > 0, blocks / step, torch.zeros((), device=blocks.device))
    magnitude = scaled.abs()
    codes = torch.bucketize(magnitude, torch.tensor(_MIDPOINTS, device=blocks.device), out_int32=True)
    rounded = torch.tensor(_VALUES, device=blocks.device)[codes]
    error = ((rounded - magnitude).square_().sum(dim=-1)) * step.squeeze(-1).square()
    # A block whose scale rounds to zero is lost whole.
    error = torch.where(step.squeeze(-1) > 0, error, blocks.square().sum(dim=-1))
    return (codes.to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3), error
