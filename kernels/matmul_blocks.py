"""Weight-only matmul for few rows of x and nvfp4 or int4_codebook weights, decoded in 64-bit words.

A word is 16 columns that share a scale. Tensor core operands hold pairs of neighbours along K, each in one register: of
nvfp4 column j of two neighbouring words, multiplied by the pair of their scales; of a codebook two neighbouring columns
of a word. Every pair has its own small dot. Words are loaded in a shape that gives each thread what the tensor cores want
of it: no number has to move to another thread after it is decoded. A program keeps its part of x, some steps of words,
and goes over some tiles of the weight's rows; the words of the next step arrive while it multiplies. A second kernel adds
up the parts.
"""

from __future__ import annotations

import torch

from .decode_tiles import e2m1_to_float32, e4m3_to_float32, swizzled_offset, to_grid
from .launch import launch
from .matmul_decode import prefetch_lines, sum_splits
from .quantize_rows import activate
from .runtime import SMALLEST_DOT, THREADS_FROM_FIRST, ceil_div, constexpr, power_of_two, tl, triton
from .stored_weight import INT4_CODEBOOK, StoredWeight
from .words_assembly import (
    CODEBOOK_CONSTRAINTS,
    CODEBOOK_FIRST,
    CODEBOOK_SECOND,
    NVFP4_BFLOAT16,
    NVFP4_CONSTRAINTS,
    NVFP4_FLOAT16,
)

_THREADS_FROM_FIRST = constexpr(THREADS_FROM_FIRST)
_BFLOAT16_8 = constexpr((tl.bfloat16,) * 8)
_BFLOAT16_16 = constexpr((tl.bfloat16,) * 16)
_FLOAT16_16 = constexpr((tl.float16,) * 16)


@triton.jit
def _word_scale(stored, CODEBOOK: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Scales of the words as the decoding takes them: nvfp4's assembly with most of what the shifted codes lack."""
    scale = e4m3_to_float32(stored) if stored.dtype == tl.uint8 else stored.to(tl.float32)
    if CODEBOOK:
        scale = scale.to(tl.float16) if ASSEMBLY else scale
    elif ASSEMBLY and DTYPE == tl.bfloat16:  # noqa: SIM300
        scale = (scale * 3.3230699894622897e35).to(DTYPE)  # 2 ** 118
    elif ASSEMBLY:
        scale = (scale * 128.0).to(DTYPE)
    else:
        scale = scale.to(DTYPE)
    return scale


@triton.jit
def _one_of_two(words, second: tl.constexpr):
    """(n, k) to the first or second ones of its neighbours: (n, k / 2, 1)."""
    pair = tl.split(tl.reshape(words, (words.shape[0], words.shape[1] // 2, 2)))
    return pair[second][:, :, None]


@triton.jit
def _column_of_words(
    words, scale, levels_ptr, j: tl.constexpr, CODEBOOK: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr
):
    """Column j of every word, decoded in plain operations."""
    if CODEBOOK:
        words, scale = _one_of_two(words, j // 8), _one_of_two(scale, j // 8)
        code = (words >> (8 * (j % 8) + 4 * tl.arange(0, 2)[None, None, :])).to(tl.int32) & 0xF
        level = tl.load(levels_ptr + code) if LEVELS else code.to(tl.float32) - 8.0
        value = tl.reshape(to_grid(level * scale), (words.shape[0], 2 * words.shape[1]))
    else:
        code = (words >> (8 * (j // 2) + 4 * (1 - j % 2))).to(tl.int32) & 0xF
        value = e2m1_to_float32(code) * scale.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def _level_pair(levels_ptr, place: tl.constexpr, LEVELS: tl.constexpr):
    """A level and the next but one in float16."""
    low = tl.load(levels_ptr + place) if LEVELS else tl.full((), place - 8.0, tl.float32)
    high = tl.load(levels_ptr + place + 2) if LEVELS else tl.full((), place - 6.0, tl.float32)
    low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def _level_pairs(levels_ptr, LEVELS: tl.constexpr):
    """The 16 levels as pairs: 0 and 2, 1 and 3, 4 and 6, ..."""
    pairs = ()
    for pair in tl.static_range(8):
        pairs = pairs + (_level_pair(levels_ptr, pair // 2 * 4 + pair % 2, LEVELS),)  # type: ignore[assignment]
    return pairs


@triton.jit
def _scale_offset(row, word, pitch, CODEBOOK: tl.constexpr):
    """Where a word's scale lies: row by row, or in tiles of which `pitch` lie side by side."""
    return row.to(tl.int64) * pitch + word if CODEBOOK else swizzled_offset(row, word, pitch)


@triton.jit
def _loaded(first, column, stride_column, column_left, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """x at `column` from `first`, after the activation; MASKED: 0 from `column_left` on, where x ends."""
    if MASKED:
        x = tl.load(first + column * stride_column, mask=column < column_left, other=0.0)
    else:
        x = tl.load(first + column * stride_column)
    if ACTIVATION is not None:
        x = activate(x.to(tl.float32), ACTIVATION).to(x.dtype)
    return x


@triton.jit
def _columns(first, stride_column, column_left, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """The 16 columns of the words of x that start at `first` (words, m, 1, 1), each (words, m).

    column_left: of the same shape, columns from a word's start to the end of x; MASKED: some are fewer than 16.
    """
    column = tl.arange(0, 2)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    x = _loaded(first, column, stride_column, column_left, MASKED, ACTIVATION)
    x = tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2, 2))
    even, odd = tl.split(x)
    even_0, even_2 = tl.split(even)
    odd_1, odd_3 = tl.split(odd)
    even_00, even_04 = tl.split(even_0)
    even_02, even_06 = tl.split(even_2)
    odd_01, odd_05 = tl.split(odd_1)
    odd_03, odd_07 = tl.split(odd_3)
    x0, x8 = tl.split(even_00)
    x1, x9 = tl.split(odd_01)
    x2, x10 = tl.split(even_02)
    x3, x11 = tl.split(odd_03)
    x4, x12 = tl.split(even_04)
    x5, x13 = tl.split(odd_05)
    x6, x14 = tl.split(even_06)
    x7, x15 = tl.split(odd_07)
    return (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)


@triton.jit
def _pairs_of_columns(first, stride_column, column_left, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """The 16 pairs of columns of the two words of x that start at `first` (words / 2, m, 1), each (words, m)."""
    pairs = ()
    for octet in tl.static_range(4):
        column = octet * 8 + tl.arange(0, 8)[None, None, :]
        x = _loaded(first, column, stride_column, column_left, MASKED, ACTIVATION)
        x = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2)), (0, 4, 1, 2, 3))
        even, odd = tl.split(tl.reshape(x, (x.shape[0] * 2, x.shape[2], 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        pairs = pairs + (x0, x1, x2, x3)  # type: ignore[assignment]
    return pairs


@triton.jit
def _part_of_x(
    row,
    word,
    stride_column,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    """x of WORDS words from `word` on in rows that start at `row` (m,): what 16 pieces meet, each (WORDS, m)."""
    if CODEBOOK:
        column = (word + 2 * tl.arange(0, WORDS // 2))[:, None, None] * 16
        first = row[None, :, None] + column * stride_column
        pieces = _pairs_of_columns(first, stride_column, K - column, MASKED, ACTIVATION)
    else:
        column = (word + tl.arange(0, WORDS))[:, None, None, None] * 16
        first = row[None, :, None, None] + column * stride_column
        pieces = _columns(first, stride_column, K - column, MASKED, ACTIVATION)
    return pieces


@triton.jit
def _load_words(
    w_ptr,
    block_scale_ptr,
    tile,
    row,
    word_left,
    w_offset,
    scale_offset,
    N,
    stride_wn,
    scale_pitch,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Words and scales of a tile of the weight's rows, as `_fragment` takes them."""
    first = tile * ROWS
    w_tile = w_ptr + first.to(tl.int64) * stride_wn + w_offset
    scale_tile = block_scale_ptr + _scale_offset(first, 0, scale_pitch, CODEBOOK) + scale_offset
    if MASKED:
        inside = (row < N - first) & (word_left > 0)
        return tl.load(w_tile, mask=inside, other=0), tl.load(scale_tile, mask=inside, other=0.0)
    return tl.load(w_tile), tl.load(scale_tile)


@triton.jit
def _across(four, rows, below, words, pair):
    """Five ranges along the dimensions of what is loaded, for broadcasting: see `_fragment`."""
    if _THREADS_FROM_FIRST:
        four, rows = four[:, None, None, None, None], rows[None, :, None, None, None]
        below, words = below[None, None, :, None, None], words[None, None, None, :, None]
    else:
        four, rows = four[None, None, None, :, None], rows[None, None, :, None, None]
        below, words = below[None, :, None, None, None], words[:, None, None, None, None]
    return four, rows, below, words, pair[None, None, None, None, :]


@triton.jit
def _fragment(loaded, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """What is loaded as (4, ROWS / 2, 2, WORDS / 8, 2), or with the first four turned round, to (ROWS, WORDS).

    Row 16a + 8b + c and word 8d + 2e + f lie at (e, 8a + c, b, d, f). The compiler hands dimensions out to threads and
    warps from the first one, or since Triton 3.7 from the last one but one, after the one whose elements are neighbours:
    thread 4c + e of warp a loads them, and has the same place in a 16 x 16 operand of the tensor cores.
    """
    if _THREADS_FROM_FIRST:
        loaded = tl.reshape(loaded, (4, ROWS // 16, 8, 2, WORDS // 8, 2))
        loaded = tl.permute(loaded, (1, 3, 2, 4, 0, 5))
    else:
        loaded = tl.reshape(loaded, (WORDS // 8, 2, ROWS // 16, 8, 4, 2))
        loaded = tl.permute(loaded, (2, 1, 3, 0, 4, 5))
    return tl.reshape(loaded, (ROWS, WORDS))


@triton.jit
def _add_product(
    acc,
    words,
    stored,
    x,
    levels_ptr,
    levels,
    CODEBOOK: tl.constexpr,
    LEVELS: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """acc (ROWS, m) plus the product of a tile's words and x, of nvfp4 short of a power of two in assembly."""
    words = _fragment(words, ROWS, WORDS)
    scale = _fragment(_word_scale(stored, CODEBOOK, DTYPE, ASSEMBLY), ROWS, WORDS)
    if ASSEMBLY and CODEBOOK:
        for second in tl.static_range(2):
            pieces = tl.inline_asm_elementwise(
                CODEBOOK_SECOND if second else CODEBOOK_FIRST,
                CODEBOOK_CONSTRAINTS,
                [words, scale, levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]],
                _BFLOAT16_8,
                is_pure=True,
                pack=2,
            )
            for j in tl.static_range(8):
                acc = tl.dot(pieces[j], x[8 * second + j], acc)
    else:
        if not ASSEMBLY:
            pieces = ()
        elif DTYPE == tl.bfloat16:  # noqa: SIM300
            pieces = tl.inline_asm_elementwise(
                NVFP4_BFLOAT16, NVFP4_CONSTRAINTS, [words, scale], _BFLOAT16_16, is_pure=True, pack=2
            )
        else:
            pieces = tl.inline_asm_elementwise(
                NVFP4_FLOAT16, NVFP4_CONSTRAINTS, [words, scale], _FLOAT16_16, is_pure=True, pack=2
            )
        for j in tl.static_range(16):
            w = pieces[j] if ASSEMBLY else _column_of_words(words, scale, levels_ptr, j, CODEBOOK, LEVELS, DTYPE)
            acc = tl.dot(w, x[j], acc)
    return acc


@triton.jit
def _store_partial(out_ptr, acc, tile, part, m, M, N, LACKS: tl.constexpr, ROWS: tl.constexpr):
    """acc (ROWS, m) times the power of two that it `LACKS` to its place in the (parts, M, N) partial products."""
    n = tile * ROWS + tl.arange(0, ROWS)
    acc = acc * LACKS
    target = out_ptr + (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(target, acc, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _matmul_blocks_kernel(
    x_ptr,
    w_ptr,
    block_scale_ptr,
    levels_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    scale_pitch,
    K: tl.constexpr,
    CODEBOOK: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Partial products (K / (16 x WORDS x STEPS), M, N) in float32, without scale and bias; stride_wn counts words.

    CODEBOOK: int4_codebook, else nvfp4; LEVELS: its levels are those of a codebook, else the codes less 8. A program holds its part of x and goes over TILES x ROWS rows of the weight. EVEN: no tile goes beyond N.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TOTAL: tl.constexpr = (K + 15) // 16
    PART: tl.constexpr = WORDS * STEPS
    MASKED: tl.constexpr = not EVEN or TOTAL % PART != 0
    SCALE_STEP: tl.constexpr = 1 if CODEBOOK else 128
    LACKS: tl.constexpr = 1.0 if not ASSEMBLY else (256.0 if DTYPE == tl.bfloat16 and not CODEBOOK else 128.0)  # noqa: SIM300
    part = tl.program_id(0)
    half, two = tl.arange(0, ROWS // 2), tl.arange(0, 2)
    four, half, below, octet, pair = _across(tl.arange(0, 4), half, two, tl.arange(0, WORDS // 8), two)
    row = half // 8 * 16 + half % 8 + below * 8
    word = octet * 8 + four * 2 + pair
    word_left = TOTAL - part * PART - word
    w_offset = row.to(tl.int64) * stride_wn + word
    scale_offset = _scale_offset(row, word, scale_pitch, CODEBOOK)
    w_ptr += part * PART
    block_scale_ptr += part * PART * SCALE_STEP
    levels = _level_pairs(levels_ptr, LEVELS) if CODEBOOK and ASSEMBLY else ()
    tile = tl.program_id(1) * TILES
    last = tl.minimum(tile + TILES, (N + ROWS - 1) // ROWS) - 1
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        line = tl.minimum(tile * ROWS + tl.arange(0, ROWS), N - 1).to(tl.int64)[:, None] * stride_wn
        prefetch_lines(w_ptr + line + tl.minimum(tl.arange(0, STEPS) * WORDS, TOTAL - 1 - part * PART)[None, :])
        tl.extra.cuda.gdc_wait()
    words, stored = _load_words(
        w_ptr, block_scale_ptr, tile, row, word_left, w_offset, scale_offset,
        N, stride_wn, scale_pitch, CODEBOOK, ROWS, MASKED,
    )  # fmt: skip
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + tl.where(m < M, m, 0).to(tl.int64) * stride_xm
    x = ()
    for step in tl.static_range(STEPS):
        first_word = part * PART + step * WORDS
        part_of_x = _part_of_x(x_row, first_word, stride_xk, K, WORDS, K % (16 * PART) != 0, ACTIVATION, CODEBOOK)
        x = x + (part_of_x,)  # type: ignore[assignment]
    for _ in range(TILES):
        # Beyond the last tile it is done once more, by words that the cache holds: less than a branch costs.
        following = tl.minimum(tile + 1, last)
        acc = tl.zeros([ROWS, BLOCK_M], dtype=tl.float32)
        for step in tl.static_range(STEPS):
            ahead = (step + 1) % STEPS
            next_words, next_stored = _load_words(
                w_ptr + ahead * WORDS,
                block_scale_ptr + ahead * WORDS * SCALE_STEP,
                tile if step + 1 < STEPS else following,
                row,
                word_left - ahead * WORDS,
                w_offset,
                scale_offset,
                N,
                stride_wn,
                scale_pitch,
                CODEBOOK,
                ROWS,
                MASKED,
            )
            acc = _add_product(
                acc, words, stored, x[step], levels_ptr, levels, CODEBOOK, LEVELS, DTYPE, ASSEMBLY, ROWS, WORDS
            )
            words, stored = next_words, next_stored
        _store_partial(out_ptr, acc, tile, part, m, M, N, LACKS, ROWS)
        tile = following


COLUMNS_PER_WORD = 16
WORDS_PER_STEP = 16
STEPS_PER_PART = 2
ROWS_PER_TILE = 64


def block_splits(columns: int) -> int:
    """Parts of K that are multiplied side by side."""
    return ceil_div(columns, COLUMNS_PER_WORD * WORDS_PER_STEP * STEPS_PER_PART)


def _block_scale(weight: StoredWeight, hardware_e4m3: bool) -> torch.Tensor:
    """The scales as a kernel takes them: e4m3 as such where the GPU converts it, else as bytes; wider ones as they are."""
    scale = weight.block_scale
    if scale.dtype.itemsize > 1:
        return scale
    return scale.view(torch.float8_e4m3fn if hardware_e4m3 else torch.uint8)


def matmul_blocks(
    x: torch.Tensor,
    weight: StoredWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor,
    *,
    assembly: bool,
    hardware_e4m3: bool,
    tiles: int = 1,
    activation: str | None = None,
    overlap: bool = False,
) -> None:
    """Weight-only product of x (M, K) and an nvfp4 or int4_codebook weight into `out` (M, N).

    Args:
        x: float16 or bfloat16, for a codebook only bfloat16, any strides; in the basis that the weight is in.
        weight: codes 8-byte aligned, row pitch a multiple of 8; of an int4_codebook one, 16 columns share a scale.
        bias: (N,) or None.
        out: (M, N), last stride 1, written.
        partial: (block_splits(K), M, N) float32 work space.
        assembly: compiled for a GPU (the interpreter has no inline assembly).
        hardware_e4m3: the GPU converts e4m3 (cc 8.9 and later).
        tiles: of 64 rows of the weight that a program goes over with its part of x.
        activation: applied to x first.
        overlap: start while the kernel before still runs, and let the sum start while the products do (cc 9.0).
    """
    rows, columns = x.shape
    # What a codebook's levels are given to is moved between threads before a dot of 8 columns, not before one of 16.
    smallest = 16 if weight.kind == INT4_CODEBOOK else SMALLEST_DOT
    block_m = min(max(smallest, power_of_two(rows)), 32)
    launch(
        _matmul_blocks_kernel,
        (block_splits(columns), ceil_div(weight.rows, ROWS_PER_TILE * tiles), ceil_div(rows, block_m)),
        (
            x,
            weight.data.view(torch.int64),
            _block_scale(weight, hardware_e4m3),
            weight.block_scale if weight.codebook is None else weight.codebook,
            partial,
            rows,
            weight.rows,
            x.stride(0),
            x.stride(1),
            weight.data.stride(0) // 8,
            columns // COLUMNS_PER_WORD if weight.kind == INT4_CODEBOOK else weight.scale_tiles_per_row,
        ),
        {
            "K": columns,
            "CODEBOOK": weight.kind == INT4_CODEBOOK,
            "LEVELS": weight.codebook is not None,
            "EVEN": weight.rows % ROWS_PER_TILE == 0,
            "ACTIVATION": activation,
            "ASSEMBLY": assembly,
            "BLOCK_M": block_m,
            "ROWS": ROWS_PER_TILE,
            "WORDS": WORDS_PER_STEP,
            "STEPS": STEPS_PER_PART,
            "TILES": tiles,
            "OVERLAP": overlap,
        },
        stages=1,
        overlap=overlap,
    )
    sum_splits(partial, weight, bias, out, overlap)
