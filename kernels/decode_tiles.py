"""Device functions that turn tiles of stored codes into numbers, shared by the matmul and the scratch decoder."""

from __future__ import annotations

from .runtime import constexpr, tl, triton

# e2m1 and e4m3 bits moved into bfloat16 or float32 keep their value up to this power of two.
E4M3_TO_FLOAT32 = constexpr(2.0**120)


@triton.jit
def e4m3_to_float32(byte):
    """e4m3 bits (uint8) to float32 on any GPU; S.1111.111 is NaN."""
    wide = byte.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * E4M3_TO_FLOAT32
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e2m1_to_float32(code):
    """e2m1 codes 0..15 (any integer type) to float32."""
    wide = code.to(tl.int32)
    bits = ((wide & 8) << 28) | ((wide & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def e8m0_to_float32(byte):
    """e8m0 bits (uint8) to float32: 0 stands for an all-zero block, as comfy-kitchen writes it, 255 is NaN."""
    wide = byte.to(tl.int32)
    value = (wide << 23).to(tl.float32, bitcast=True)
    return tl.where(wide == 255, float("nan"), value)


@triton.jit
def swizzled_offset(row, block, tiles_per_row):
    """Offset of (row, block) in cuBLAS's 128 x 4 tiled scale layout."""
    tile = (row // 128) * tiles_per_row + block // 4
    return tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + block % 4


@triton.jit
def code_to_float32(code, KIND: tl.constexpr, HARDWARE_E4M3: tl.constexpr):
    """Codes of an unpacked kind to float32, before scales; e5m2 comes as uint8, e4m3 where the GPU has no such type."""
    if (KIND == "e4m3" or KIND == "mxfp8") and not HARDWARE_E4M3:
        value = e4m3_to_float32(code)
    elif KIND == "e5m2":
        value = (code.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "int8":
        # 2^23 + 128 + the code, as the bits of a float32: converting takes the GPU several times as long.
        value = ((code.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    else:
        value = code.to(tl.float32)
    return value


# Four bytes of two e2m1 codes (even column high) to four + four bfloat16 (or float16) numbers: the three bits after the
# sign land on the lowest exponent bits and the highest mantissa bit, which scales them by 2^-126 (or 2^-14).
_E2M1_ASM = """
{{
.reg .b32 a, b, t;
prmt.b32 a, $4, 0, 0x1404;
prmt.b32 b, $4, 0, 0x3424;
shr.b32 t, a, {shift};
and.b32 t, t, {mask};
lop3.b32 $0, a, 0x80008000, t, 0xEA;
shr.b32 t, b, {shift};
and.b32 t, t, {mask};
lop3.b32 $1, b, 0x80008000, t, 0xEA;
shl.b32 a, a, 4;
shl.b32 b, b, 4;
shr.b32 t, a, {shift};
and.b32 t, t, {mask};
lop3.b32 $2, a, 0x80008000, t, 0xEA;
shr.b32 t, b, {shift};
and.b32 t, t, {mask};
lop3.b32 $3, b, 0x80008000, t, 0xEA;
}}
"""
E2M1_TO_BFLOAT16_ASM = constexpr(_E2M1_ASM.format(shift=6, mask="0x01c001c0"))
E2M1_TO_FLOAT16_ASM = constexpr(_E2M1_ASM.format(shift=3, mask="0x0e000e00"))


@triton.jit
def e2m1_pairs(packed, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """(even, odd) columns of packed e2m1 bytes as DTYPE numbers; with ASSEMBLY times 2^-126 (bfloat16) or 2^-14."""
    if ASSEMBLY and DTYPE == tl.bfloat16:  # noqa: SIM300
        even, odd = tl.inline_asm_elementwise(
            E2M1_TO_BFLOAT16_ASM,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif ASSEMBLY and DTYPE == tl.float16:  # noqa: SIM300
        even, odd = tl.inline_asm_elementwise(
            E2M1_TO_FLOAT16_ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        even = e2m1_to_float32(packed >> 4).to(DTYPE)
        odd = e2m1_to_float32(packed & 0xF).to(DTYPE)
    return even, odd


@triton.jit
def int4_pairs(packed, DTYPE: tl.constexpr):
    """(even, odd) columns of packed signed 4-bit codes as DTYPE numbers."""
    wide = packed.to(tl.int32)
    even = (wide << 28) >> 28
    odd = (wide << 24) >> 28
    return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def to_grid(value):
    """float32 to the nearest integers of the int8 grid, -127 to 127."""
    value = tl.minimum(tl.maximum(value, -127.0), 127.0)
    return (value + 12582912.0) - 12582912.0
