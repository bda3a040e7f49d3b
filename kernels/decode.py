"""Decoding a stored weight: the plain-torch reference for every storage kind, and row-scaled 8-bit grids of it."""

from __future__ import annotations

import functools

import torch

from .hadamard import rotate_reference
from .runtime import made_to_keep
from .stored_weight import INT4, INT4_CODEBOOK, INT8, MXFP8, NVFP4, PACKED_KINDS, StoredWeight

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def swizzled_index(rows: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Flat positions of the (rows, blocks) scales inside cuBLAS's 128 x 4 tiled layout, int64.

    Source: cuBLAS documentation, "1D block scaling factors layout".
    """
    row = torch.arange(rows, device=device).unsqueeze(1)
    block = torch.arange(blocks, device=device).unsqueeze(0)
    tiles_per_row = -(-blocks // 4)
    tile = (row // 128) * tiles_per_row + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4


@functools.lru_cache(maxsize=16)
def _e2m1_table(device: torch.device) -> torch.Tensor:
    levels = (*E2M1_LEVELS, *(-level for level in E2M1_LEVELS))
    return made_to_keep(lambda: torch.tensor(levels, device=device))


def unpack_nibbles(packed: torch.Tensor, high_first: bool) -> torch.Tensor:
    """(N, K / 2) bytes to (N, K) codes 0..15 as uint8."""
    byte = packed.view(torch.uint8)
    low, high = byte & 0xF, byte >> 4
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)


def _repeat(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(group, dim=1)[:, :columns]


def _times_blocks(codes: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """codes (N, K) with every `group` columns multiplied by a scale of (N, ceil(K / group))."""
    if codes.shape[1] % group:
        return codes * _repeat(scale, group, codes.shape[1])
    return (codes.unflatten(1, (-1, group)) * scale.unsqueeze(-1)).flatten(1)


def _codes(weight: StoredWeight) -> torch.Tensor:
    """The stored codes as float32 (rows, columns), before any scale."""
    if weight.kind not in PACKED_KINDS:
        return weight.data[: weight.rows, : weight.columns].float()
    packed = weight.data[: weight.rows, : -(-weight.columns // 2)].contiguous().view(torch.uint8)
    # A byte's two numbers at once: half the look-ups, and no codes to unpack.
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    codes = unpack_nibbles(every_byte, high_first=weight.kind == NVFP4)
    pairs = _code_values(weight)[codes.int()]
    return pairs.index_select(0, packed.flatten().int()).view(packed.shape[0], -1)[:, : weight.columns]


def _code_values(weight: StoredWeight) -> torch.Tensor:
    """What the 16 codes of a packed kind stand for, as float32."""
    if weight.kind == NVFP4:
        return _e2m1_table(weight.data.device)
    if weight.kind == INT4_CODEBOOK and weight.codebook is not None:
        return weight.codebook.float()
    codes = torch.arange(16, dtype=torch.float32, device=weight.data.device)
    return codes - 16.0 * (codes >= 8) if weight.kind == INT4 else codes - 8.0


def block_scales(weight: StoredWeight) -> torch.Tensor:
    """The block scales as float32 (rows, ceil(columns / group)) in plain row-major order."""
    if weight.kind == INT4_CODEBOOK:
        return weight.block_scale.float()
    blocks = -(-weight.columns // weight.group)
    padded_blocks = -(-weight.data.shape[1] * (2 if weight.kind == NVFP4 else 1) // weight.group)
    index = swizzled_index(weight.rows, padded_blocks, weight.data.device)[:, :blocks]
    stored = weight.block_scale.reshape(-1)[index]
    if weight.kind == NVFP4:
        return stored.view(torch.float8_e4m3fn).float()
    # e8m0 code 0 marks an all-zero block in comfy-kitchen's files; 255 is NaN in the format.
    exponent = stored.float() - 127.0
    value = torch.where(stored == 0, torch.zeros_like(exponent), torch.exp2(exponent))
    return torch.where(stored == 255, torch.full_like(value, torch.nan), value)


def decode_int8_reference(weight: StoredWeight) -> torch.Tensor:
    """int8 (rows, columns) grid of an integer kind: W (rotated basis) = grid x scale per row, without `correction`."""
    if weight.kind == INT8:
        return weight.data[: weight.rows, : weight.columns]
    codes = _codes(weight)
    if weight.kind == INT4_CODEBOOK:
        codes = _times_blocks(codes, block_scales(weight), weight.group).round_().clamp_(-127, 127)
    return codes.to(torch.int8)


def decode_reference(weight: StoredWeight, dtype: torch.dtype, rotated: bool = False) -> torch.Tensor:
    """W (rows, columns) as `dtype`, computed in float32.

    Args:
        weight: the stored weight.
        dtype: dtype of the result.
        rotated: leave a rotated weight in the rotated basis (x must then be rotated too).
    """
    if weight.kind in (MXFP8, NVFP4):
        decoded = _times_blocks(_codes(weight), block_scales(weight), weight.group)
    elif weight.kind == INT4_CODEBOOK:
        decoded = decode_int8_reference(weight).float()
    else:
        decoded = _codes(weight)
    if weight.scale is not None:
        decoded = decoded * weight.scale.float().reshape(-1, 1)
    if weight.correction is not None:
        decoded = decoded + _repeat(weight.correction.float().t(), weight.group, weight.columns)
    if weight.rotation and not rotated:
        decoded = rotate_reference(decoded, weight.rotation)
    return decoded.to(dtype)


def is_integer_grid(weight: StoredWeight) -> bool:
    """Whether W is an int8 grid with one scale per row (or in all), which an INT8 product takes as it is."""
    return weight.kind in (INT8, INT4, INT4_CODEBOOK) and weight.correction is None
