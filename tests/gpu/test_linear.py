"""The quantized linear on a real GPU: every kind, dtype and row count against float64, memory, graphs, streams."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.kernels.decode import decode_reference
from lowbit.ops.layouts import register_layouts
from lowbit.ops.linear import quantized_linear
from lowbit.ops.linear_weight import stored_weight
from lowbit.ops.scratch import release_scratch, scratch_nbytes
from lowbit.ops.shared_input import FIRST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="no GPU"),
]

register_layouts()
CONVROT = {"per_channel": True, "convrot": True}
# layout, quantize options, bar for weight-only and for fast (relative Frobenius against the decoded weight)
FORMATS = {
    "fp8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, 4e-3, 4e-2),
    "fp8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, 4e-3, 4e-2),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}, 4e-3, 2e-2),
    "int8_tensor": ("TensorWiseINT8Layout", {}, 4e-3, 2e-2),
    "int8_convrot": ("TensorWiseINT8Layout", CONVROT, 6e-3, 1.2e-2),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, 4e-3, 4e-2),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, 4e-3, 5e-2),
    "int4_convrot": ("TensorCoreConvRotW4A4Layout", {}, 6e-3, 1.2e-2),
    "int4_asym": ("AsymW4A8Int8Layout", {}, 6e-3, 1.2e-2),
}
ROWS = (0, 1, 2, 15, 17, 33, 65, 300)


def _weight(name: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    layout, options, *_ = FORMATS[name]
    # comfy-kitchen's CUDA quantizer writes past the end of nvfp4 codes of odd sizes (memcheck); its plain one does not.
    device = "cpu" if name == "nvfp4" else "cuda"
    values = torch.randn(n, k, device=device, dtype=dtype) * 0.05
    return QuantizedTensor.from_float(values, layout, **options).to("cuda")


def _error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(512, 768), (40, 80), (1000, 1288)])
def test_agrees_with_float64(name, dtype, n, k):
    if k % 256 and ("convrot" in name or "asym" in name):
        k = 256
    torch.manual_seed(zlib.crc32(f"{name} {n} {k}".encode()))
    # comfy-kitchen's CUDA kernels for block formats know no float32.
    weight = _weight(name, n, k, torch.bfloat16 if name in ("mxfp8", "nvfp4") else dtype)
    decoded = decode_reference(stored_weight(weight), torch.float64)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    bars = FORMATS[name][2:]
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        for activation in (None, "silu"):
            wide = x.double() if activation is None else torch.nn.functional.silu(x.double())
            reference = wide @ decoded.t() + bias.double()
            for fast in (False, True):
                out = quantized_linear(x, weight, bias, fast=fast, activation=activation)
                assert out.shape == (rows, n)
                assert out.dtype == dtype
                if rows:
                    assert _error(out, reference) < bars[fast], (rows, activation, fast)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_later_calls_multiply_their_own_tensors(name, group, rows):
    """The second call of a shape launches what the first did: with another input, weight, bias and output."""
    n, k = 512, 768
    for fast in (False, True):
        bar = FORMATS[name][2 + fast]
        calls = [(_weight(name, n, k), torch.randn(n, device="cuda", dtype=torch.bfloat16)) for _ in range(3)]
        outs = []
        for weight, bias in calls:
            x = torch.randn(1, rows, k, device="cuda", dtype=torch.bfloat16)
            reference = x.double() @ decode_reference(stored_weight(weight), torch.float64).t() + bias.double()
            for name_in_group in (f"{FIRST}q", "q") if group else ("",):
                outs.append((quantized_linear(x, weight, bias, fast=fast, input_group=name_in_group), reference))
        for out, reference in outs:
            assert _error(out, reference) < bar, fast


@pytest.mark.parametrize("name", FORMATS)
def test_strange_rows(name):
    """NaN and Inf stay in their rows, zeros give the bias, denormals and huge values do no harm."""
    n, k = 256, 512
    weight = _weight(name, n, k)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for rows in (5, 40):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        x[0] = 0
        x[1, 7] = float("nan")
        x[2, 9] = float("inf")
        x[3] = 1e-39
        x[4] *= 1e30
        for fast in (False, True):
            out = quantized_linear(x, weight, bias, fast=fast)
            torch.testing.assert_close(out[0], bias)
            torch.testing.assert_close(out[3], bias)
            assert not out[1].isfinite().any()
            assert not out[2].isfinite().any()
            assert out[5:].isfinite().all()
            assert out[4].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [3, 5, 40])
def test_nan_and_inf_stay_in_their_rows_in_float16(name, rows):
    """float16 is split into three 8-bit terms where bfloat16 takes two."""
    weight = _weight(name, 256, 512)
    for bad in (0, rows - 1):
        for value in (float("nan"), float("inf")):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.float16)
            x[bad, 9] = value
            for fast in (False, True):
                finite = quantized_linear(x, weight, fast=fast).isfinite()
                assert not finite[bad].any()
                assert finite[[row for row in range(rows) if row != bad]].all()


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8", "int8_convrot", "mxfp8", "int4_convrot"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_that_is_a_part_of_wider_rows(name, dtype):
    """N 250: an output row is no multiple of 16 bytes, so that the matmul goes through plain pointers."""
    weight = _weight(name, 250, 512)
    x, data = torch.randn(40, 512, device="cuda", dtype=dtype), weight._qdata
    wide = torch.randint(0, 100, (data.shape[0], 2 * data.shape[1]), device="cuda", dtype=torch.uint8)
    part = wide.view(data.dtype)[:, : data.shape[1]].copy_(data)
    other = QuantizedTensor(part, weight._layout_cls, weight._params)
    for fast in (False, True):
        expected = quantized_linear(x, weight, fast=fast)
        torch.testing.assert_close(quantized_linear(x, other, fast=fast), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_any_stride_and_alignment(name, rows):
    n, k = 256, 512
    weight = _weight(name, n, k)
    for fast in (False, True):
        base = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        expected = quantized_linear(base, weight, fast=fast).float()
        storage = torch.empty(2 * (rows + 2) * (k + 8), device="cuda", dtype=torch.bfloat16)
        for offset in (1, 3, 7):
            view = storage[offset : offset + rows * k].view(rows, k).copy_(base)
            torch.testing.assert_close(
                quantized_linear(view, weight, fast=fast).float(), expected, rtol=2e-2, atol=2e-2
            )
        view = storage[: rows * k].view(k, rows).t().copy_(base)
        torch.testing.assert_close(quantized_linear(view, weight, fast=fast).float(), expected, rtol=2e-2, atol=2e-2)
        view = storage[: 2 * rows * k].view(rows, 2 * k)[:, ::2].copy_(base)
        torch.testing.assert_close(quantized_linear(view, weight, fast=fast).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 40])
def test_misaligned_weight(name, rows):
    weight = _weight(name, 256, 512)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    data = weight._qdata
    storage = torch.empty(data.numel() + 16, device="cuda", dtype=torch.uint8)
    for fast in (False, True):
        expected = quantized_linear(x, weight, fast=fast)
        for offset in (1, 2, 6, 8):
            moved = storage[offset : offset + data.numel()].view(data.dtype).view(data.shape)
            moved.copy_(data)
            other = QuantizedTensor(moved, weight._layout_cls, weight._params)
            torch.testing.assert_close(quantized_linear(x, other, fast=fast), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 48, 500])
def test_allocates_nothing_but_its_output(name, fast, rows):
    """Once warm: one allocation a call, the output; and 1,000 calls leave memory where it was."""
    weight = _weight(name, 512, 1024)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        quantized_linear(x, weight, bias, fast=fast)
    torch.cuda.synchronize()
    key = "allocation.all.allocated"
    before, held, scratch = torch.cuda.memory_stats()[key], torch.cuda.memory_allocated(), scratch_nbytes()
    out = quantized_linear(x, weight, bias, fast=fast)
    assert torch.cuda.memory_stats()[key] - before == 1
    assert torch.cuda.memory_allocated() - held <= -(-out.numel() * 2 // 512) * 512
    del out
    for _ in range(1000 if rows == 16 else 50):
        quantized_linear(x, weight, bias, fast=fast)
    assert torch.cuda.memory_allocated() == held
    assert scratch_nbytes() == scratch


def test_scratch_is_shared_and_released():
    first, second = _weight("nvfp4", 1024, 1024), _weight("fp8_e4m3fn", 1024, 1024)
    x = torch.randn(200, 1024, device="cuda", dtype=torch.bfloat16)
    release_scratch()
    quantized_linear(x, first, fast=False)
    held = scratch_nbytes()
    assert 0 < held <= 4 << 20
    quantized_linear(x, second, fast=False)
    assert scratch_nbytes() == held
    assert release_scratch() == held
    assert scratch_nbytes() == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
def test_cuda_graph_replays(name, fast, rows):
    """A captured call gives the same result on new inputs, even after the shared scratch was released and reused."""
    weight = _weight(name, 512, 1024)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        quantized_linear(x, weight, fast=fast)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_linear(x, weight, fast=fast)
    release_scratch()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, quantized_linear(x, weight, fast=fast))


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8", "nvfp4", "int4_convrot"])
@pytest.mark.parametrize("rows", [1, 16])
def test_overlapping_launches_keep_their_order(name, rows):
    """Layers one after the other without a wait, each with its own x: no launch may run into the scratch of another."""
    weights = [_weight(name, 2048, 1024) for _ in range(3)]
    inputs = [torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    calls = [(x, weights[index % 3]) for index, x in enumerate(inputs)]
    expected = []
    for x, weight in calls:
        expected.append(quantized_linear(x, weight, fast=False))
        torch.cuda.synchronize()
    for _ in range(25):
        outs = [quantized_linear(x, weight, fast=False) for x, weight in calls]
        for out, reference in zip(outs, expected, strict=True):
            assert torch.equal(out, reference)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [quantized_linear(x, weight, fast=False) for x, weight in calls]
    for _ in range(25):
        graph.replay()
    for out, reference in zip(outs, expected, strict=True):
        assert torch.equal(out, reference)


def test_two_streams_do_not_share_scratch():
    weight = _weight("fp8_e4m3fn", 2048, 2048)
    inputs = [torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [quantized_linear(x, weight) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(quantized_linear(x, weight))
        torch.cuda.synchronize()
        for out, reference in zip(outs, expected, strict=True):
            assert torch.equal(out, reference)


@pytest.mark.parametrize("rows", [40, 2000])
def test_float32_and_wide_tiles(rows):
    """Every tiling that the chooser can pick fits the GPU, for each output dtype."""
    weight = _weight("int8", 1024, 2048)
    decoded = weight.dequantize().double()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(rows, 2048, device="cuda", dtype=dtype)
        assert _error(quantized_linear(x, weight), x.double() @ decoded.t()) < 2e-2


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8_convrot", "nvfp4"])
def test_compiles_without_graph_break(name):
    weight, x = _weight(name, 256, 512), torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)

    def forward(x, weight):
        return quantized_linear(x * 2, weight, fast=True) + 1

    compiled = torch.compile(forward, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), forward(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_compiles_into_cuda_graphs(name):
    """torch.compile checks that a warm-up leaves nothing in the graphs' memory but its outputs."""
    weight = _weight(name, 256, 512)
    release_scratch()

    def forward(x, fast):
        return quantized_linear(x * 2, weight, fast=fast) + 1

    for fast in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(forward, mode="reduce-overhead")
        for _ in range(4):
            x = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x, fast), forward(x, fast), rtol=2e-2, atol=2e-2)


def test_result_does_not_change_between_runs():
    for name in FORMATS:
        weight = _weight(name, 1024, 2048)
        for rows in (1, 7, 200):
            x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
            for fast in (False, True):
                first = quantized_linear(x, weight, fast=fast)
                assert all(torch.equal(first, quantized_linear(x, weight, fast=fast)) for _ in range(5)), (name, rows)
