"""`quantized_linear` in plain torch: semantics, any input that F.linear takes, the op under torch.compile, the table."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import comfy_kitchen as ck
import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import CheckpointError, FormatError
from lowbit.kernels.decode import decode_reference
from lowbit.kernels.stored_weight import MXFP8, NVFP4, StoredWeight
from lowbit.ops import linear_paths
from lowbit.ops import linear_reference as linear_reference_module
from lowbit.ops.layouts import register_layouts
from lowbit.ops.linear import describe_linear, quantized_linear, release_scratch, scratch_nbytes
from lowbit.ops.linear_kitchen import kitchen_linear
from lowbit.ops.linear_table import PATHS, RULES, Gpu, choose_path
from lowbit.ops.linear_weight import LAYOUT_READERS, stored_weight
from lowbit.ops.scratch import Scratch

register_layouts()
torch.set_num_threads(1)

FORMATS = {
    "fp8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "fp8_plain": ("TensorCoreFP8Layout", {}),
    "fp8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_tensor": ("TensorWiseINT8Layout", {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "int4_convrot": ("TensorCoreConvRotW4A4Layout", {}),
    "int4_asym": ("AsymW4A8Int8Layout", {}),
    "int4_corrected": ("AsymW4A8Int8Layout", {"symmetric": False}),
}
N, K = 24, 256


def _weight(name: str, n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    layout, options = FORMATS[name]
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    return QuantizedTensor.from_float(values, layout, **options)


WEIGHTS = {name: _weight(name) for name in FORMATS}


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
        assert ((out.double() - reference).norm() / reference.norm()).item() < bar


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (17, 33), (40, 100)])
def test_odd_sizes(name, n, k):
    if name == "int8" or name == "fp8_e4m3fn" or k % 2 == 0:
        weight = _weight(name, n, k)
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


KINDS = sorted({kind for rule in RULES for kind in rule.kinds})
CAPABILITIES = [(0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    fast=st.booleans(),
    rows=st.integers(1, 100_000),
    n=st.integers(1, 20_000),
    k=st.integers(1, 20_000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    cc=st.sampled_from(CAPABILITIES),
    triton=st.booleans(),
    kitchen=st.booleans(),
    corrected=st.booleans(),
)
def test_every_call_has_a_path(kind, fast, rows, n, k, dtype, cc, triton, kitchen, corrected):
    path = choose_path(kind, fast, rows, n, k, dtype, Gpu(cc, triton, kitchen), corrected)
    assert path in PATHS
    if cc < (8, 9):
        assert path != "fp8_rows"
    if not fast:
        assert path not in ("fp8_rows", "int8_rows", "kitchen")


@pytest.mark.parametrize(
    ("layout", "fast", "cc", "support"),
    [
        ("TensorCoreFP8E4M3Layout", True, (9, 0), "native"),
        ("TensorCoreFP8E4M3Layout", True, (8, 6), "emulated"),
        ("TensorCoreFP8E4M3Layout", False, (8, 6), "native"),
        ("TensorWiseINT8Layout", True, (8, 6), "native"),
        ("TensorCoreNVFP4Layout", True, (12, 0), "native"),
        ("TensorCoreNVFP4Layout", True, (9, 0), "fallback"),
        ("TensorCoreNVFP4Layout", True, (8, 6), "emulated"),
        ("TensorCoreMXFP8Layout", True, (8, 9), "fallback"),
        ("AsymW4A8Int8Layout", True, None, "emulated"),
        # comfy-kitchen's W4A8 kernels, CUDA's and Triton's, begin at compute capability 8.0.
        ("AsymW4A8Int8Layout", True, (7, 5), "emulated"),
        ("TensorCoreConvRotW4A4Layout", True, (7, 5), "native"),
    ],
)
def test_description(layout, fast, cc, support):
    description = describe_linear(layout, fast=fast, cc=cc, triton=True)
    assert description.support == support
    assert description.path in PATHS
    assert str(description).startswith(support)


def test_every_layout_is_described():
    for layout in LAYOUT_READERS:
        for cc in CAPABILITIES[1:]:
            for fast in (False, True):
                assert describe_linear(layout, fast=fast, cc=cc, triton=False).sentence


def test_a_path_can_be_forced():
    script = """
import torch
from lowbit.ops.linear_table import Gpu, choose_path
gpu = Gpu((9, 0), True, False)
assert choose_path("fp8", True, 4096, 512, 512, torch.bfloat16, gpu) == "scratch"
assert choose_path("int4_codebook", True, 1, 512, 512, torch.bfloat16, gpu, True) == "reference"
"""
    environment = {"LOWBIT_LINEAR_PATH": "scratch", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_block_formats_that_are_too_small_are_refused(name):
    """Kernels read codes and block scales without looking at their sizes."""
    weight = _weight(name, 160, 96)
    field = "scale" if name == "mxfp8" else "block_scale"
    cut = dataclasses.replace(weight._params, **{field: getattr(weight._params, field).flatten()[:960]})
    with pytest.raises(CheckpointError, match="block scales"):
        stored_weight(QuantizedTensor(weight._qdata, weight._layout_cls, cut))
    larger = dataclasses.replace(weight._params, orig_shape=(256, 256))
    with pytest.raises(CheckpointError, match="256 x 256"):
        stored_weight(QuantizedTensor(weight._qdata, weight._layout_cls, larger))


def _decoding_product(
    q, data, *, tensor_scale_a=None, tensor_scale_b=None, block_scale_a, block_scale_b, bias, out_dtype
):
    """Stands in for comfy-kitchen's block-scaled products, which need a Blackwell GPU: decodes both sides."""
    sides = []
    for codes, scale, block in ((q, tensor_scale_a, block_scale_a), (data, tensor_scale_b, block_scale_b)):
        kind, columns = (MXFP8, codes.shape[1]) if scale is None else (NVFP4, codes.shape[1] * 2)
        group = 32 if kind == MXFP8 else 16
        whole = None if scale is None else scale.reshape(1)
        stored = StoredWeight(kind, codes, whole, codes.shape[0], columns, block.view(torch.uint8), group=group)
        sides.append(decode_reference(stored, torch.float32))
    return (sides[0] @ sides[1].t()).to(out_dtype)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8", "int8_convrot"])
@pytest.mark.parametrize("rows", [1, 33, 130, 300])
def test_kitchen_rows_do_not_poison_each_other(name, rows, monkeypatch):
    """By comfy-kitchen's plain backend: a NaN or Inf row stays alone, and x may lie anywhere."""
    monkeypatch.setattr(ck, "scaled_mm_nvfp4", _decoding_product)
    monkeypatch.setattr(ck, "scaled_mm_mxfp8", _decoding_product)
    weight = stored_weight(_weight(name, 64, 256, torch.bfloat16))
    storage = torch.randn(3 * 256 + rows * 256 + 1).bfloat16()
    x = storage[1 : 1 + rows * 256].view(rows, 256)
    if rows > 1:
        x[1, 5], x[rows - 1, 7] = float("nan"), float("inf")
    out = kitchen_linear(x, weight, None, None)
    reference = x.double() @ decode_reference(weight, torch.float64).t()
    fine = [row for row in range(rows) if rows == 1 or row not in (1, rows - 1)]
    assert ((out[fine].double() - reference[fine]).norm() / reference[fine].norm()).item() < 0.15
    assert out.is_contiguous()
    if rows > 1:
        assert not out[1].isfinite().any()
        assert not out[rows - 1].isfinite().any()


@pytest.mark.parametrize("linear_dtype", ["int4", "int8"])
def test_kitchen_quantizes_activations_to_what_the_file_says(linear_dtype, monkeypatch):
    """int4_convrot files may ask for 8-bit activations, which err much less (comfy-kitchen's plain backend has none)."""
    from comfy_kitchen.tensor import convrot_w4a4

    seen, multiply = [], convrot_w4a4.convrot_w4a4_linear

    def records(*args, **kwargs):
        seen.append(kwargs.get("linear_dtype", "int4"))
        return multiply(*args, **kwargs)

    monkeypatch.setattr(convrot_w4a4, "convrot_w4a4_linear", records)
    weight = QuantizedTensor.from_float(torch.randn(32, 256), "TensorCoreConvRotW4A4Layout", linear_dtype=linear_dtype)
    x = torch.randn(40, 256)
    assert torch.equal(kitchen_linear(x, stored_weight(weight), None, None), F.linear(x, weight))
    assert seen == [linear_dtype] * 2


def test_out_of_memory_is_not_taken_for_a_refusal(monkeypatch):
    """cuBLAS stays in use after an out-of-memory error, which reaches the caller."""

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    out, codes = torch.empty(16, 16, dtype=torch.bfloat16).as_subclass(OnGpu), torch.empty(16, 16)
    with pytest.raises(torch.OutOfMemoryError):
        linear_paths._fp8_matmul(codes, codes, torch.ones(16, 1), None, None, out, Gpu((9, 0)))
    assert not linear_paths._scaled_mm_refused


class _Refusing:
    """Stands in for torch._scaled_mm: as CUTLASS below cc 9.0, it takes no e5m2 weight."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, codes, row_scale, columns, *, out, bias, **options):
        self.calls += 1
        if codes.dtype == torch.float8_e5m2:
            raise RuntimeError("b.dtype() == at::kFloat8_e4m3fn INTERNAL ASSERT FAILED")
        out.copy_((q.float() @ codes.float()) * row_scale * columns + (0 if bias is None else bias))


@pytest.fixture
def refusing(monkeypatch):
    """torch._scaled_mm refuses e5m2, tensors pass for CUDA's, scratch is plain memory, nothing is refused yet."""
    stand_in = _Refusing()
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    monkeypatch.setattr(linear_paths, "_scaled_mm_refused", set())
    monkeypatch.setattr(linear_paths, "_takes_scaled_mm", lambda out, n, k: True)
    return stand_in


def test_a_dtype_that_scaled_mm_refuses_does_not_stop_the_others(refusing, monkeypatch):
    multiplied = []
    monkeypatch.setattr(linear_paths, "matmul_rows", lambda *args, **options: multiplied.append(args[1].dtype))
    q, out = torch.zeros(16, 32).to(torch.float8_e4m3fn), torch.zeros(16, 16, dtype=torch.bfloat16)
    for dtype in (torch.float8_e5m2, torch.float8_e5m2, torch.float8_e4m3fn):
        codes = torch.zeros(16, 32).to(dtype)
        linear_paths._fp8_matmul(q, codes, torch.ones(16, 1), None, None, out, Gpu((8, 9)))
    assert multiplied == [torch.float8_e5m2] * 2
    assert refusing.calls == 2


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
def test_without_triton_a_refused_fp8_product_is_16_bit(name, refusing):
    """Windows without Triton: the prompt goes on."""
    weight, x, bias = _weight(name, 32, 64), torch.randn(20, 64).bfloat16(), torch.randn(32)
    for _ in range(2):
        out = linear_paths.fp8_rows_linear(x, stored_weight(weight), bias, "silu", Gpu((8, 9), triton=False))
        reference = F.silu(x.double()) @ weight.dequantize().double().t() + bias.double()
        assert ((out.double() - reference).norm() / reference.norm()).item() < 5e-2
    assert refusing.calls == (1 if name == "fp8_e5m2" else 2)


def test_what_linears_keep_is_made_on_a_thread_of_its_own(monkeypatch):
    """Warming up CUDA graphs, torch.compile sends this thread's allocations to the graphs' pool and finds any left."""
    from lowbit.kernels import decode, decode_rows, rotate_rows

    here, threads, device = threading.get_ident(), {}, torch.device("meta")
    for owner, name in ((torch, "empty"), (torch, "tensor"), (torch.Tensor, "to")):

        def records(call, name, *args, **kwargs):
            if device in (*args, *kwargs.values()):
                threads.setdefault(name, set()).add(threading.get_ident())
            return call(*args, **kwargs)

        patched = functools.partial(records, getattr(owner, name), name)
        monkeypatch.setattr(owner, name, patched if owner is torch else lambda *a, p=patched, **k: p(*a, **k))
    Scratch().take((((8,), torch.float32),), device)
    linear_paths._kept_ones(3, device)
    decode._e2m1_table(device)
    rotate_rows.rotation_factors(64, device, torch.float32)
    decode_rows.unrotation_matrix(64, device, torch.float32)
    assert threads.keys() == {"empty", "tensor", "to"}
    assert all(here not in made for made in threads.values())


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_few_rows_of_int8_go_through_int_mm_on_a_gpu_without_kernels(rows, monkeypatch):
    """It refuses fewer than 17 rows there; float64 instead took 8 times the weight's bytes at every call."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    def int_mm(a, b):
        if a.shape[0] <= 16:
            raise RuntimeError("self.size(0) needs to be greater than 16")
        products.append(a.shape[0])
        return (a.as_subclass(torch.Tensor).float() @ b.float()).int()

    products: list[int] = []
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    a = torch.randint(-127, 128, (rows, 64), dtype=torch.int8)
    b = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    out = linear_reference_module._int8_matmul(a.as_subclass(OnGpu), b)
    assert torch.equal(out.as_subclass(torch.Tensor).double(), a.double() @ b.double().t())
    assert products == [32 if rows <= 16 else rows]


def test_scratch_made_in_inference_mode_can_be_written_outside():
    scratch, spec = Scratch(), ((8,), torch.float32)
    with torch.inference_mode():
        scratch.take((spec,), torch.device("cpu"))
    scratch.take((spec, None), torch.device("cpu"))[0].copy_(torch.ones(8))


@pytest.mark.parametrize("cc", [(8, 6), (10, 0), (12, 0)])
@pytest.mark.parametrize(("kind", "multiple"), [("int8", 16), ("nvfp4", 32), ("mxfp8", 32)])
def test_kitchen_takes_only_sizes_it_can(cc, kind, multiple):
    gpu = Gpu(cc, True, True)
    for n, k in ((multiple * 4, multiple * 4 + 8), (multiple * 4 + 8, multiple * 4)):
        assert choose_path(kind, True, 100, n, k, torch.bfloat16, gpu) != "kitchen"
