"""Decodes GGUF's block formats with torch, on any device: stored bytes in, float32 out.

Source: the block layouts of ggml (ggml-common.h) as the `gguf` package decodes them, whose own decoder does what is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from ..errors import CapabilityError

Blocks = torch.Tensor
"""(blocks, bytes of a block), uint8."""


def decode(raw: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers of a stored tensor.

    Args:
        raw: its bytes, uint8, on any device.
        name: ggml's name of the format (`Q4_K`).
        shape: of the result.

    Returns:
        float32 on `raw`'s device.

    Raises:
        CapabilityError: nothing here decodes the format.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    decode_blocks = DECODERS.get(name)
    if decode_blocks is None:
        try:
            numbers = gguf.dequantize(raw.cpu().numpy(), kind)
        except NotImplementedError:
            raise CapabilityError(
                f"A tensor of the file is stored as GGUF's {name}, which the package 'gguf' does not decode: "
                "update it, or use another file of the model."
            ) from None
        return torch.from_numpy(numbers).to(raw.device).view(shape)
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return decode_blocks(raw.reshape(-1, nbytes)).view(shape)


def _half(blocks: Blocks, start: int) -> torch.Tensor:
    """(blocks, 1) float32 of the float16 at byte `start`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(packed: Blocks, bits: int, run: int) -> torch.Tensor:
    """Bit fields of each run of `run` bytes, lowest bits of the whole run first: (blocks, fields) uint8."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8).view(1, 1, -1, 1)
    fields = packed.reshape(packed.shape[0], -1, 1, run) >> shifts
    return (fields & (2**bits - 1)).reshape(packed.shape[0], -1)


def _single_bits(blocks: Blocks, start: int) -> torch.Tensor:
    """(blocks, 32) uint8 of the 32 bits at byte `start`, lowest first."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    return ((blocks[:, start : start + 4, None] >> shifts) & 1).reshape(blocks.shape[0], 32)


def _scaled(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Runs of codes times the scale of each: (blocks, runs) and (blocks, runs * n)."""
    blocks, runs = scale.shape
    return (scale.unsqueeze(2) * codes.float().view(blocks, runs, -1)).view(blocks, -1)


def _plus(offset: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Runs of values plus the offset of each."""
    blocks, runs = offset.shape
    return (offset.unsqueeze(2) + values.view(blocks, runs, -1)).view(blocks, -1)


def _q4_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> torch.Tensor:
    codes = _fields(blocks[:, 6:], 4, 16) | (_single_bits(blocks, 2) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Blocks) -> torch.Tensor:
    codes = _fields(blocks[:, 8:], 4, 16) | (_single_bits(blocks, 4) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q2_k(blocks: Blocks) -> torch.Tensor:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    values = _scaled(_half(blocks, 80) * (scales & 15).float(), codes)
    return _plus(-_half(blocks, 82) * (scales >> 4).float(), values)


def _q3_k(blocks: Blocks) -> torch.Tensor:
    # The third bit is stored the other way round: where it is 0, 4 is taken off.
    codes = _fields(blocks[:, 32:96], 2, 32).to(torch.int8) - ((_fields(blocks[:, :32], 1, 32) ^ 1) << 2).to(torch.int8)
    scales = _fields(blocks[:, 96:104], 4, 8) | (_fields(blocks[:, 104:108], 2, 4) << 4)
    return _scaled(_half(blocks, 108) * (scales.float() - 32), codes)


def _scales_and_minima(packed: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K from their 12 bytes."""
    low, minimum, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), 1)
    minima = torch.cat((minimum & 63, (high >> 4) | ((minimum >> 2) & 48)), 1)
    return scales.float(), minima.float()


def _q4_k(blocks: Blocks) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _plus(-_half(blocks, 2) * minima, _scaled(_half(blocks, 0) * scales, _fields(blocks[:, 16:], 4, 32)))


def _q5_k(blocks: Blocks) -> torch.Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4)
    return _plus(-_half(blocks, 2) * minima, _scaled(_half(blocks, 0) * scales, codes))


def _q6_k(blocks: Blocks) -> torch.Tensor:
    codes = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(scales, codes.float() - 32)


_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of IQ4_NL and IQ4_XS."""


def _nonlinear(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_NONLINEAR, device=codes.device, dtype=torch.float32)[codes.int()]


def _iq4_nl(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _nonlinear(_fields(blocks[:, 2:], 4, 16))


def _iq4_xs(blocks: Blocks) -> torch.Tensor:
    low = _fields(blocks[:, 4:8], 4, 1)
    high = _fields(blocks[:, 2:4], 2, 1)
    scales = _half(blocks, 0) * ((low | (high << 4)).float() - 32)
    return _scaled(scales, _nonlinear(_fields(blocks[:, 8:], 4, 16)))


DECODERS: Mapping[str, Callable[[Blocks], torch.Tensor]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)
"""By ggml's name: blocks to (blocks, values) float32. The rarer IQ formats are decoded by the `gguf` package on the CPU."""
