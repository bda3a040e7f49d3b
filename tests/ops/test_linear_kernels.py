"""The whole dispatch over the Triton kernels, in the interpreter (run by tests/kernels/test_in_interpreter.py)."""

from __future__ import annotations

import dataclasses
import os
import weakref
from threading import Thread

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.kernels.hadamard import rotate_reference
from lowbit.ops import linear_8bit
from lowbit.ops.linear import quantized_linear
from lowbit.ops.linear_reference import linear_reference
from lowbit.ops.linear_table import Gpu
from lowbit.ops.linear_weight import stored_weight
from lowbit.ops.scratch import release_scratch, scratch_here
from lowbit.ops.shared_input import FIRST

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in the interpreter's process", allow_module_level=True)

from testing.measure import relative_error

from ..kernels import conftest as _mended_interpreter  # noqa: F401
from ..kernels.products import multiply
from ..kernels.stored import MAKERS, ROTATED

HOPPER, AMPERE = Gpu((9, 0)), Gpu((8, 6))


def _weight(name: str, rows: int, columns: int) -> QuantizedTensor:
    layout, options = MAKERS[name]
    return QuantizedTensor.from_float(torch.randn(rows, columns) * 0.05, layout, **options)


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
        assert rows == 0 or relative_error(out, reference) < (5e-2 if fast else 1e-5)


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
        out = multiply("few_rows", x, stored, None, None, gpu)
        assert relative_error(out, x.double() @ decoded.t()) < 8e-3


@pytest.mark.parametrize(("name", "group"), [("int4_codebook", 16), ("int4_grid", 16), ("int4_codebook", 64)])
@pytest.mark.parametrize("offset", [0, 3])
def test_few_rows_of_a_codebook(name, group, offset):
    """In float32, which stands for bfloat16; codes that no 64-bit word can be read from are copied first."""
    torch.manual_seed(0)
    layout, options = MAKERS[name]
    weight = QuantizedTensor.from_float(torch.randn(70, 768) * 0.05, layout, group_size=group, **options)
    decoded, stored = weight.dequantize().double(), stored_weight(weight)
    storage = torch.empty(70 * 384 + offset, dtype=torch.int8)[offset:].view(70, 384)
    stored = dataclasses.replace(stored, data=storage.copy_(stored.data))
    for rows in (1, 2, 19):
        x, bias = torch.randn(rows, 768), torch.randn(70)
        out = multiply("few_rows", x, stored, bias, None, HOPPER)
        assert relative_error(out, x.double() @ decoded.t() + bias.double()) < 1e-5


@pytest.mark.parametrize("name", ["int8_convrot", "int4"])
def test_a_rotated_float16_row_does_not_overflow(name):
    """A row along one Hadamard vector has all its energy in one rotated column, 16 times the largest of float16's x."""
    torch.manual_seed(0)
    weight = _weight(name, 32, 256)
    x = (5000 * rotate_reference(torch.eye(256), 256)[3].sign()).half().reshape(1, 256)
    out = multiply("few_rows", x, stored_weight(weight), None, None, HOPPER)
    assert relative_error(out, x.double() @ weight.dequantize().double().t()) < 1e-2


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8", "int4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
@pytest.mark.parametrize("bad", [0, 2])
def test_nan_stays_in_its_row_when_rows_are_few(name, gpu, bad):
    """Three rows of float16 make three terms in a tile of four: what fills it up must not carry row 0 into the others."""
    torch.manual_seed(0)
    stored = stored_weight(_weight(name, 24, 256))
    for value in (torch.nan, torch.inf):
        x = torch.randn(3, 256).half()
        x[bad, 7] = value
        finite = multiply("few_rows", x, stored, None, None, gpu).isfinite()
        assert not finite[bad].any()
        assert finite[[row for row in range(3) if row != bad]].all()


PATHS_OF = {
    "e4m3": ("few_rows", "fp8_rows", "scratch"),
    "int8_convrot": ("few_rows", "int8_rows", "scratch"),
    "nvfp4": ("few_rows", "fp8_rows", "scratch"),
    "int4": ("few_rows", "int8_rows"),
    "mxfp8": ("few_rows", "fp8_rows"),
}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(PATHS_OF)),
    path=st.integers(0, 2),
    rows=st.integers(1, 5),
    steps=st.tuples(st.sampled_from([0, 1, 3, 257, 300]), st.sampled_from([0, 1, 2, 5])),
    offset=st.integers(0, 7),
)
def test_any_strides(name, path, rows, steps, offset):
    """Every kernel gives on a view of any strides and offset what it gives on the contiguous copy."""
    torch.manual_seed(0)
    stored = stored_weight(_weight(name, 24, 256))
    storage = torch.randn(offset + rows * steps[0] + 256 * steps[1] + 1).half()
    x = storage.as_strided((rows, 256), steps, offset)
    taken = PATHS_OF[name][min(path, len(PATHS_OF[name]) - 1)]
    expected = multiply(taken, x.contiguous(), stored, None, None, HOPPER)
    torch.testing.assert_close(multiply(taken, x, stored, None, None, HOPPER), expected)


def test_rows_that_span_more_than_32_bits():
    """x of 2 GiB elements between its first and last column, of which only the touched pages exist."""
    torch.manual_seed(0)
    weight, stride = _weight("int8_convrot", 8, 256), 9_000_000
    assert stride * 256 >= 1 << 31
    values = torch.randn(1, 256).half()
    x = torch.empty(255 * stride + 1, dtype=torch.float16).as_strided((1, 256), (0, stride)).copy_(values)
    for fast in (False, True):
        assert torch.equal(quantized_linear(x, weight, fast=fast), quantized_linear(values, weight, fast=fast))


def test_tensors_on_several_devices_are_named():
    x, weight = torch.randn(20, 256), _weight("int8", 24, 256)
    with pytest.raises(FormatError, match="another device"):
        quantized_linear(x, weight, torch.empty(24, device="meta"))
    elsewhere = dataclasses.replace(weight._params, scale=torch.empty(24, 1, device="meta"))
    with pytest.raises(FormatError, match="another device"):
        quantized_linear(x, QuantizedTensor(weight._qdata, weight._layout_cls, elsewhere))


@pytest.mark.parametrize(("name", "path"), [("e4m3", "fp8_rows"), ("mxfp8", "fp8_rows"), ("int8", "int8_rows")])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_long_inputs_go_in_pieces(name, path, order, monkeypatch):
    """Also an input that no view shows as rows."""
    torch.manual_seed(0)
    weight, bias = stored_weight(_weight(name, 32, 64)), torch.randn(32)
    x = torch.randn(3, 100, 64).permute(order)
    whole = multiply(path, x, weight, bias, "silu", HOPPER)
    monkeypatch.setattr(linear_8bit, "CHUNK_NBYTES", 130 * 64)
    assert len(linear_8bit._row_chunks(300, 64)) == 3
    assert torch.equal(multiply(path, x, weight, bias, "silu", HOPPER), whole)


KIND_PATHS = [
    *((name, path) for name in ("e4m3", "nvfp4", "mxfp8") for path in ("scratch", "few_rows", "fp8_rows")),
    *((name, path) for name in ("int8_convrot", "int4") for path in ("scratch", "few_rows", "int8_rows")),
]


@pytest.mark.parametrize(("name", "path"), KIND_PATHS)
@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
def test_weight_that_is_a_part_of_wider_rows(name, path, gpu):
    torch.manual_seed(0)
    weight = _weight(name, 24, 256)
    x, data = torch.randn(5, 256).half(), weight._qdata
    expected = multiply(path, x, stored_weight(weight), None, None, gpu)
    wide = torch.randint(0, 100, (data.shape[0], 2 * data.shape[1]), dtype=torch.uint8).view(data.dtype)
    part = wide[:, : data.shape[1]].copy_(data)
    stored = stored_weight(QuantizedTensor(part, weight._layout_cls, weight._params))
    torch.testing.assert_close(multiply(path, x, stored, None, None, gpu), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_bias_and_scales_of_any_strides(name, fast, rows):
    """Kernels read them one after the other."""
    torch.manual_seed(0)
    weight = _weight(name, 24, 256)
    x, bias = torch.randn(rows, 256), torch.randn(24)
    expected = quantized_linear(x, weight, bias, fast=fast)
    apart = {
        field.name: torch.stack([value, torch.full_like(value, 3)], dim=-1)[..., 0]
        for field in dataclasses.fields(weight._params)
        if isinstance(value := getattr(weight._params, field.name), torch.Tensor) and value.dtype == torch.float32
    }
    block = next((name for name in ("block_scale", "scale") if name not in apart and hasattr(weight._params, name)), "")
    if block:
        scale = getattr(weight._params, block).view(torch.uint8)
        apart[block] = torch.stack([scale, scale + 1], dim=-1)[..., 0].view(getattr(weight._params, block).dtype)
    strided = QuantizedTensor(weight._qdata, weight._layout_cls, dataclasses.replace(weight._params, **apart))
    assert torch.equal(quantized_linear(x, strided, bias.repeat_interleave(2)[::2], fast=fast), expected)


@pytest.mark.parametrize(("name", "path"), KIND_PATHS)
def test_weight_of_any_alignment_and_order(name, path):
    torch.manual_seed(0)
    weight = _weight(name, 32, 256)
    x = torch.randn(3, 256).half()
    expected = multiply(path, x, stored_weight(weight), None, None, HOPPER)
    data = weight._qdata
    storage = torch.empty(data.numel() + 16, dtype=torch.uint8)
    moved = storage[3 : 3 + data.numel()].view(data.dtype).view(data.shape).copy_(data)
    for other in (moved, data.t().contiguous().t()):
        stored = stored_weight(QuantizedTensor(other, weight._layout_cls, weight._params))
        torch.testing.assert_close(multiply(path, x, stored, None, None, HOPPER), expected, rtol=2e-2, atol=2e-2)


@pytest.fixture
def quantizations(monkeypatch):
    """The inputs that were quantized, one entry a pass."""
    release_scratch()
    seen = []
    for name in ("quantize_rows", "rotate_rows"):
        plain = getattr(linear_8bit, name)
        monkeypatch.setattr(linear_8bit, name, lambda x, *rest, plain=plain: seen.append(x) or plain(x, *rest))
    return seen


SHARING = ("e4m3", "e4m3 rows", "int8", "int8_convrot", "nvfp4", "int4")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_linears_of_a_group_quantize_their_input_once_and_multiply_as_alone(name, inference, quantizations):
    with torch.inference_mode(inference):
        x = torch.randn(2, 10, 256)
        weights = [_weight(name.removesuffix(" rows"), 24, 256) for _ in range(3)]
        for weight in weights if name.endswith(" rows") else ():
            weight._params = dataclasses.replace(weight._params, scale=torch.rand(24, 1) + 0.5)
        alone = [quantized_linear(x, weight) for weight in weights]
        assert len(quantizations) == 3
        names = (f"{FIRST}q", "q", "q")
        together = [quantized_linear(x, weight, input_group=name) for weight, name in zip(weights, names, strict=True)]
    assert len(quantizations) == 4
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def _touch_in_place(x, weight):
    x.mul_(2)
    return x


def _take_it_anew(x, weight):
    return x.clone()


def _multiply_something_else(x, weight):
    quantized_linear(torch.randn(20, 256), weight)
    return x


def _let_another_group_read_it(x, weight):
    quantized_linear(x, weight, input_group="to_q")
    return x


def _release_scratch(x, weight):
    release_scratch()
    return x


def _fail_in_the_middle(x, weight):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_8bit, "matmul_rows", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized_linear(x * 3, weight, input_group="q")
    return x


def _in_another_shape(x, weight):
    return x.view(4, 5, 256)


@pytest.mark.parametrize(
    "between",
    [
        _touch_in_place,
        _take_it_anew,
        _multiply_something_else,
        _let_another_group_read_it,
        _release_scratch,
        _fail_in_the_middle,
        _in_another_shape,
    ],
)
def test_an_input_that_may_have_changed_is_quantized_anew(between, quantizations):
    x, weight = torch.randn(20, 256), _weight("e4m3", 24, 256)
    quantized_linear(x, weight, input_group="q")
    x = between(x, weight)
    quantizations.clear()
    out = quantized_linear(x, weight, input_group="q")
    assert len(quantizations) == 1
    assert torch.equal(out, quantized_linear(x.clone(), weight))


@pytest.mark.parametrize("between", ["nothing", "a plain product", "a product by the reference"])
def test_the_first_of_a_group_quantizes_anew_though_nothing_counts_changes(between, quantizations):
    """A tensor made in inference mode has no version: the next block's first linear may find it changed in place."""
    with torch.inference_mode():
        x, weight = torch.randn(20, 256), _weight("int8", 24, 256)
        for name in (f"{FIRST}q", "q"):
            quantized_linear(x, weight, input_group=name)
        assert len(quantizations) == 1
        if between == "a plain product":
            quantized_linear(x, torch.randn(24, 256))
        elif between == "a product by the reference":
            linear_reference(x, stored_weight(weight), None, fast=True, activation=None)
        x.mul_(3)
        out = [quantized_linear(x, weight, input_group=name) for name in (f"{FIRST}q", "q")]
        expected = quantized_linear(x.clone(), weight)
    assert all(torch.equal(one, expected) for one in out)
    assert len(quantizations) == 3


def test_another_activation_or_format_of_a_group_is_quantized_anew(quantizations):
    x, first, second = torch.randn(20, 256), _weight("int8", 24, 256), _weight("int8_convrot", 24, 256)
    expected = [quantized_linear(x, first), quantized_linear(x, second), quantized_linear(x, second, activation="silu")]
    out = [
        quantized_linear(x, first, input_group="q"),
        quantized_linear(x, second, input_group="q"),
        quantized_linear(x, second, activation="silu", input_group="q"),
    ]
    assert all(torch.equal(one, other) for one, other in zip(out, expected, strict=True))
    assert len(quantizations) == 6


def test_threads_share_nothing(quantizations):
    x, weight = torch.randn(20, 256), _weight("int8", 24, 256)
    expected = quantized_linear(x, weight)
    out = []
    for _ in range(2):
        thread = Thread(target=lambda: out.append(quantized_linear(x, weight, input_group="q")))
        thread.start()
        thread.join()
    out.append(quantized_linear(x, weight, input_group="q"))
    assert all(torch.equal(one, expected) for one in out)
    assert len(quantizations) == 4


def test_released_scratch_is_not_kept_for_the_next_of_a_group():
    x, weight = torch.randn(20, 256), _weight("int8", 24, 256)
    quantized_linear(x, weight, input_group="q")
    kept = [weakref.ref(tensor) for tensor in scratch_here(x.device).left[0].tensors if tensor is not None]
    release_scratch()
    assert kept
    assert all(tensor() is None for tensor in kept)


def test_a_group_keeps_no_input_alive():
    x, weight = torch.randn(20, 256), _weight("int8", 24, 256)
    quantized_linear(x, weight, input_group="q")
    gone = weakref.ref(x)
    del x
    assert gone() is None
