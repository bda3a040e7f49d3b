"""base + x * factor, where the rows of a sample share the factor: modulation and gates of a diffusion model's blocks."""

from __future__ import annotations

import functools

import torch

from .launch import launch
from .repeated_launch import MOST_KINDS, RepeatedLaunch, Traits, traits_of
from .runtime import FLOATS, MOST_PROGRAMS, ceil_div, kernels_run_on, power_of_two, tl, triton

_COLUMNS, _ROWS = 1024, 4


@triton.jit
def _modulate_rows_kernel(
    base_ptr,
    x_ptr,
    factor_ptr,
    out_ptr,
    rows,
    base_stride,
    factor_stride,
    K: tl.constexpr,
    SHARED_BASE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program takes ROWS rows of one sample, BLOCK_K columns of each."""
    sample = tl.program_id(1).to(tl.int64)
    across: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    lane = (tl.program_id(0) % across) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = lane < K
    factor = tl.load(factor_ptr + sample * factor_stride + lane, mask=inside, other=0.0).to(tl.float32)
    if SHARED_BASE:
        base = tl.load(base_ptr + sample * base_stride + lane, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) // across * ROWS
    for step in tl.static_range(ROWS):
        row = first + step
        place = (sample * rows + row) * K + lane
        live = inside & (row < rows)
        x = tl.load(x_ptr + place, mask=live, other=0.0).to(tl.float32)
        if not SHARED_BASE:
            base = tl.load(base_ptr + place, mask=live, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, (base + x * factor).to(out_ptr.dtype.element_ty), mask=live)


def modulate_rows(base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """base + x * factor, in float32, rounded once: `torch.addcmul`, whose kernel reads a third as fast where it broadcasts.

    Args:
        base: (B, L, K) contiguous as x, or one row a sample, (B, 1, K).
        x: (B, L, K).
        factor: one row a sample, (B, 1, K); samples may lie apart.

    Returns:
        (B, L, K); by `torch.addcmul` itself for other shapes, dtypes, strides and devices.
    """
    repeated = modulation_launch(traits_of(base), traits_of(x), traits_of(factor)) if kernels_run_on(x) else None
    return torch.addcmul(base, x, factor) if repeated is None else repeated(base, x, factor)


@functools.lru_cache(maxsize=MOST_KINDS)
def modulation_launch(base: Traits, x: Traits, factor: Traits) -> RepeatedLaunch | None:
    """What `modulate_rows` launches for inputs of these traits; None: it is left to PyTorch."""
    whole = base.shape == x.shape and base.contiguous
    if not _fits(base, x, factor, whole):
        return None
    batch, rows, columns = x.shape
    block = min(_COLUMNS, power_of_two(columns))
    grid = (ceil_div(columns, block) * ceil_div(rows, _ROWS), batch, 1)
    numbers = rows, base.strides[0], factor.strides[0]
    constants = {"K": columns, "SHARED_BASE": not whole, "ROWS": _ROWS, "BLOCK_K": block}

    def launches(out: torch.Tensor, base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> None:
        launch(_modulate_rows_kernel, grid, (base, x, factor, out, *numbers), constants)

    return RepeatedLaunch(launches, x.shape, x.dtype, x.device)


def _fits(base: Traits, x: Traits, factor: Traits, whole: bool) -> bool:
    if len(x.shape) != 3 or not (x.contiguous and x.elements and x.dtype in FLOATS) or x.shape[0] > MOST_PROGRAMS:
        return False
    row = (x.shape[0], 1, x.shape[2])
    shared = all(part.shape == row and part.strides[2] == 1 for part in ([factor] if whole else [factor, base]))
    return shared and base.dtype == factor.dtype == x.dtype and base.device == factor.device == x.device
