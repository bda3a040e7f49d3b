"""The whole dispatch over the Triton kernels, in the interpreter (run by tests/kernels/test_in_interpreter.py)."""

from __future__ import annotations

import os

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.linear import quantized_linear
from lowbit.ops.linear_paths import LINEAR_PATHS, few_rows_linear, fp8_rows_linear
from lowbit.ops.linear_table import Gpu
from lowbit.ops.linear_weight import stored_weight

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the interpreter's process", allow_module_level=True)

from ..kernels import conftest as _mended_interpreter  # noqa: F401
from ..kernels.stored import MAKERS, ROTATED

HOPPER, AMPERE = Gpu((9, 0)), Gpu((8, 6))


def _weight(name: str, rows: int, columns: int) -> QuantizedTensor:
    layout, options = MAKERS[name]
    return QuantizedTensor.from_float(torch.randn(rows, columns) * 0.05, layout, **options)


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fast", [False, True])
def test_agrees_with_float64(name, fast):
    torch.manual_seed(0)
    n, k = (24, 256) if name in ROTATED else (33, 80)
    weight, bias = _weight(name, n, k), torch.randn(n)
    decoded = weight.dequantize().double()
    for rows in (0, 1, 3, 17, 20):
        x = torch.randn(rows, k)
        out = quantized_linear(x, weight, bias, fast=fast)
        reference = x.double() @ decoded.t() + bias.double()
        assert out.shape == (rows, n)
        assert rows == 0 or _error(out, reference) < (5e-2 if fast else 1e-5)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("int4_codebook", "int4_grid")])
@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
def test_few_rows_in_float16(name, gpu):
    """Every small-M method that a GPU of this capability takes, in float16 (the interpreter has no bfloat16 dots)."""
    torch.manual_seed(0)
    n, k = (24, 256) if name in ROTATED else (33, 96)
    weight = _weight(name, n, k)
    stored = stored_weight(weight)
    decoded = weight.dequantize().double()
    for rows in (1, 2, 5):
        x = torch.randn(rows, k).half()
        out = few_rows_linear(x, stored, None, None, gpu)
        assert _error(out, x.double() @ decoded.t()) < 8e-3


def test_long_inputs_go_in_pieces(monkeypatch):
    from lowbit.ops import linear_paths

    torch.manual_seed(0)
    weight = _weight("e4m3", 32, 64)
    x = torch.randn(300, 64)
    whole = fp8_rows_linear(x, stored_weight(weight), None, None, HOPPER)
    monkeypatch.setattr(linear_paths, "CHUNK_NBYTES", 130 * 64)
    assert len(linear_paths._row_chunks(300, 64)) == 3
    torch.testing.assert_close(fp8_rows_linear(x, stored_weight(weight), None, None, HOPPER), whole)


KIND_PATHS = [
    *((name, path) for name in ("e4m3", "nvfp4", "mxfp8") for path in ("scratch", "few_rows", "fp8_rows")),
    *((name, path) for name in ("int8_convrot", "int4") for path in ("scratch", "few_rows", "int8_rows")),
]


@pytest.mark.parametrize(("name", "path"), KIND_PATHS)
def test_weight_of_any_alignment_and_order(name, path):
    torch.manual_seed(0)
    weight = _weight(name, 32, 256)
    x = torch.randn(3, 256).half()
    expected = LINEAR_PATHS[path](x, stored_weight(weight), None, None, HOPPER)
    data = weight._qdata
    storage = torch.empty(data.numel() + 16, dtype=torch.uint8)
    moved = storage[3 : 3 + data.numel()].view(data.dtype).view(data.shape).copy_(data)
    for other in (moved, data.t().contiguous().t()):
        stored = stored_weight(QuantizedTensor(other, weight._layout_cls, weight._params))
        torch.testing.assert_close(LINEAR_PATHS[path](x, stored, None, None, HOPPER), expected, rtol=2e-2, atol=2e-2)
