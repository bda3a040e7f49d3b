"""Every launch of the dispatch compiles for GPUs that are not here, and fits into their shared memory.

With another Triton (3.4 comes with torch 2.8, 3.5 with 2.9): `uv pip install --target FOLDER --no-deps triton==3.4.0`,
then these tests with PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types

import pytest
import torch

from lowbit.kernels.attend_cache import attend_cache
from lowbit.kernels.attention_hopper import QUERY_BLOCK, attend_hopper
from lowbit.kernels.attention_int8 import attend_int8, tiles_for
from lowbit.kernels.attention_quantize import quantize_attention
from lowbit.kernels.cache_heads import HeadNorms, cache_heads
from lowbit.kernels.evict_slot import evict_slot
from lowbit.kernels.gate_rows import gate_rows
from lowbit.kernels.gather_prompt import gather_prompt
from lowbit.kernels.join_heads import join_heads
from lowbit.kernels.launch import as_triton
from lowbit.kernels.matvec_together import matvec_together
from lowbit.kernels.modulate_rows import modulate_rows
from lowbit.kernels.norm_rows import add_norm
from lowbit.kernels.normalize import normalize
from lowbit.kernels.quantize_rows import quantize_rows
from lowbit.kernels.rope import rope
from lowbit.kernels.rotate_rows import rotate_rows
from lowbit.kernels.runtime import GLUON_FOUND, SMALLEST_DOT
from lowbit.ops import linear_few_rows
from lowbit.ops.linear_table import FEW_ROWS, KITCHEN, REFERENCE, Gpu, choose_path

from .products import multiply
from .stored import make

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles with Triton", allow_module_level=True)

LAUNCHING = (
    "attend_cache",
    "attention_hopper",
    "attention_int8",
    "attention_quantize",
    "cache_heads",
    "decode_rows",
    "evict_slot",
    "gate_rows",
    "gather_prompt",
    "join_heads",
    "matmul_blocks",
    "matmul_decode",
    "matmul_hopper",
    "matmul_rows",
    "matmul_split",
    "matvec_together",
    "modulate_rows",
    "norm_rows",
    "normalize",
    "quantize_rows",
    "rope",
    "rotate_rows",
)
COUNTING = (
    "ops.linear_few_rows",
    "kernels.matmul_hopper",
    "kernels.matmul_rows",
    "kernels.attend_cache",
    "kernels.attention_hopper",
)
CHOOSING = (
    "attend_cache",
    "cache_heads",
    "evict_slot",
    "gate_rows",
    "gather_prompt",
    "join_heads",
    "modulate_rows",
    "norm_rows",
    "normalize",
    "rope",
)
"""Of them, those that choose between Triton and plain torch themselves."""

SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that a block may have. Source: CUDA C++ Programming Guide, table of compute capabilities."""

CALLS = (
    ("e4m3", torch.bfloat16, 2, False),
    ("e4m3", torch.bfloat16, 5, False),
    ("e4m3", torch.float16, 60, False),
    ("e4m3", torch.float16, 2000, True),
    ("e4m3", torch.float32, 40, True),
    ("int8", torch.float16, 1, False),
    ("int8", torch.float16, 60, False),
    ("int8", torch.bfloat16, 2000, True),
    ("int8_convrot", torch.float16, 5, True),
    ("int8_convrot", torch.float32, 2000, True),
    ("int8_convrot", torch.bfloat16, 2000, False),
    ("int4", torch.bfloat16, 1, False),
    ("mxfp8", torch.bfloat16, 1, False),
    ("mxfp8", torch.bfloat16, 20, False),
    ("mxfp8", torch.bfloat16, 2000, True),
    ("nvfp4", torch.bfloat16, 1, False),
    ("nvfp4", torch.float16, 20, False),
    ("nvfp4", torch.bfloat16, 2000, True),
    ("int4_codebook", torch.bfloat16, 1, True),
    ("int4_grid", torch.bfloat16, 16, True),
)


class _Driver:
    """Stands in for Triton's driver of the GPU that is compiled for."""

    def __init__(self, cc: tuple[int, int]) -> None:
        self.number = 10 * cc[0] + cc[1]

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """A list that fills with the metadata of every kernel that would have been launched."""
    import triton

    kernels: list = []

    def compiles(kernel, grid, arguments, constants, warps=4, stages=3, overlap=False):
        options = {"num_warps": warps, "num_stages": stages, **({"launch_pdl": True} if overlap else {})}
        arguments = map(as_triton, arguments)
        kernels.append(kernel.warmup(*arguments, grid=grid, **constants, **options).metadata)

    for name in LAUNCHING:
        monkeypatch.setattr(importlib.import_module(f"lowbit.kernels.{name}"), "launch", compiles)
    for name in COUNTING:
        monkeypatch.setattr(importlib.import_module(f"lowbit.{name}"), "multiprocessor_count", lambda index: 132)
    matmul_hopper = importlib.import_module("lowbit.kernels.matmul_hopper")
    number = lambda index: divmod(triton.runtime.driver.active.get_current_device(), 10)  # noqa: E731
    monkeypatch.setattr(matmul_hopper, "compute_capability", number)
    for name in CHOOSING:
        monkeypatch.setattr(importlib.import_module(f"lowbit.kernels.{name}"), "kernels_run_on", lambda x: True)
    driver = triton.runtime.driver
    active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    monkeypatch.setattr(driver, active, getattr(driver, active))
    return types.SimpleNamespace(kernels=kernels, use=lambda cc: driver.set_active(_Driver(cc)))


@pytest.mark.parametrize("cc", SHARED_KIB)
@pytest.mark.parametrize(("name", "dtype", "rows", "fast"), CALLS)
def test_every_launch_compiles_and_fits(cc, name, dtype, rows, fast, compiled):
    compiled.use(cc)
    # Wide tiles are for outputs that give every multiprocessor several.
    columns = 4096 if rows == 2000 else 64
    weight, gpu = make(name, columns, 512, torch.device("cpu")), Gpu(cc, triton=True, kitchen=False)
    path = choose_path(weight.kind, fast, rows, weight.rows, weight.columns, dtype, gpu)
    if path in (KITCHEN, REFERENCE):
        pytest.skip(f"{path} launches none of ours")
    multiply(path, torch.randn(rows, 512).to(dtype), weight, torch.randn(columns).to(dtype), None, gpu)
    assert compiled.kernels
    for metadata in compiled.kernels:
        assert metadata.shared <= SHARED_KIB[cc] * 1024, (metadata.name, metadata.shared)


@pytest.mark.parametrize("cc", SHARED_KIB)
@pytest.mark.parametrize(("name", "rows", "block_m"), [("nvfp4", 1, 8), ("nvfp4", 32, 32), ("int4_codebook", 16, 16)])
def test_decoded_4_bit_weights_stay_in_registers(name, cc, rows, block_m, compiled, monkeypatch):
    """Shared memory holds a program's part of x (512 columns) and its output tile; decoded weights would take 32 KiB."""
    compiled.use(cc)
    monkeypatch.setattr(linear_few_rows, "multiprocessor_count", lambda index: 1)
    weight, gpu = make(name, 512, 512, torch.device("cpu")), Gpu(cc, triton=True, kitchen=False)
    multiply(FEW_ROWS, torch.randn(rows, 512).bfloat16(), weight, None, None, gpu)
    (metadata,) = (kernel for kernel in compiled.kernels if kernel.name == "_matmul_blocks_kernel")
    block_m = max(block_m, SMALLEST_DOT)
    assert metadata.shared <= 512 * block_m * 2 + 64 * block_m * 4 + 1024


ATTENTION = ((torch.bfloat16, 128, False), (torch.float16, 80, True))
"""dtype, head dim, whether with a mask and the log-sum-exp."""


@pytest.mark.parametrize(("cc", "hopper"), [*((cc, False) for cc in SHARED_KIB), *(((9, 0), True),) * GLUON_FOUND])
@pytest.mark.parametrize(("dtype", "head_dim", "more"), ATTENTION)
def test_attention_compiles_and_fits(cc, hopper, dtype, head_dim, more, compiled):
    """hopper: the kernel of cc 9.0 and Triton 3.6."""
    compiled.use(cc)
    q, k, v = (torch.randn(1, 2, 200, head_dim).to(dtype) for _ in range(3))
    mask = torch.ones(1, 200, dtype=torch.bool) if more else None
    lse = torch.empty(1, 2, 200) if more else None
    for fp8 in [True, False] if cc >= (8, 9) else [False]:
        tiles = tiles_for(cc, fp8)
        quantized = quantize_attention(q, k, v, mask, 0.1, QUERY_BLOCK if hopper else tiles.rows, fp8, shift=more)
        if hopper:
            attend_hopper(quantized, v, mask, torch.empty_like(q), lse)
        else:
            attend_int8(quantized, v, mask, torch.empty_like(q), lse, tiles)
    assert len(compiled.kernels) == (8 if cc >= (8, 9) else 4)
    for kernel in compiled.kernels:
        assert kernel.shared <= SHARED_KIB[cc] * 1024, (kernel.name, kernel.shared)


@pytest.mark.parametrize("cc", SHARED_KIB)
@pytest.mark.parametrize("sizes", [(28, 4, 128, 64), (8, 1, 512, 256), (16, 16, 256, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_launch_of_a_decoding_step_compiles_and_fits(cc, sizes, dtype, compiled):
    compiled.use(cc)
    heads, kv_heads, width, half = sizes
    x, q = torch.randn(1, 3584, dtype=dtype), torch.randn(heads, width, dtype=dtype)
    kv, weight = torch.randn(kv_heads, width, dtype=dtype), torch.randn(width, dtype=dtype)
    caches, table = torch.randn(2, kv_heads, 505, width, dtype=dtype), torch.randn(9, half)
    step, slot = torch.tensor([3]), torch.zeros(kv_heads, dtype=torch.int64)
    add_norm(x, x, x[0], x[0], 1e-6)
    gate_rows(x, x, "gelu_tanh")
    cache_heads(q, kv, kv, HeadNorms(weight, weight, True), table, table, step, slot, *caches)
    attend_cache(q, *caches, step, 100, 0.1, torch.zeros(kv_heads, 505))
    evict_slot(torch.zeros(kv_heads, 505), torch.zeros(kv_heads, 505, dtype=torch.int64), step, 505, 252)
    for mask in (None, torch.zeros(505, 505, dtype=dtype)):
        gather_prompt(torch.randn(heads, 505, width, dtype=dtype), caches[0], mask, 0.1)
    assert len(compiled.kernels) == 11
    for metadata in compiled.kernels:
        assert metadata.shared <= SHARED_KIB[cc] * 1024, (metadata.name, metadata.shared)


@pytest.mark.parametrize("cc", SHARED_KIB)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stands_around_the_linears_compiles_and_fits(cc, dtype, compiled):
    compiled.use(cc)
    x, row = torch.randn(2, 9, 5120, dtype=dtype), torch.randn(2, 1, 5120, dtype=dtype)
    modulate_rows(row, x, row)
    modulate_rows(x, x, row)
    normalize(x, None, None, 1e-6, centered=True)
    normalize(x, row[0, 0], row[0, 0], 1e-6, centered=True)
    normalize(x, row[0, 0], None, 1e-6, centered=False)
    heads = x.view(2, 9, 40, 128)
    normalize(heads.transpose(1, 2), row[0, 0, :128], None, 1e-6, centered=False)
    rope(heads, torch.randn(1, 9, 1, 64, 2, 2))
    rope(heads.transpose(1, 2), torch.randn(1, 1, 9, 64, 2, 2, dtype=dtype))
    join_heads(heads.transpose(1, 2), heads[:, :4].transpose(1, 2))
    part, codes, scale = x[:, 2:], torch.empty(14, 5120, dtype=torch.int8), torch.empty(14)
    quantize_rows(part, codes, scale)
    rotate_rows(part, codes, scale, 256)
    assert len(compiled.kernels) == 11
    for metadata in compiled.kernels:
        assert metadata.shared <= SHARED_KIB[cc] * 1024, (metadata.name, metadata.shared)


@pytest.mark.parametrize("cc", SHARED_KIB)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.int8), ("e4m3", torch.float8_e4m3fn), ("plain", torch.bfloat16)]
)
def test_weights_multiplied_together_compile(cc, kind, dtype, compiled):
    if kind == "e4m3" and cc < (8, 9):
        pytest.skip("this GPU does not convert e4m3")
    compiled.use(cc)
    x, out = torch.randn(1, 3584).bfloat16(), torch.zeros(1, 9999).bfloat16()
    scale = None if kind == "plain" else torch.ones(1)
    for rows, gate in (((3584, 512, 512), None), ((9000, 9000), "silu"), ((1, 2), None)):
        weights = [torch.zeros(count, 3584, dtype=dtype) for count in rows]
        options = {"kind": kind, "gate": gate, "assembly": True}
        matvec_together(x, weights, [scale] * len(rows), [None] * len(rows), out, **options)
    assert len(compiled.kernels) == 3
