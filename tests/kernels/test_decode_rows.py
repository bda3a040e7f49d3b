"""Decoding into a buffer against the reference, and the reference against comfy-kitchen."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.kernels.decode import decode_int8_reference, decode_reference
from lowbit.kernels.decode_rows import decode_rows
from lowbit.ops.linear_weight import stored_weight
from testing.measure import relative_error

from .stored import MAKERS, ROTATED, make

SIZES = [(24, 256), (40, 96), (33, 80), (5, 48)]


def _sizes(name: str) -> list[tuple[int, int]]:
    return [(24, 256), (3, 512)] if name in ROTATED else SIZES


@pytest.mark.parametrize("name", MAKERS)
def test_reference_is_comfy_kitchens_dequantize(name):
    layout, options = MAKERS[name]
    for rows, columns in _sizes(name):
        weight = QuantizedTensor.from_float(torch.randn(rows, columns), layout, **options)
        stored = stored_weight(weight)
        torch.testing.assert_close(decode_reference(stored, torch.float32), weight.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "hardware"), [*((name, True) for name in MAKERS), ("e4m3", False), ("mxfp8", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(device, name, hardware, dtype):
    for rows, columns in _sizes(name):
        weight = make(name, rows, columns, device)
        out = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
        decode_rows(weight, out, hardware_e4m3=hardware)
        bar = 4e-3 if dtype == torch.bfloat16 else 1e-3 if weight.rotation and device.type == "cuda" else 1e-6
        assert relative_error(out, decode_reference(weight, torch.float64)) < bar


@pytest.mark.parametrize("name", ["int8", "int8_convrot", "int4", "int4_codebook", "int4_grid"])
def test_grid(device, name):
    for rows, columns in _sizes(name):
        weight = make(name, rows, columns, device)
        out = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        decode_rows(weight, out)
        assert torch.equal(out, decode_int8_reference(weight))


@pytest.mark.parametrize(("name", "bar"), [("mxfp8", 1e-5), ("nvfp4", 3e-2)])
def test_float8_with_a_scale_per_row(device, name, bar):
    """mxfp8 keeps its bits; nvfp4 is rounded from 6 bits to 4."""
    for rows, columns in SIZES:
        weight = make(name, rows, columns, device)
        out = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device=device)
        row_scale = torch.zeros(rows, device=device)
        decode_rows(weight, out, row_scale)
        assert (
            relative_error(out.double() * row_scale.double().unsqueeze(1), decode_reference(weight, torch.float64))
            < bar
        )
        assert out.float().isfinite().all()
