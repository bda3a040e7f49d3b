"""The ways that a product takes, one by one: comfy-kitchen's, torch._scaled_mm's, torch._int_mm's, and what they keep."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
import threading
import time

import comfy_kitchen as ck
import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels import launch as launch_module
from lowbit.kernels import matmul_hopper
from lowbit.kernels.decode import decode_reference
from lowbit.kernels.stored_weight import FP8, MXFP8, NVFP4, StoredWeight
from lowbit.ops import linear_8bit, linear_few_rows, linear_paths
from lowbit.ops import linear_reference as linear_reference_module
from lowbit.ops import scratch as scratch_module
from lowbit.ops.linear_call import LinearCall
from lowbit.ops.linear_kitchen import kitchen_linear
from lowbit.ops.linear_table import FP8_ROWS, KITCHEN, REFERENCE, Gpu, choose_path
from lowbit.ops.linear_weight import stored_weight
from lowbit.ops.scratch import Scratch
from lowbit.ops.shared_input import FIRST
from testing.measure import relative_error

from ..kernels.launches import Launches, WatchedReplay
from ..kernels.products import multiply, product_of
from ..kernels.stored import MAKERS, make
from .linear_weights import random_weight

torch.set_num_threads(1)


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
    weight = stored_weight(random_weight(name, 64, 256, torch.bfloat16))
    storage = torch.randn(3 * 256 + rows * 256 + 1).bfloat16()
    x = storage[1 : 1 + rows * 256].view(rows, 256)
    if rows > 1:
        x[1, 5], x[rows - 1, 7] = float("nan"), float("inf")
    out = kitchen_linear(x, weight, None, None)
    reference = x.double() @ decode_reference(weight, torch.float64).t()
    fine = [row for row in range(rows) if rows == 1 or row not in (1, rows - 1)]
    assert relative_error(out[fine], reference[fine]) < 0.15
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


@pytest.fixture
def refused(monkeypatch):
    """What torch._scaled_mm refused: nothing yet. It is asked on a CPU too, and Triton's kernels do nothing."""
    monkeypatch.setattr(linear_8bit, "_scaled_mm_refused", set())
    monkeypatch.setattr(linear_8bit, "_scaled_mm_said", set())
    monkeypatch.setattr(linear_8bit, "_takes_scaled_mm", lambda call: True)
    monkeypatch.setattr(linear_8bit, "quantize_rows", lambda *args: None)
    return linear_8bit._scaled_mm_refused


@pytest.mark.parametrize(
    ("cc", "rows", "columns", "own"),
    [
        ((9, 0), 512, 3072, True),
        ((9, 0), 513, 3072, False),  # 60 tiles for 132 multiprocessors
        ((9, 0), 4096, 3072, True),  # 384, in three rounds
        ((9, 0), 2048, 3072, False),  # 192, in two
        ((9, 0), 4096, 12288, False),  # the GPU is at it for longer than the processor at a linear
        ((8, 9), 40, 3072, False),
        ((10, 0), 40, 3072, False),
    ],
)
def test_fp8_goes_to_cublas_where_that_is_faster(cc, rows, columns, own, monkeypatch):
    monkeypatch.setattr(linear_8bit, "GLUON_FOUND", True)
    monkeypatch.setattr(matmul_hopper, "multiprocessor_count", lambda index: 132)
    data = torch.empty(3072, columns, dtype=torch.float8_e4m3fn, device="meta")
    traits = StoredWeight(FP8, data, torch.ones(1, device="meta"), 3072, columns).traits
    shape, device = ((rows, columns), (columns, 1)), torch.device("cuda", 0)
    call = LinearCall(traits, True, *shape, torch.bfloat16, device, None, None, False, Gpu(cc, triton=True))
    assert type(linear_8bit.fp8_rows(call)) is (linear_8bit.QuantizedRows if own else linear_8bit.ScaledMm)
    unbuilt = dataclasses.replace(call, gpu=Gpu(cc, triton=False))
    assert type(linear_8bit.fp8_rows(unbuilt)) is linear_8bit.ScaledMm, "Triton is there, and cannot compile"
    monkeypatch.setattr(linear_8bit, "GLUON_FOUND", False)
    assert type(linear_8bit.fp8_rows(call)) is linear_8bit.ScaledMm


@pytest.fixture
def multiplied(refused, monkeypatch):
    """The dtypes of the codes that Triton multiplied."""
    dtypes = []
    monkeypatch.setattr(linear_8bit, "matmul_rows", lambda q, codes, *args, **options: dtypes.append(codes.dtype))
    return dtypes


def _fp8_product(gpu, dtype=torch.float8_e4m3fn):
    weight = StoredWeight(FP8, torch.zeros(16, 32).to(dtype), torch.ones(1), 16, 32)
    return multiply(FP8_ROWS, torch.zeros(16, 32).bfloat16(), weight, None, None, gpu)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("an illegal access")])
def test_errors_that_another_product_would_run_into_reach_the_caller(error, refused, multiplied, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    with pytest.raises(type(error)):
        _fp8_product(Gpu((9, 0)))
    assert not refused
    assert not multiplied


class _Refusing:
    """Stands in for torch._scaled_mm: as CUTLASS below cc 9.0, it takes no e5m2 weight."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, codes, row_scale, columns, *, out, bias, **options):
        self.calls += 1
        if codes.dtype == torch.float8_e5m2:
            raise RuntimeError("b.dtype() == at::kFloat8_e4m3fn INTERNAL ASSERT FAILED")
        product = (q.float() @ codes.float()) * row_scale * columns + (0 if bias is None else bias)
        return product.to(options["out_dtype"]) if out is None else out.copy_(product)


@pytest.mark.parametrize(
    ("error", "for_good"),
    [
        (RuntimeError("Rowwise scaling is not currently supported on your device"), True),
        (
            RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ARCH_MISMATCH when calling `cublasLtMatmul`"), True),
        (RuntimeError("b.dtype() == at::kFloat8_e4m3fn INTERNAL ASSERT FAILED"), True),
        (ValueError("Invalid scaling configuration."), True),
        (NotImplementedError("Could not run 'aten::_scaled_mm' with arguments from the 'CUDA' backend"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasLtMatmul`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul`"), False),
    ],
)
def test_only_a_call_that_is_unsupported_switches_scaled_mm_off(error, for_good, multiplied, monkeypatch):
    """Anything else may have been this once: the call is done another way, and the next one tries again."""
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise error

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    for _ in range(3):
        _fp8_product(Gpu((9, 0)))
    assert len(multiplied) == 3
    assert len(calls) == (1 if for_good else 3)
    assert len(linear_8bit._scaled_mm_said) == 1


@pytest.fixture
def refusing(refused, monkeypatch):
    """torch._scaled_mm refuses e5m2."""
    stand_in = _Refusing()
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    return stand_in


def test_a_dtype_that_scaled_mm_refuses_does_not_stop_the_others(refusing, multiplied):
    for dtype in (torch.float8_e5m2, torch.float8_e5m2, torch.float8_e4m3fn):
        _fp8_product(Gpu((8, 9)), dtype)
    assert multiplied == [torch.float8_e5m2] * 2
    assert refusing.calls == 2


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
def test_without_triton_a_refused_fp8_product_is_16_bit(name, refusing):
    """Windows without Triton: the prompt goes on."""
    weight, x, bias = random_weight(name, 32, 64), torch.randn(20, 64).bfloat16(), torch.randn(32)
    for _ in range(2):
        out = multiply(FP8_ROWS, x, stored_weight(weight), bias, "silu", Gpu((8, 9), triton=False))
        reference = F.silu(x.double()) @ weight.dequantize().double().t() + bias.double()
        assert relative_error(out, reference) < 5e-2
    assert refusing.calls == (1 if name == "fp8_e5m2" else 2)


def test_what_linears_keep_is_made_on_a_thread_of_its_own(monkeypatch):
    """Warming up CUDA graphs, torch.compile sends this thread's allocations to the graphs' pool and finds any left."""
    from lowbit.kernels import decode, decode_rows

    here, threads, device = threading.get_ident(), {}, torch.device("meta")
    for owner, name in ((torch, "empty"), (torch, "tensor"), (torch.Tensor, "to")):

        def records(call, name, *args, **kwargs):
            if device in (*args, *kwargs.values()):
                threads.setdefault(name, set()).add(threading.get_ident())
            return call(*args, **kwargs)

        patched = functools.partial(records, getattr(owner, name), name)
        monkeypatch.setattr(owner, name, patched if owner is torch else lambda *a, p=patched, **k: p(*a, **k))
    Scratch().take((((8,), torch.float32),), device)
    linear_8bit._kept_ones(3, device)
    decode._e2m1_table(device)
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


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_float32_gives_the_very_integers_on_a_cpu(data):
    """Also where every product is the largest there is, and where the sums are beyond what float32 holds exactly."""
    sizes = [data.draw(st.integers(0, 40)), data.draw(st.sampled_from([0, 1, 7, 256, 1040, 1041, 3000])), 9]
    seed, extreme = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([-128, -127, 1, 7, 127, None]))
    generator = torch.Generator().manual_seed(seed)
    rows, columns, count = sizes
    a, b = (
        torch.full((size, columns), extreme, dtype=torch.int8)
        if extreme is not None
        else torch.randint(-128, 128, (size, columns), dtype=torch.int8, generator=generator)
        for size in (rows, count)
    )
    b[::2] = -b[::2].clamp(min=-127)
    assert torch.equal(linear_reference_module.float_int8_matmul(a, b).long(), a.long() @ b.long().t())


def _overflowing(a, b):
    """As oneDNN's products without VNNI instructions: pairs are added in 16 bits, the one side made unsigned."""
    shifted, b = a.long() + 128, b.long()
    pairs = (shifted.unsqueeze(2) * b.unsqueeze(0)).unflatten(1, (-1, 2)).sum(2).clamp(-32768, 32767)
    return (pairs.sum(1) - 128 * b.sum(0)).int()


def _slow(a, b):
    time.sleep(0.2)
    return (a.long() @ b.long()).int()


def _missing(a, b):
    raise RuntimeError("not implemented for 'Char'")


@pytest.mark.parametrize("int_mm", [_overflowing, _slow, _missing])
def test_int_mm_that_is_wrong_slow_or_missing_on_a_cpu_is_not_used(int_mm, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    linear_reference_module._cpu_has_int_mm.cache_clear()
    try:
        a, b = (torch.randint(-128, 128, (8, 512), dtype=torch.int8) for _ in range(2))
        assert torch.equal(linear_reference_module._int8_matmul(a, b).long(), a.long() @ b.long().t())
        assert not linear_reference_module._cpu_has_int_mm()
    finally:
        linear_reference_module._cpu_has_int_mm.cache_clear()


OLDER_CPU = """
    import torch
    from lowbit.ops.linear_reference import _int8_matmul
    for value in (127, -128, None):
        a, b = (torch.full((64, 1536), value or 0, dtype=torch.int8) for _ in range(2))
        if value is None:
            a, b = (torch.randint(-128, 128, (64, 1536), dtype=torch.int8) for _ in range(2))
        assert torch.equal(_int8_matmul(a, b).long(), a.long() @ b.long().t()), value
"""


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_a_cpu_without_int8_instructions_gives_the_very_integers(instructions):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", textwrap.dedent(OLDER_CPU)], env=environment, check=True)


def test_scratch_made_in_inference_mode_can_be_written_outside():
    scratch, spec = Scratch(), ((8,), torch.float32)
    with torch.inference_mode():
        scratch.take((spec,), torch.device("cpu"))
    scratch.take((spec, None), torch.device("cpu")).tensors[0].copy_(torch.ones(8))


def test_scratch_released_by_another_thread_while_it_is_taken(monkeypatch):
    """ComfyUI's memory manager releases on its own thread: what is being taken stays whole, and is not kept after."""
    scratch, specs, device = Scratch(), (((8,), torch.float32), ((4,), torch.int8)), torch.device("cpu")

    class OtherThread:
        """A limit that lets the other thread in when it is compared, which is between the buffer and its views."""

        def __le__(self, count):
            scratch.release()
            return False

    monkeypatch.setattr(scratch_module, "_MOST_CUTS", OtherThread())
    cut = scratch.take(specs, device)
    assert all(tensor is not None for tensor in cut.tensors)
    assert scratch.nbytes == 0
    monkeypatch.setattr(scratch_module, "_MOST_CUTS", 256)
    assert scratch.take(specs, device) is not cut
    assert scratch.nbytes > 0


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(MAKERS)),
    rows=st.sampled_from([1, 2, 5, 17, 40, 1030]),
    steps=st.sampled_from([(1, 0), (2, 0), (1, 1)]),
    count=st.sampled_from([24, 64, 132]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    activation=st.sampled_from([None, "silu"]),
    fast=st.booleans(),
    shared=st.booleans(),
    gpu=st.sampled_from([Gpu((9, 0), triton=True), Gpu((8, 6), triton=True), Gpu((12, 0), triton=True)]),
)
def test_later_calls_launch_what_the_first_would_have(
    name, rows, steps, count, dtype, bias, activation, fast, shared, gpu
):
    """With their own tensors, to the last argument, and without Triton's front end."""
    columns = 512

    def tensors():
        x = torch.randn(rows * steps[0], columns + 16 * steps[1]).to(dtype)[:: steps[0], :columns]
        # With ComfyUI in the process, the layout of e5m2 is another.
        weight = make("e4m3" if name == "e5m2" else name, count, columns, torch.device("cpu"))
        if name == "e5m2":
            weight = dataclasses.replace(weight, data=weight.data.float().to(torch.float8_e5m2))
        return x, weight, None if bias is None else torch.randn(count).to(bias)

    with pytest.MonkeyPatch.context() as patch:
        launches, (x, weight, values), others = Launches(patch), tensors(), tensors()
        path = choose_path(weight.kind, fast, rows, count, columns, dtype, gpu)
        if path in (KITCHEN, REFERENCE):
            return
        activated: dict[int, torch.Tensor] = {}
        activate = lambda x, activation: activated.setdefault(id(x), F.silu(x)) if activation else x  # noqa: E731
        for owner in (linear_8bit, linear_few_rows, linear_paths):
            patch.setattr(owner, "Replay", WatchedReplay)
        patch.setattr(linear_few_rows, "apply_activation", activate)
        patch.setattr(linear_paths, "apply_activation", activate)
        product = product_of(path, x, weight, values, activation, gpu, shared)
        product(x, weight, values, FIRST)
        out, compiled = torch.empty(rows, count, dtype=dtype), launches.compiled
        product.new_output = lambda: out
        launches.clear()
        product(*others, FIRST)
        again = list(launches)
        assert launches.compiled == compiled
        launches.clear()
        launch_module._launches.clear()
        other = product_of(path, *others, activation, gpu, shared)
        other.new_output = lambda: out
        other(*others, FIRST)
        assert again == launches
        assert again
        scratch_module.release_scratch()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 700])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_part_of_every_sample_is_launched_again(name, tokens, fast, monkeypatch):
    """The texts' tokens, say, of two prompts' attention, whose rows no view shows."""
    launches, gpu = Launches(monkeypatch), Gpu((9, 0), triton=True)
    weight = make(name, 24, 512, torch.device("cpu"))
    path = choose_path(weight.kind, fast, 2 * tokens, 24, 512, torch.bfloat16, gpu)
    for owner in (linear_8bit, linear_few_rows, linear_paths):
        monkeypatch.setattr(owner, "Replay", WatchedReplay)
    xs = [torch.randn(2, tokens + 5, 512).bfloat16()[:, 2 : 2 + tokens] for _ in range(2)]
    product = product_of(path, xs[0], weight, None, None, gpu)
    for x in xs:
        assert product(x, weight, None).shape == (2, tokens, 24)
    assert launches
    scratch_module.release_scratch()
