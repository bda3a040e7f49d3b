"""Decodes nunchaku's layers with torch: tensors packed for its kernels in, float32 in plain order out.

Sources: deepcompressor's deepcompressor/backend/nunchaku/utils.py and backend/tinychat/utils.py, which pack them, and
nunchaku's nunchaku/models/linear.py and src/kernels/zgemm/gemm_w4a4.cuh, which multiply with them.
"""

from __future__ import annotations

import torch

from .foreign_decode import E2M1, SIGNED, UNSIGNED, each_block, nibbles

ROWS = 128
"""Rows of a tile; a column of scales, a bias and a smoothing come in such tiles too."""

_GELU_SHIFT = 0.171875
"""What the kernel adds to the output of a GELU, so that INT4 needs no sign: the bias of the layer behind makes up for it."""


def svdquant(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight (out, in) of a layer of `svdquant`, its low rank and its smoothing in it.

    Args:
        tensors: `qweight`, `wscales` and, where there are any, `wcscales`, `wtscale`, `smooth`, `down` and `up`.
    """
    values = _quantized_part(tensors)
    if "down" in tensors:
        values += _low_rank(tensors["up"], down=False) @ _low_rank(tensors["down"], down=True)
    return values


def svdquant_bias(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Its bias in plain order, of `bias` alone or of the quantized weight too, where its input was shifted behind a GELU."""
    bias = _column(tensors["bias"])
    if "qweight" in tensors:
        bias += _GELU_SHIFT * _quantized_part(tensors).sum(1)
    return bias


def _quantized_part(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    scales = tensors["wscales"]
    values = _codes(tensors["qweight"], E2M1 if scales.dtype == torch.float8_e4m3fn else SIGNED)
    rows, columns = values.shape
    plain = _small_groups(scales) if scales.dtype == torch.float8_e4m3fn else _groups(scales)
    each_block(torch.Tensor.mul_, values, plain, (1, columns // scales.shape[0]))
    if "wcscales" in tensors:
        values *= _column(tensors["wcscales"]).view(rows, 1)
    if "wtscale" in tensors:
        values *= tensors["wtscale"].float().view(())
    if "smooth" in tensors:
        values /= _column(tensors["smooth"])
    return values


def _codes(packed: torch.Tensor, numbers: tuple[float, ...]) -> torch.Tensor:
    """(out, in) of (out, in / 2) bytes in tiles of 128 x 64, each lane's registers together."""
    rows, half = packed.shape
    tiles = packed.view(torch.uint8).reshape(rows // ROWS, half // 32, 8, 8, 4, 2, 2, 4)
    return nibbles(tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, half), numbers)


def _groups(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) of 16-bit scales (groups, out)."""
    groups, rows = scales.shape
    tiles = scales.float().reshape(rows // ROWS, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def _small_groups(scales: torch.Tensor) -> torch.Tensor:
    """(out, groups) of FP8 scales (groups, out), four groups together."""
    groups, rows = scales.shape
    tiles = scales.float().reshape(rows // ROWS, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def _column(packed: torch.Tensor) -> torch.Tensor:
    return _groups(packed.reshape(1, -1)).view(-1)


def _low_rank(packed: torch.Tensor, *, down: bool) -> torch.Tensor:
    """(rank, in) of the projection down and (out, rank) of the one up, both stored as (channels, rank)."""
    channels, rank = packed.shape
    tiles = packed.float().reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)
    if down:
        return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, channels)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(channels, rank)


def awq_four_rows(packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) of W4A16: rows in fours, 32 columns in eights.

    Args:
        packed: (out / 4, in) int16, or (out / 4, in / 2) int32.
        scales: (groups, out).
        zeros: (groups, out), times the scales already and added.
    """
    halves = packed.contiguous().view(torch.int16)
    quarter, columns = halves.shape
    tiles = halves.view(torch.uint8).reshape(quarter, columns // 64, 4, 2, 8, 2)
    codes = nibbles(tiles, UNSIGNED)
    values = codes.permute(0, 2, 1, 3, 5, 4).reshape(quarter * 4, columns)
    block = (1, columns // scales.shape[0])
    each_block(torch.Tensor.mul_, values, scales.t(), block)
    return each_block(torch.Tensor.add_, values, zeros.t(), block)
