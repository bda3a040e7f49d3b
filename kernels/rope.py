"""Rotary position embedding of neighbouring pairs, for queries or keys by heads."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .launch import launch
from .repeated_launch import MOST_KINDS, RepeatedLaunch, Traits, traits_of
from .runtime import FLOATS, MOST_PROGRAMS, ceil_div, kernels_run_on, power_of_two, row_major_strides, tl, triton

_ROWS, _HEADS = 16, 12
"""Positions and heads of a program: heads share what is loaded for a position, up to four times as much as one of them has."""
_ENOUGH = 2048
"""Programs that keep any GPU busy: where there are as many, each takes all heads, or all samples too, which share what is loaded."""


@triton.jit
def _rope_kernel(
    x_ptr,
    freqs_ptr,
    out_ptr,
    length,
    heads,
    x_batch,
    x_head,
    x_row,
    out_batch,
    out_head,
    out_row,
    freqs_batch,
    freqs_row,
    samples,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Some positions and heads of `samples` samples a program."""
    first_sample = tl.program_id(2).to(tl.int64) * samples
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < length)[:, None]
    row = row.to(tl.int64)[:, None]
    four = tl.arange(0, 4 * PAIRS)[None, :]
    freqs = tl.load(
        freqs_ptr + first_sample * freqs_batch + row * freqs_row + four, mask=live & (four < 2 * K), other=0.0
    )
    first, second = tl.split(tl.reshape(freqs.to(tl.float32), [ROWS, PAIRS, 2, 2]))
    even_first, odd_first = tl.split(first)
    even_second, odd_second = tl.split(second)
    lane = tl.arange(0, 2 * PAIRS)[None, :]
    inside = live & (lane < K)
    for step in range(HEADS * samples):
        batch = first_sample + step // HEADS
        head = tl.program_id(1).to(tl.int64) * HEADS + step % HEADS
        here = inside & (head < heads)
        x = tl.load(x_ptr + batch * x_batch + head * x_head + row * x_row + lane, mask=here, other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [ROWS, PAIRS, 2]))
        turned = tl.join(even_first * even + even_second * odd, odd_first * even + odd_second * odd)
        out = tl.reshape(turned, [ROWS, 2 * PAIRS]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + batch * out_batch + head * out_head + row * out_row + lane, out, mask=here)


class _Layout(NamedTuple):
    """Dimensions of heads and of positions, in x and in the frequencies."""

    heads: int
    rows: int


def rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor | None:
    """Each pair of x's last dimension multiplied by a 2 x 2 matrix of its position, in float32, rounded once.

    Source: RoFormer (arXiv:2104.09864), in the form of Flux: `freqs[..., 0] * x[even] + freqs[..., 1] * x[odd]`.

    Args:
        x: (batch, heads, length, K) or (batch, length, heads, K), rows of K contiguous.
        freqs: (batch or 1, 1, length, K / 2, 2, 2), or (batch or 1, length, 1, K / 2, 2, 2), in 16 or 32 bits.

    Returns:
        x's shape and dtype, contiguous; None for anything else, which the caller leaves to ComfyUI.
    """
    repeated = rope_launch(traits_of(x), traits_of(freqs)) if kernels_run_on(x) else None
    return None if repeated is None else repeated(x, freqs)


@functools.lru_cache(maxsize=MOST_KINDS)
def rope_launch(x: Traits, freqs: Traits) -> RepeatedLaunch | None:
    """What `rope` launches for inputs of these traits; None: it is left to ComfyUI."""
    layout = _layout(x, freqs)
    if layout is None:
        return None
    batch, heads, length, columns = x.shape[0], x.shape[layout.heads], x.shape[layout.rows], x.shape[3]
    both = x.strides, row_major_strides(x.shape)
    strides = [of_one[place] for of_one in both for place in (0, layout.heads, layout.rows)]
    positions, shared = ceil_div(length, _ROWS), freqs.shape[0] == 1
    groups = 1 if positions * batch >= _ENOUGH else ceil_div(heads, _HEADS)
    samples = batch if shared and positions >= _ENOUGH else 1
    batch_stride = 0 if shared else freqs.strides[0]
    numbers = length, heads, *strides, batch_stride, freqs.strides[layout.rows], samples
    constants = {"K": columns, "ROWS": _ROWS, "HEADS": ceil_div(heads, groups), "PAIRS": power_of_two(columns // 2)}

    def launches(out: torch.Tensor, x: torch.Tensor, freqs: torch.Tensor) -> None:
        launch(_rope_kernel, (positions, groups, batch // samples), (x, freqs, out, *numbers), constants)

    return RepeatedLaunch(launches, x.shape, x.dtype, x.device)


def _layout(x: Traits, freqs: Traits) -> _Layout | None:
    if len(x.shape) != 4 or len(freqs.shape) != 6 or not x.elements or x.shape[0] > MOST_PROGRAMS:
        return None
    if x.dtype not in FLOATS or freqs.dtype not in FLOATS:
        return None
    pairs = x.shape[3] // 2
    together = x.strides[3] == 1 and freqs.strides[3:] == (4, 2, 1) and freqs.shape[3:] == (pairs, 2, 2)
    if not together or x.shape[3] != 2 * pairs or freqs.shape[0] not in (1, x.shape[0]) or freqs.device != x.device:
        return None
    layouts = (_Layout(heads=1, rows=2), _Layout(heads=2, rows=1))
    fits = [of for of in layouts if freqs.shape[of.heads] == 1 and freqs.shape[of.rows] == x.shape[of.rows]]
    return fits[0] if fits else None
