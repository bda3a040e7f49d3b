"""Claims about quantized weights: their error, their bytes, and what bad weights do."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.float_utils import to_blocked
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import CheckpointError, FormatError
from lowbit.ops.formats import FORMATS, STORAGES, find_format, storage_for, stored_nbytes
from lowbit.ops.nvfp4 import tiled_scales
from lowbit.ops.quantize import assemble, quantize_to_tensor, quantize_weight
from testing.measure import relative_error

ERROR_LIMITS = {
    "fp8_e4m3fn_scaled": 2.7e-2,
    "fp8_e4m3fn_scaled_fast": 2.7e-2,
    "fp8_e5m2_scaled": 5.5e-2,
    "mxfp8": 2.7e-2,
    "mxfp8_fast": 2.7e-2,
    "int8": 1.3e-2,
    "int8_fast": 1.3e-2,
    "int8_convrot_fast": 1.3e-2,
    "fp4_scaled": 9.5e-2,
    "fp4_scaled_fast": 9.5e-2,
    "fp4": 9.5e-2,
    "int4_asym_fast": 8e-2,
    "int4_convrot_fast": 16e-2,
}
"""Relative Frobenius error on Gaussian weights; issue 2's limits where it names one, measured + 10% elsewhere."""


@pytest.mark.parametrize("name", ERROR_LIMITS)
def test_gaussian_weights_stay_within_the_formats_error(name):
    weight = torch.randn(1024, 1024) * 0.02
    error = relative_error(quantize_to_tensor(weight, FORMATS[name]).dequantize(), weight)
    assert error <= ERROR_LIMITS[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(256, 256), (300, 512), (1, 256), (129, 768), (37, 50), (16, 17)])
def test_every_format_takes_every_shape_and_tells_its_bytes(name, shape):
    weight_format = FORMATS[name]
    weight = torch.randn(shape) * 0.05
    storage_name = storage_for(weight_format, shape[1])
    parts = quantize_weight(weight, storage_name, unit_scale=weight_format.unit_scale, fast=weight_format.fast)
    restored = assemble(parts, storage_name, shape, torch.float32).dequantize()
    assert restored.shape == shape
    assert relative_error(restored, weight) < 0.2
    nbytes = sum(part.nbytes for suffix, part in parts.items() if suffix != "comfy_quant")
    assert nbytes <= stored_nbytes(STORAGES[storage_name], *shape) <= nbytes + 64


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_give_what_the_whole_would(name, monkeypatch):
    weight = torch.randn(600, 512) * 0.02
    monkeypatch.setattr("lowbit.ops.quantize._CPU_CHUNK", 1 << 30)
    whole = quantize_weight(weight, FORMATS[name].storage, unit_scale=FORMATS[name].unit_scale)
    monkeypatch.setattr("lowbit.ops.quantize._CPU_CHUNK", 200 * 512)
    chunked = quantize_weight(weight, FORMATS[name].storage, unit_scale=FORMATS[name].unit_scale)
    assert whole.keys() == chunked.keys()
    for suffix, part in whole.items():
        assert torch.equal(part.reshape(-1).view(torch.uint8), chunked[suffix].reshape(-1).view(torch.uint8)), suffix


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name(name, poison):
    weight = torch.randn(256, 256)
    weight[200, 3] = poison
    with pytest.raises(CheckpointError, match=r"blocks\.0\.q holds NaN or Inf"):
        quantize_weight(weight, FORMATS[name].storage, name="blocks.0.q")


@pytest.mark.parametrize("name", FORMATS)
def test_zero_weights_stay_zero(name):
    assert not quantize_to_tensor(torch.zeros(64, 256), FORMATS[name]).dequantize().any()


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "fp4"])
def test_a_plain_cast_takes_a_scale_where_the_weight_is_larger_than_the_format(name):
    weight = torch.randn(32, 256)
    assert quantize_to_tensor(weight, FORMATS[name])._params.scale == 1
    weight[3, 5] = 9e5
    for large in (weight, 1e6 * torch.randn(32, 256)):
        assert relative_error(quantize_to_tensor(large, FORMATS[name]).dequantize(), large) < 0.12


@settings(deadline=None, max_examples=25)
@given(
    scale=st.floats(1e-6, 1e4),
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_error_does_not_depend_on_magnitude(scale, rows, columns, dtype):
    weight = (torch.randn(rows, columns) * scale).to(dtype)
    for name in ("fp8_e4m3fn_scaled", "int8", "fp4_scaled"):
        restored = quantize_to_tensor(weight, FORMATS[name]).dequantize()
        assert torch.isfinite(restored).all()
        assert relative_error(restored, weight) < 0.16


def test_rotation_cuts_int8_error_with_activation_outliers_threefold():
    """Weights as int8_fast and int8_convrot_fast multiply them: activations quantized per row, a few columns 60 x."""
    from lowbit.ops.linear import quantized_linear

    x = torch.randn(128, 512)
    x[:, torch.randperm(512)[:6]] *= 60
    weight = torch.randn(256, 512) * 0.02
    expected = x.double() @ weight.double().T
    plain = relative_error(quantized_linear(x, quantize_to_tensor(weight, FORMATS["int8_fast"])), expected)
    rotated = relative_error(quantized_linear(x, quantize_to_tensor(weight, FORMATS["int8_convrot_fast"])), expected)
    assert plain >= 3 * rotated


def test_a_shape_that_a_storage_cannot_hold_is_said():
    with pytest.raises(FormatError, match="multiple of 256 columns"):
        quantize_weight(torch.randn(16, 100), "int8_convrot")
    with pytest.raises(FormatError, match="choose one of auto"):
        find_format("fp6")


def test_nvfp4_blocks_beat_the_usual_choice_of_scales():
    """Against comfy-kitchen's quantizer, which always puts a block's maximum on 6."""
    from comfy_kitchen.tensor import QuantizedTensor

    weight = torch.randn(512, 512) * 0.02
    usual = relative_error(QuantizedTensor.from_float(weight, "TensorCoreNVFP4Layout").dequantize(), weight)
    ours = relative_error(quantize_to_tensor(weight, FORMATS["fp4_scaled"]).dequantize(), weight)
    assert ours < 0.95 * usual


@given(rows=st.integers(1, 300), blocks=st.integers(1, 40))
def test_block_scales_are_tiled_as_comfy_kitchen_reads_them(rows, blocks):
    scales = torch.arange(rows * blocks, dtype=torch.int32).reshape(rows, blocks).remainder(127).to(torch.uint8)
    scales = scales.view(torch.float8_e4m3fn)
    tiled = tiled_scales(scales)
    expected = to_blocked(scales.view(torch.uint8), flatten=False)
    assert torch.equal(tiled.view(torch.uint8), expected)
    assert tiled.dtype == torch.float8_e4m3fn
