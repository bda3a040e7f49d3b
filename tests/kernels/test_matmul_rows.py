"""The 8-bit matmul with scales in its epilogue, through pointers and descriptors."""

from __future__ import annotations

import pytest
import torch

from lowbit.kernels.launch import Launcher
from lowbit.kernels.matmul_rows import (
    NARROW,
    WIDE,
    WIDE_STAGED,
    matmul_rows,
    matmul_rows_reference,
)
from lowbit.kernels.runtime import DESCRIPTORS_FIT, INTERPRETED, compute_capability


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
            assert ((out.double() - expected).norm() / expected.norm()).item() < bar


@pytest.mark.parametrize("tiles", [NARROW, WIDE, WIDE_STAGED])
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
    monkeypatch.setattr(Launcher, "__call__", lambda launcher, *tensors: used.append(bool(launcher.blocks)))
    a = torch.zeros(4, 64, dtype=torch.int8, device=device)
    out, scale = torch.zeros(4, 8, device=device), torch.ones(4, device=device)
    shifted = a.flatten()[1:193].view(3, 64)
    for first, second in ((a, a), (a[:, :50].contiguous(), a[:, :50]), (a, a.t().contiguous().t()), (a, shifted)):
        matmul_rows(first, second, scale, scale, None, out, descriptors=True)
    assert used == [True, False, False, False]
    matmul_rows(a, a, scale, scale, None, out, descriptors=False)
    assert used.pop() is False
