"""What inline assembly decodes, carried out instruction by instruction: the interpreter of the kernels has none."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lowbit.kernels import decode_tiles, matmul_split, quantize_rows, words_assembly

HALVES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def _pair(value: np.ndarray, kind: str) -> torch.Tensor:
    """The two halves of 32-bit registers as float64, (registers, 2)."""
    return torch.from_numpy(value.view(np.int16).copy()).view(HALVES[kind]).double().reshape(-1, 2)


def _register(halves: torch.Tensor, kind: str) -> np.ndarray:
    if kind == "f16x2":  # torch rounds float64 to float32 first
        with np.errstate(over="ignore"):
            return halves.numpy().astype(np.float16).reshape(-1).view(np.uint32)
    return halves.to(HALVES[kind]).reshape(-1).view(torch.int16).numpy().copy().view(np.uint32)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = np.stack([(word >> (8 * place)) & 0xFF for word in (a, b) for place in range(4)])
    chosen = np.zeros_like(a)
    for place in range(4):
        index = (selector >> (4 * place)) & 0xF
        byte = np.take_along_axis(source, (index & 7)[None].astype(np.int64), 0)[0]
        chosen |= np.where(index & 8, (byte >> 7) * 0xFF, byte) << (8 * place)
    return chosen


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def run(assembly: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """`outputs` registers (n,) of uint32 that PTX makes of `inputs` (n,), uint32 or uint64."""
    registers: dict[str, np.ndarray] = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    count = len(inputs[0])

    def read(name: str) -> np.ndarray:
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0) if name not in registers else 0
        return registers.get(name, np.full(count, number, dtype=np.uint32))

    for line in filter(None, map(str.strip, re.sub(r"^\{+|\}+$", "", assembly.strip()).split(";"))):
        operation, rest = line.split(maxsplit=1)
        if operation == ".reg":
            continue
        if operation == "mov.b64":
            low, high, source = re.fullmatch(r"\{(\w+), (\w+)\}, (\$\d+)", rest).groups()
            registers[low] = (registers[source] & 0xFFFFFFFF).astype(np.uint32)
            registers[high] = (registers[source] >> np.uint64(32)).astype(np.uint32)
            continue
        target, *names = rest.split(", ")
        kind = operation.rpartition(".")[2]
        match operation.split(".")[0], [read(name) for name in names]:
            case "mov", [a]:
                registers[target] = a
            case "shl", [a, b]:
                registers[target] = a << b
            case "shr", [a, b]:
                registers[target] = a >> b
            case "and", [a, b]:
                registers[target] = a & b
            case "prmt", [a, b, c]:
                registers[target] = _permuted(a, b, c)
            case "lop3", [a, b, c, table]:
                registers[target] = _logic(a, b, c, int(table[0]))
            case "max", [a, b]:
                registers[target] = _register(torch.fmax(_pair(a, kind), _pair(b, kind)), kind)
            case "mad", [a, b, c]:
                registers[target] = a * b + c
            case "fma", [a, b, c]:
                exact = _pair(a, kind) * _pair(b, kind) + _pair(c, kind)
                registers[target] = _register(exact.clamp(min=0) if ".relu." in operation else exact, kind)
            case "add", [a, b]:
                registers[target] = (a.view(np.float32) + b.view(np.float32)).view(np.uint32)
            case "ex2", [a]:
                registers[target] = np.exp2(a.view(np.float32)).view(np.uint32)
            case "rcp", [a]:
                registers[target] = (1 / a.view(np.float32)).view(np.uint32)
            case name, operands:
                raise NotImplementedError(f"{name} of {len(operands)} operands")
    return [registers[f"${place}"] for place in range(outputs)]


def _words(count: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 1 << 64, count, dtype=np.uint64)


def _nibbles(words: np.ndarray) -> torch.Tensor:
    """(words, 16), from the lowest."""
    return torch.tensor([[int(word) >> (4 * place) & 0xF for place in range(16)] for word in words])


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[codes & 7] * (1 - 2.0 * (codes >> 3))


@pytest.mark.parametrize(
    ("assembly", "kind", "shift"),
    [(words_assembly.NVFP4_BFLOAT16, "bf16x2", 8), (words_assembly.NVFP4_FLOAT16, "f16x2", 7)],
)
def test_nvfp4_words(assembly, kind, shift):
    """A pair is the same column of two words; what the product lacks is a power of two."""
    first, second = _words(50), _words(50)
    scale = torch.rand(50, 2).mul(400).to(torch.float8_e4m3fn).double()
    carried = scale * (2.0**118 if kind == "bf16x2" else 2.0**7)
    outputs = run(assembly.value, 16, [first, second, _register(carried, kind)])
    made = torch.stack([_pair(output, kind) for output in outputs], dim=1) * 2.0**shift
    swapped = torch.tensor([place ^ 1 for place in range(16)])
    codes = torch.stack([_nibbles(first), _nibbles(second)], dim=2)[:, swapped]
    assert torch.equal(made, _e2m1(codes) * scale[:, None, :])


@pytest.mark.parametrize("grid", [True, False])
def test_codebook_words(grid):
    """Every byte with every scale, to the int8 grid as comfy-kitchen rounds it, in 128th parts.

    Levels that float16 holds give its very numbers; some times a scale are halfway between two integers, some beyond
    what float16 holds. NaN becomes -127, as where the kernels decode in float32.
    """
    scale = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    scale = scale[:128].repeat_interleave(32)
    scale = torch.stack([scale, scale.roll(32 * int(torch.randint(1, 100, ())))], dim=1)
    every = np.arange(256, dtype=np.uint8)
    words = [np.tile(np.random.default_rng().permutation(every), len(scale) // 32).view(np.uint64) for _ in range(2)]
    levels = torch.arange(-8, 8) if grid else torch.cat([torch.zeros(1), torch.randn(13), torch.tensor([3e4, -200])])
    levels = levels.half() if grid else levels[torch.randperm(16)].half()
    paired = levels.reshape(4, 2, 2).transpose(1, 2).contiguous().view(torch.int16).numpy().view(np.uint32).reshape(8)
    inputs = [*words, _register(scale, "f16x2"), *(np.full(len(scale), pair) for pair in np.repeat(paired, 2))]
    for word, assembly in enumerate((words_assembly.CODEBOOK_FIRST, words_assembly.CODEBOOK_SECOND)):
        outputs = run(assembly.value, 8, inputs)
        made = torch.cat([_pair(output, "bf16x2") for output in outputs], dim=1) * 128
        expected = (levels.double()[_nibbles(words[word])] * scale[:, word, None]).round()
        expected = expected.fmax(torch.tensor(-127.0)).clamp(max=127)
        assert expected.abs().max() == 127
        assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("assembly", "kind", "shift"),
    [
        (decode_tiles.E2M1_TO_BFLOAT16_ASM, "bf16x2", 126),
        (decode_tiles.E2M1_TO_FLOAT16_ASM, "f16x2", 14),
    ],
)
def test_e2m1_bytes(assembly, kind, shift):
    """Four bytes to four numbers of the high nibbles and four of the low ones."""
    packed = np.random.default_rng().integers(0, 1 << 32, 50, dtype=np.uint32)
    outputs = run(assembly.value, 4, [packed])
    made = torch.cat([_pair(output, kind) for output in outputs], dim=1) * 2.0**shift
    codes = _nibbles(packed)[:, :8]
    assert torch.equal(made, _e2m1(torch.cat([codes[:, 1::2], codes[:, 0::2]], dim=1)))


def test_int4_bytes():
    """Sixteen times the signed codes: the low nibbles' four, then the high ones'."""
    packed = np.random.default_rng().integers(0, 1 << 32, 50, dtype=np.uint32)
    outputs = run(matmul_split._INT4_ASM.value, 2, [packed])
    made = torch.cat([torch.from_numpy(output.view(np.int8).copy()).reshape(-1, 4) for output in outputs], dim=1)
    codes = _nibbles(packed)[:, :8]
    signed = torch.where(codes > 7, codes - 16, codes) * 16
    assert torch.equal(made.long(), torch.cat([signed[:, 0::2], signed[:, 1::2]], dim=1))


def test_logistic():
    x = torch.cat([torch.randn(50) * 30, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    (output,) = run(quantize_rows._LOGISTIC_ASM.value, 1, [(-x).numpy().view(np.uint32)])
    made = torch.from_numpy(output.view(np.float32).copy())
    expected = torch.sigmoid(x.double() * 0.6931471805599453).float()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-37, equal_nan=True)
