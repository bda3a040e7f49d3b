"""Chooses NVFP4 block scales by error, not by the block's maximum alone, and packs the weight."""

from __future__ import annotations

import torch
from einops import rearrange

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0

BLOCK_MAXIMA = (6.0, 4.0)
"""Grid values that a block's largest weight may land on ("Four over six", arXiv 2512.02010): E2M1 is coarsest near 6,
so a block with many weights near its maximum is better off with the maximum on 4."""


def quantize_nvfp4(weight: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to E2M1 with an E4M3 scale per 16 columns.

    Args:
        weight: (rows, columns) float32, columns a multiple of 16.
        tensor_scale: float32 scalar (`weight_scale_2`).

    Returns:
        `qdata` (rows, columns / 2) uint8, the earlier column in the high nibble, and the block scales
        (rows, columns / 16) float8_e4m3fn, row by row.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=-1)
    tries = [_round_blocks(blocks, largest / (target * tensor_scale), tensor_scale) for target in BLOCK_MAXIMA]
    (scale, values, error), (other_scale, other_values, other_error) = tries
    better = other_error < error
    values = torch.where(better.unsqueeze(-1), other_values, values)
    scale = torch.where(better, other_scale.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    codes = _codes(values).reshape(rows, columns // 2, 2)
    return (codes[..., 0] << 4) | codes[..., 1], scale


def _round_blocks(
    blocks: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The E4M3 scale, each weight's signed grid value under it, and each block's squared error."""
    scale = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scale.float() * tensor_scale).unsqueeze(-1)
    # A block whose scale rounds to zero becomes zero: 0/0 must not.
    scaled = torch.where(step > 0, blocks / step, torch.zeros((), device=blocks.device))
    magnitude = scaled.abs()
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / spacing).round_().mul_(spacing).clamp_(max=E2M1_MAX)
    values = torch.copysign(rounded, scaled)
    error = (values * step - blocks).square_().sum(dim=-1)
    return scale, values, error


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Four-bit codes of E2M1 grid values: sign in bit 3."""
    magnitude = values.abs()
    upper = torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4)
    codes = torch.where(magnitude < 2, magnitude * 2, upper).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def tiled_scales(block_scale: torch.Tensor) -> torch.Tensor:
    """Block scales in the order in which tensor cores read them: tiles of 128 rows by 4, zeros where the last ones are not full.

    See "1D block scaling factors layout" in cuBLAS's manual.

    Args:
        block_scale: (rows, blocks) float8_e4m3fn, row by row.

    Returns:
        (rows to the next 128, blocks to the next 4) float8_e4m3fn.
    """
    rows, blocks = block_scale.shape
    padded = torch.nn.functional.pad(block_scale.view(torch.uint8), (0, -blocks % 4, 0, -rows % 128))
    tiles = rearrange(padded, "(r quarter row) (c block) -> r c row quarter block", quarter=4, row=32, block=4)
    return tiles.reshape(padded.shape).view(block_scale.dtype)


def untiled_scales(tiles: torch.Tensor, rows: int, blocks: int) -> torch.Tensor:
    """What `tiled_scales` was made of: (rows, blocks) in the dtype of `tiles`, whose shape does not matter."""
    down, across = -(-rows // 128), -(-blocks // 4)
    stored = tiles.reshape(down, across, 32, 4, 4)
    plain = rearrange(stored, "r c row quarter block -> (r quarter row) (c block)")
    return plain[:rows, :blocks]
