"""Weight-only matmul for few rows of x and nvfp4 or int4_codebook weights, decoded in 64-bit words.

A word is 16 columns that share a scale. Tensor core operands hold pairs of neighbours
along K, so column j of two neighbouring words is decoded in one register and multiplied by the pair of their scales, and
every j has its own small dot. Words are loaded in a shape that gives each thread what the tensor cores want of it: no
number has to move to another thread after it is decoded. A program keeps its part of x, some steps of words, and goes over
some tiles of the weight's rows; the words of the next step arrive while it multiplies. A second kernel adds up the parts.
"""

from __future__ import annotations

import torch

from .decode_tiles import e2m1_to_float32, e4m3_to_float32, swizzled_offset, to_grid
from .launch import launch
from .matmul_decode import prefetch_lines, sum_splits
from .quantize_rows import _activate
from .runtime import SMALLEST_DOT, THREADS_FROM_FIRST, ceil_div, constexpr, power_of_two, tl, triton
from .stored_weight import INT4_CODEBOOK, StoredWeight


def _pair(byte: int) -> list[str]:
    """p = this byte of word a, twice, in the low lane and of word b, twice, in the high one."""
    index = byte % 4
    select = (4 + index) << 12 | (4 + index) << 8 | index << 4 | index
    half = byte // 4
    return [f"prmt.b32 p, a{half}, b{half}, {select:#06x};"]


def _assembly(body: list[str]) -> str:
    """Instructions for two words, $16 and $17, around what turns them and their two scales, $18, to 16 pairs."""
    head = ["{", ".reg .b32 a0, a1, b0, b1, p, t;", "mov.b64 {a0, a1}, $16;", "mov.b64 {b0, b1}, $17;"]
    return "\n".join([*head, *body, "}"])


def _nvfp4_assembly(kind: str, high: int, low: int, mask: str) -> str:
    """A nibble's sign goes to bit 15, its code to the lane's `mask`; the scale does the rest."""
    body = [".reg .b32 zero;", "mov.b32 zero, 0x80008000;"]
    for byte in range(8):
        body += _pair(byte)
        body += [
            f"shl.b32 t, p, {high};",
            f"and.b32 t, t, {mask};",
            "lop3.b32 t, p, 0x80008000, t, 0xEA;",
            f"fma.rn.{kind} ${2 * byte}, t, $18, zero;",
            f"shl.b32 t, p, {low};",
            f"and.b32 t, t, {mask};",
            "shl.b32 p, p, 4;",
            "lop3.b32 t, p, 0x80008000, t, 0xEA;",
            f"fma.rn.{kind} ${2 * byte + 1}, t, $18, zero;",
        ]
    return _assembly(body)


def _codebook_assembly() -> str:
    """A nibble picks the two bytes of a float16 level; times the scale it is rounded by what it is added to, 1,024.

    Its seven bits then make a bfloat16 number of 128 and more, and 128 less is the magnitude on the int8 grid.
    """
    body = [".reg .b32 s, u, v, w, low, high, l0, l1, l2, l3, h0, h1, h2, h3, one, less, least, most;"]
    planes = ("l0, l1", "l2, l3", "h0, h1", "h2, h3")
    body += [f"mov.b64 {{{plane}}}, ${19 + 2 * place};" for place, plane in enumerate(planes)]
    body += ["mov.b32 one, 0x3f803f80;", "mov.b32 less, 0xc300c300;"]
    body += ["mov.b32 least, 0x64006400;", "mov.b32 most, 0x647f647f;"]
    for byte in range(8):
        index, half = byte % 4, byte // 4
        body += [
            f"prmt.b32 s, a{half}, b{half}, {(4 + index) << 4 | index:#06x};",
            "shr.b32 u, s, 1;",
            "lop3.b32 u, u, 0x4444, 0x3210, 0xEA;",
            "and.b32 s, s, 0x7777;",
        ]
        for plane, name in (("l", "low"), ("h", "high")):
            body += [f"prmt.b32 v, {plane}0, {plane}1, s;", f"prmt.b32 w, {plane}2, {plane}3, s;"]
            body.append(f"prmt.b32 {name}, v, w, u;")
        for odd, select in enumerate(("0x6240", "0x7351")):
            body += [
                f"prmt.b32 p, low, high, {select};",
                "and.b32 t, p, 0x7fff7fff;",
                "fma.rn.f16x2 t, t, $18, least;",
                "min.f16x2 t, t, most;",
                "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xEA;",
                "fma.rn.bf16x2 t, t, one, less;",
                f"lop3.b32 ${2 * byte + odd}, p, 0x80008000, t, 0xEA;",
            ]
    return _assembly(body)


_NVFP4_BFLOAT16 = constexpr(_nvfp4_assembly("bf16x2", 2, 6, "0x01c001c0"))
_NVFP4_FLOAT16 = constexpr(_nvfp4_assembly("f16x2", 5, 9, "0x0e000e00"))
_NVFP4_CONSTRAINTS = constexpr(",".join(["=r"] * 16 + ["l", "l", "r"]))
_CODEBOOK_BFLOAT16 = constexpr(_codebook_assembly())
_CODEBOOK_CONSTRAINTS = constexpr(",".join(["=r"] * 16 + ["l", "l", "r"] + ["l"] * 8))
_THREADS_FROM_FIRST = constexpr(THREADS_FROM_FIRST)
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
def _column_of_words(
    words, scale, levels_ptr, j: tl.constexpr, CODEBOOK: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr
):
    """Column j of every word, decoded in plain operations."""
    if CODEBOOK:
        code = (words >> (4 * j)).to(tl.int32) & 0xF
        level = tl.load(levels_ptr + code) if LEVELS else code.to(tl.float32) - 8.0
        value = to_grid(level * scale)
    else:
        code = (words >> (8 * (j // 2) + 4 * (1 - j % 2))).to(tl.int32) & 0xF
        value = e2m1_to_float32(code) * scale.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def _level_planes(levels_ptr, LEVELS: tl.constexpr):
    """The 16 levels in float16, as bytes: the low ones of the first eight and of the others, then the high ones."""
    place = tl.arange(0, 16)
    level = tl.load(levels_ptr + place) if LEVELS else place.to(tl.float32) - 8.0
    bits = level.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int64)
    shift = place % 8 * 8
    low, high = (bits & 0xFF) << shift, (bits >> 8) << shift
    first = place < 8
    return (
        tl.sum(tl.where(first, low, 0), axis=0),
        tl.sum(tl.where(first, 0, low), axis=0),
        tl.sum(tl.where(first, high, 0), axis=0),
        tl.sum(tl.where(first, 0, high), axis=0),
    )


@triton.jit
def _scale_offset(row, word, pitch, CODEBOOK: tl.constexpr):
    """Where a word's scale lies: row by row, or in tiles of which `pitch` lie side by side."""
    return row.to(tl.int64) * pitch + word if CODEBOOK else swizzled_offset(row, word, pitch)


@triton.jit
def _columns(first, stride_column, column_left, MASKED: tl.constexpr, ACTIVATION: tl.constexpr):
    """The 16 columns of the words of x that start at `first` (words, m, 1, 1), each (words, m).

    column_left: of the same shape, columns from a word's start to the end of x; MASKED: some are fewer than 16.
    """
    column = tl.arange(0, 2)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    if MASKED:
        x = tl.load(first + column * stride_column, mask=column < column_left, other=0.0)
    else:
        x = tl.load(first + column * stride_column)
    if ACTIVATION is not None:
        x = _activate(x.to(tl.float32), ACTIVATION).to(x.dtype)
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
    planes,
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
    if ASSEMBLY:
        if CODEBOOK:
            pieces = tl.inline_asm_elementwise(
                _CODEBOOK_BFLOAT16,
                _CODEBOOK_CONSTRAINTS,
                [words, scale, planes[0], planes[1], planes[2], planes[3]],
                _BFLOAT16_16,
                is_pure=True,
                pack=2,
            )
        elif DTYPE == tl.bfloat16:  # noqa: SIM300
            pieces = tl.inline_asm_elementwise(
                _NVFP4_BFLOAT16, _NVFP4_CONSTRAINTS, [words, scale], _BFLOAT16_16, is_pure=True, pack=2
            )
        else:
            pieces = tl.inline_asm_elementwise(
                _NVFP4_FLOAT16, _NVFP4_CONSTRAINTS, [words, scale], _FLOAT16_16, is_pure=True, pack=2
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
    LACKS: tl.constexpr = 1.0 if CODEBOOK or not ASSEMBLY else (256.0 if DTYPE == tl.bfloat16 else 128.0)  # noqa: SIM300
    part = tl.program_id(1)
    half, two = tl.arange(0, ROWS // 2), tl.arange(0, 2)
    four, half, below, octet, pair = _across(tl.arange(0, 4), half, two, tl.arange(0, WORDS // 8), two)
    row = half // 8 * 16 + half % 8 + below * 8
    word = octet * 8 + four * 2 + pair
    word_left = TOTAL - part * PART - word
    w_offset = row.to(tl.int64) * stride_wn + word
    scale_offset = _scale_offset(row, word, scale_pitch, CODEBOOK)
    w_ptr += part * PART
    block_scale_ptr += part * PART * SCALE_STEP
    planes = _level_planes(levels_ptr, LEVELS) if CODEBOOK and ASSEMBLY else ()
    tile = tl.program_id(0) * TILES
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
    column = (part * PART + tl.arange(0, WORDS))[:, None, None, None] * 16
    first = x_ptr + tl.where(m < M, m, 0).to(tl.int64)[None, :, None, None] * stride_xm + column * stride_xk
    x = ()
    for step in tl.static_range(STEPS):
        skipped = step * 16 * WORDS
        x = x + (  # type: ignore[assignment]
            _columns(first + skipped * stride_xk, stride_xk, K - skipped - column, K % (16 * PART) != 0, ACTIVATION),
        )
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
                acc, words, stored, x[step], levels_ptr, planes, CODEBOOK, LEVELS, DTYPE, ASSEMBLY, ROWS, WORDS
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
        (ceil_div(weight.rows, ROWS_PER_TILE * tiles), block_splits(columns), ceil_div(rows, block_m)),
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
