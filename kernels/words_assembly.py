"""Inline assembly that decodes two 64-bit words of 16 nvfp4 or int4_codebook codes: see `matmul_blocks`.

NVFP4_*: both words to 16 pairs, column j of the one and of the other. CODEBOOK_*: the first or the second word to 8 pairs
of neighbours, in 128th parts, times its scale on the int8 grid as comfy-kitchen rounds it.
"""

from __future__ import annotations

from .runtime import constexpr


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


def _codebook_table(scales: int) -> list[str]:
    """t0 to t3 = 127 less what a word's 16 codes stand for: levels times its scale, on the int8 grid, a byte each.

    Added to 1,536 a float16 number is rounded as to an integer, half to even. The upper clamp is a sum that ends at zero;
    its unit is the smallest float16 number, so that its bits are the integer.
    """
    body = [f"prmt.b32 scale, $10, $10, {scales:#06x};"]
    for quarter in range(4):
        for place, name in enumerate(("even", "odd")):
            body += [
                f"fma.rn.f16x2 {name}, ${11 + 4 * quarter + 2 * place}, scale, middle;",
                f"max.f16x2 {name}, {name}, least;",
                f"fma.rn.relu.f16x2 {name}, {name}, unit, most;",
            ]
        body.append(f"mad.lo.u32 t{quarter}, odd, 256, even;")
    return body


def _codebook_lookup(half: int) -> list[str]:
    """Eight codes, w0 or w1, to pairs of neighbours in bfloat16, in 128th parts: a byte of the table stands there as
    the smallest numbers do, which times -2^126 and plus 127 such parts is what the code stands for."""
    body = [
        f"and.b32 low, w{half}, 0x77777777;",
        f"shr.b32 high, w{half}, 1;",
        "lop3.b32 high, high, 0x44444444, 0x32103210, 0xEA;",
    ]
    for quarter in range(2):
        if quarter:
            body += ["shr.b32 low, low, 16;", "shr.b32 high, high, 16;"]
        body += ["prmt.b32 p, t0, t1, low;", "prmt.b32 q, t2, t3, low;", "prmt.b32 p, p, q, high;"]
        for pair, select in enumerate((0x4140, 0x4342)):
            body += [
                f"prmt.b32 q, p, zero, {select:#06x};",
                f"fma.rn.bf16x2 ${4 * half + 2 * quarter + pair}, q, times, plus;",
            ]
    return body


def _codebook_assembly(word: int) -> str:
    """One of two words, $8 and $9, with the scales $10 and the levels $11, $13, ... $25, to 8 pairs of neighbours.

    What the 16 codes stand for with the word's scale is a table of bytes, in which four codes are looked up at a time.
    """
    constants = {
        "middle": 0x66006600,  # 1,536
        "least": 0x65816581,  # 1,536 - 127
        "unit": 0x80018001,  # -2^-24
        "most": 0x067F067F,  # (1,536 + 127) x 2^-24
        "times": 0xFE80FE80,  # -2^126
        "plus": 0x3F7E3F7E,  # 127 / 128
        "zero": 0,
    }
    body = ["{", f".reg .b32 w0, w1, scale, even, odd, t0, t1, t2, t3, low, high, p, q, {', '.join(constants)};"]
    body += [f"mov.b32 {name}, {value:#010x};" for name, value in constants.items()]
    body += [f"mov.b64 {{w0, w1}}, ${8 + word};", *_codebook_table((0x1010, 0x3232)[word])]
    return "\n".join([*body, *_codebook_lookup(0), *_codebook_lookup(1), "}"])


NVFP4_BFLOAT16 = constexpr(_nvfp4_assembly("bf16x2", 2, 6, "0x01c001c0"))
NVFP4_FLOAT16 = constexpr(_nvfp4_assembly("f16x2", 5, 9, "0x0e000e00"))
NVFP4_CONSTRAINTS = constexpr(",".join(["=r"] * 16 + ["l", "l", "r"]))
CODEBOOK_FIRST = constexpr(_codebook_assembly(0))
CODEBOOK_SECOND = constexpr(_codebook_assembly(1))
CODEBOOK_CONSTRAINTS = constexpr(",".join(["=r"] * 8 + ["l", "l", "r"] + ["r"] * 16))
