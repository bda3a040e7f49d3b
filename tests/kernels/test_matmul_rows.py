"""The 8-bit matmul with scales in its epilogue, through pointers and descriptors."""

from __future__ import annotations

import pytest
import torch

from lowbit.kernels import matmul_hopper
from lowbit.kernels import matmul_rows as module
from lowbit.kernels.launch import Described
from lowbit.kernels.matmul_hopper import multiply_hopper, takes_hopper
from lowbit.kernels.matmul_rows import NARROW, WIDE, choose_tiles, matmul_rows
from lowbit.kernels.runtime import DESCRIPTORS_FIT, GLUON_FOUND, INTERPRETED, compute_capability
from testing.measure import relative_error

from .references import matmul_rows_reference


def _codes(rows, columns, dtype, device):
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return (torch.randn(rows, columns, device=device) * 60).to(dtype)


def _fp8_missing(device) -> bool:
    return not INTERPRETED and compute_capability(device.index or 0) < (8, 9)


def _needs_descriptors(device) -> None:
    if not DESCRIPTORS_FIT:
        pytest.skip("descriptors are not used with this Triton")
    if not INTERPRETED and compute_capability(device.index or 0) < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 24, 64), (17, 40, 96), (70, 80, 48), (5, 33, 50)])
def test_equals_reference(device, dtype, descriptors, m, n, k):
    if dtype != torch.int8 and _fp8_missing(device):
        pytest.skip("this GPU has no FP8")
    if descriptors:
        _needs_descriptors(device)
    a, b = _codes(m, k, dtype, device), _codes(n, k, dtype, device)
    row_scale = torch.rand(m, device=device) + 0.5
    for column_scale in (torch.rand(n, device=device) + 0.5, torch.tensor([0.3], device=device)):
        for bias in (None, torch.randn(n, device=device) * 1e4):
            out = torch.full((m, n), torch.nan, device=device)
            matmul_rows(a, b, row_scale, column_scale, bias, out, descriptors=descriptors)
            expected = matmul_rows_reference(a, b, row_scale, column_scale, bias, torch.float64)
            bar = 1e-6 if dtype == torch.int8 or INTERPRETED else 2e-3
            assert relative_error(out, expected) < bar


@pytest.mark.parametrize("tiles", [NARROW, WIDE])
def test_every_tiling(device, tiles):
    _needs_descriptors(device)
    m, n, k = (150, 272, 160) if INTERPRETED else (300, 528, 1040)
    a, b = _codes(m, k, torch.int8, device), _codes(n, k, torch.int8, device)
    row_scale, column_scale = torch.rand(m, device=device), torch.rand(n, device=device)
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    out = torch.full((m, n), torch.nan, device=device, dtype=dtype)
    matmul_rows(a, b, row_scale, column_scale, None, out, descriptors=True, tiles=tiles)
    expected = matmul_rows_reference(a, b, row_scale, column_scale, None, dtype)
    torch.testing.assert_close(out, expected, rtol=1e-5 if INTERPRETED else 1e-2, atol=1e-3)


def test_descriptors_need_aligned_rows(device, monkeypatch):
    used: list[bool] = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, arguments, *_, **__: used.append(isinstance(arguments[0], Described))
    )
    a = torch.zeros(4, 64, dtype=torch.int8, device=device)
    out, scale = torch.zeros(4, 8, device=device), torch.ones(4, device=device)
    shifted = a.flatten()[1:193].view(3, 64)
    for first, second in ((a, a), (a[:, :50].contiguous(), a[:, :50]), (a, a.t().contiguous().t()), (a, shifted)):
        matmul_rows(first, second, scale, scale, None, out, descriptors=True)
    assert used == [True, False, False, False]
    matmul_rows(a, a, scale, scale, None, out, descriptors=False)
    assert used.pop() is False


@pytest.mark.parametrize(
    ("rows", "columns", "out_bytes", "tiles"),
    [
        (512, 3072, 2, NARROW),  # all at once
        (512, 5120, 2, WIDE),  # 80 wide ones at once, 320 narrow ones in two rounds
        (512, 12288, 2, NARROW),  # 192 in two rounds, 768 in three
        (512, 13824, 2, WIDE),  # 216 in two, 864 in four
        (1024, 5120, 2, NARROW),
        (2048, 3072, 2, NARROW),
        (4096, 5120, 2, WIDE),
        (4096, 5120, 4, NARROW),
    ],
)
def test_tiles_are_those_that_are_done_earlier(rows, columns, out_bytes, tiles):
    assert choose_tiles(rows, columns, out_bytes, 132) is tiles


def test_the_product_of_hopper_is_for_one_dtype_and_16_bits_there(monkeypatch):
    monkeypatch.setattr(matmul_hopper, "GLUON_FOUND", True)
    for cc in ((9, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(matmul_hopper, "compute_capability", lambda index, cc=cc: cc)
        for dtype, other, out_dtype, fits in (
            (torch.int8, torch.int8, torch.bfloat16, True),
            (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float16, True),
            (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, False),
            (torch.int8, torch.int8, torch.float32, False),
        ):
            a, b = torch.empty(4, 16, dtype=dtype), torch.empty(8, 16, dtype=other)
            assert takes_hopper(a, b, torch.empty(4, 8, dtype=out_dtype)) is (fits and cc == (9, 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1025, 8, 16),
        (1124, 264, 1040),
        (2324, 1000, 400),
        (40, 264, 1040),
        pytest.param(8024, 5128, 528, id="several tiles a program"),
    ],
)
def test_the_product_of_hopper(device, dtype, out_dtype, m, n, k, monkeypatch):
    if not GLUON_FOUND or compute_capability(device.index or 0) != (9, 0):
        pytest.skip("Gluon and cc 9.0")
    made: list[torch.Tensor] = []
    monkeypatch.setattr(
        module, "multiply_hopper", lambda *arguments: made.append(arguments[2]) or multiply_hopper(*arguments)
    )
    monkeypatch.setattr(module, "choose_tiles", lambda *sizes: WIDE)
    a, b = _codes(m, k, dtype, device), _codes(n, k, dtype, device)
    row_scale = torch.rand(m, device=device) + 0.5
    for column_scale in (torch.rand(n, device=device) + 0.5, torch.tensor([0.3], device=device)):
        for bias in (None, torch.randn(n, device=device), torch.randn(n, device=device, dtype=out_dtype)):
            # float16 ends at 65,504, and what stands beside the output must stay.
            scales = row_scale * 1e-2, column_scale * 1e-2
            whole = torch.full((m + 1, n + 8), torch.nan, device=device, dtype=out_dtype)
            out = whole[:m, :n]
            matmul_rows(a, b, *scales, bias, out, descriptors=True)
            assert made.pop() is out
            expected = matmul_rows_reference(a, b, *scales, bias, torch.float64)
            error = relative_error(out, expected)
            assert error < (3e-3 if out_dtype == torch.bfloat16 or dtype != torch.int8 else 4e-4), error
            assert whole[m:].isnan().all()
            assert whole[:, n:].isnan().all()
