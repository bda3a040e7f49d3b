"""`quantized_linear` in plain torch: semantics, any input that F.linear takes, the op under torch.compile."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import CheckpointError, FormatError
from lowbit.ops.linear import quantized_linear
from lowbit.ops.linear_weight import stored_weight
from lowbit.ops.scratch import release_scratch, scratch_nbytes
from testing.measure import relative_error

from .linear_weights import FORMATS, WEIGHTS, K, N, random_weight

torch.set_num_threads(1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
def test_is_the_product_with_the_decoded_weight(name, dtype, activation):
    weight = WEIGHTS[name]
    x, bias = torch.randn(5, K).to(dtype), torch.randn(N)
    wide = x.double()
    wide = {None: wide, "silu": F.silu(wide), "gelu_tanh": F.gelu(wide, approximate="tanh")}[activation]
    reference = wide @ weight.dequantize().double().t() + bias.double()
    exact = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    for fast in (False, True):
        out = quantized_linear(x, weight, bias, fast=fast, activation=activation)
        bar = max(exact, 1.5e-2) if fast and "int" in name else exact
        assert out.dtype == dtype
        assert relative_error(out, reference) < bar


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (17, 33), (40, 100)])
def test_odd_sizes(name, n, k):
    if name == "int8" or name == "fp8_e4m3fn" or k % 2 == 0:
        weight = random_weight(name, n, k)
        x = torch.randn(3, k)
        torch.testing.assert_close(quantized_linear(x, weight, fast=False), F.linear(x, weight.dequantize()))


def test_scales_of_every_shape():
    weight = WEIGHTS["int8"]
    x = torch.randn(2, K)
    expected = quantized_linear(x, weight, fast=False)
    for scale in (weight._params.scale.reshape(-1), weight._params.scale.reshape(-1, 1).double()):
        params = type(weight._params)(scale=scale, orig_dtype=torch.float32, orig_shape=(N, K))
        torch.testing.assert_close(
            quantized_linear(x, QuantizedTensor(weight._qdata, weight._layout_cls, params), fast=False), expected
        )
    data = weight._qdata.float().to(torch.float8_e4m3fn)
    params = type(WEIGHTS["fp8_plain"]._params)(
        scale=torch.rand(N, 1) + 0.5, orig_dtype=torch.float32, orig_shape=(N, K)
    )
    rows = QuantizedTensor(data, "TensorCoreFP8E4M3Layout", params)
    torch.testing.assert_close(quantized_linear(x, rows, fast=False), x @ (data.float() * params.scale).t())


@st.composite
def _inputs(draw):
    """A tensor (..., K) of random rank, zero sizes, strides and storage offset."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lead = draw(st.lists(st.integers(0, 3), max_size=4))
    shape = [*lead, K]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    how = draw(st.sampled_from(["plain", "permuted", "strided", "expanded", "flipped", "padded"]))
    offset = draw(st.integers(0, 7))
    if how == "permuted":
        order = draw(st.permutations(range(len(shape))))
        stored = [shape[axis] for axis in order]
        inverse = [order.index(axis) for axis in range(len(shape))]
    elif how == "strided":
        stored = [*lead, 2 * K]
    elif how == "padded":
        stored = [*lead, K + 3]
    elif how == "expanded":
        stored = [1] * len(lead) + [K]
    else:
        stored = shape
    size = 1
    for length in stored:
        size *= length
    storage = torch.randn(size + offset, generator=generator).to(dtype)
    x = storage[offset:].view(stored)
    if how == "permuted":
        x = x.permute(inverse)
    elif how == "strided":
        x = x[..., ::2]
    elif how == "padded":
        x = x[..., 1 : K + 1]
    elif how == "expanded":
        x = x.expand(shape)
    elif how == "flipped":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x
    return x


@settings(max_examples=150, deadline=None)
@given(x=_inputs(), name=st.sampled_from(sorted(FORMATS)), fast=st.booleans(), with_bias=st.booleans())
def test_any_input_of_linear(x, name, fast, with_bias):
    """Same result as on the contiguous copy, and the input is left as it was."""
    weight = WEIGHTS[name]
    bias = torch.linspace(-1, 1, N).to(x.dtype) if with_bias else None
    before = x.clone()
    out = quantized_linear(x, weight, bias, fast=fast)
    expected = quantized_linear(x.contiguous().clone(), weight, bias, fast=fast)
    assert out.shape == (*x.shape[:-1], N)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), offset=st.integers(0, 15), fast=st.booleans(), order=st.booleans())
def test_any_weight_address(name, offset, fast, order):
    """Codes at any byte address (mmap'ed files) and column by column give the same product."""
    weight = WEIGHTS[name]
    data = weight._qdata
    storage = torch.empty(data.numel() + 16, dtype=torch.uint8)
    moved = storage[offset : offset + data.numel()].view(data.dtype).view(data.shape).copy_(data)
    if order:
        moved = data.t().contiguous().t()
    x = torch.ones(2, K)
    other = QuantizedTensor(moved, weight._layout_cls, weight._params)
    torch.testing.assert_close(quantized_linear(x, other, fast=fast), quantized_linear(x, weight, fast=fast))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
def test_nan_and_inf_stay_in_their_rows(name, fast):
    x = torch.randn(4, K)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    out = quantized_linear(x, WEIGHTS[name], fast=fast)
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().any()
    assert out[[0, 3]].isfinite().all()


def test_plain_and_unknown_weights_go_to_torch():
    x, weight = torch.randn(3, K), torch.randn(N, K)
    torch.testing.assert_close(quantized_linear(x, weight, activation="silu"), F.linear(F.silu(x), weight))
    transposed = WEIGHTS["int8"].t()
    assert stored_weight(transposed) is None
    x = torch.randn(2, N)
    torch.testing.assert_close(
        quantized_linear(x, transposed), F.linear(x, transposed.dequantize()), rtol=1e-2, atol=1e-2
    )


def test_errors_say_what_is_wrong():
    with pytest.raises(FormatError, match="last dimension must be 256"):
        quantized_linear(torch.randn(2, K + 1), WEIGHTS["int8"])
    with pytest.raises(FormatError, match="activation"):
        quantized_linear(torch.randn(2, K), WEIGHTS["int8"], activation="relu")


def test_gradients_reach_the_input():
    for name in FORMATS:
        x = torch.randn(3, K, requires_grad=True)
        quantized_linear(x, WEIGHTS[name]).sum().backward()
        torch.testing.assert_close(x.grad, WEIGHTS[name].dequantize().sum(0).expand(3, K), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8_convrot", "mxfp8", "nvfp4", "int4_asym"])
def test_compiles_whole(name):
    """No graph break, and one graph for every M."""
    weight = WEIGHTS[name]

    def forward(x, weight, bias):
        return quantized_linear(x * 2, weight, bias) + 1

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x, bias = torch.randn(2, rows, K), torch.randn(N)
        torch.testing.assert_close(compiled(x, weight, bias), forward(x, weight, bias))


def test_op_passes_opcheck():
    from lowbit.ops.linear import _flatten

    for name in ("int8_convrot", "nvfp4"):  # opcheck itself cannot handle float8 tensors
        arguments = _flatten(torch.randn(3, K), stored_weight(WEIGHTS[name]), torch.randn(N), True, None)
        torch.library.opcheck(torch.ops.lowbit.linear.default, arguments)


def test_importing_twice_under_two_names():
    """ComfyUI imports the pack by path while `lowbit` is installed too."""
    root = Path(importlib.util.find_spec("lowbit").origin).resolve().parent
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("other_pack", {str(root / "__init__.py")!r},
    submodule_search_locations=[{str(root)!r}])
module = importlib.util.module_from_spec(spec); sys.modules["other_pack"] = module; spec.loader.exec_module(module)
import importlib, torch
first, second = importlib.import_module("lowbit.ops.linear"), importlib.import_module("other_pack.ops.linear")
assert first is not second
from comfy_kitchen.tensor import QuantizedTensor
weight = QuantizedTensor.from_float(torch.randn(8, 64), "TensorCoreNVFP4Layout")
x = torch.randn(3, 64)
assert torch.equal(first.quantized_linear(x, weight), second.quantized_linear(x, weight))
assert torch.equal(torch.compile(second.quantized_linear, backend="eager")(x, weight), first.quantized_linear(x, weight))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_scratch_on_a_cpu():
    quantized_linear(torch.randn(3, K), WEIGHTS["nvfp4"])
    assert scratch_nbytes() == 0
    assert release_scratch() == 0


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_block_formats_that_are_too_small_are_refused(name):
    """Kernels read codes and block scales without looking at their sizes."""
    weight = random_weight(name, 160, 96)
    field = "scale" if name == "mxfp8" else "block_scale"
    cut = dataclasses.replace(weight._params, **{field: getattr(weight._params, field).flatten()[:960]})
    with pytest.raises(CheckpointError, match="block scales"):
        stored_weight(QuantizedTensor(weight._qdata, weight._layout_cls, cut))
    larger = dataclasses.replace(weight._params, orig_shape=(256, 256))
    with pytest.raises(CheckpointError, match="256 x 256"):
        stored_weight(QuantizedTensor(weight._qdata, weight._layout_cls, larger))
