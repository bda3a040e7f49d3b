"""The regular Hadamard rotation, alone and with the quantizer, against comfy-kitchen's matrix and the reference."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from lowbit.kernels.hadamard import hadamard, rotate_reference
from lowbit.kernels.matmul_split import split_rows
from lowbit.kernels.quantize_rows import quantize_rows_reference
from lowbit.kernels.rotate_rows import rotate_rows

SHAPES = [(256, 256), (4352, 256), (768, 256), (320, 64), (48, 16)]


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_matrix_is_comfy_kitchens_and_its_own_inverse(size):
    matrix = hadamard(size, torch.device("cpu"), torch.float32)
    assert torch.equal(matrix, _build_hadamard(size))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))


def test_no_matrix_of_other_sizes():
    with pytest.raises(ValueError, match="power of four"):
        hadamard(32, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_rotates_and_quantizes(device, columns, group, activation):
    x = torch.randn(3, columns, device=device)
    x[1] = 0
    q = torch.empty(3, columns, dtype=torch.int8, device=device)
    scale = torch.empty(3, device=device)
    rotate_rows(x, q, scale, group, activation)
    expected, expected_scale = quantize_rows_reference(x, torch.int8, group, activation)
    torch.testing.assert_close(scale, expected_scale, rtol=2e-3, atol=0)
    assert (q.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_rotates_samples_that_lie_apart(device, columns, group):
    x = torch.randn(3, 9, columns, device=device)[:, 2:7]
    q = torch.empty(2, 15, columns, dtype=torch.int8, device=device)
    scale = torch.empty(2, 15, device=device)
    for rows, codes, scales in zip((x, x.reshape(15, columns)), q, scale, strict=True):
        rotate_rows(rows, codes, scales, group)
    assert torch.equal(*q)
    assert torch.equal(*scale)


@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotates_alone(device, columns, group, dtype):
    x = torch.randn(2, columns, device=device, dtype=dtype)
    out = torch.empty_like(x)
    rotate_rows(x, out, None, group)
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), rotate_reference(x, group), rtol=tolerance, atol=tolerance)
    back = torch.empty_like(x)
    rotate_rows(out, back, None, group)
    torch.testing.assert_close(back, x, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("planes", [1, 2])
def test_rotates_and_splits_as_one_after_the_other(device, columns, group, dtype, planes):
    x = torch.randn(6, columns, device=device, dtype=dtype)[::2]
    x[1] = 0
    x[2] *= 1e-3
    rotated = torch.empty(3, columns, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
    rotate_rows(x, rotated, None, group, "silu")
    expected, q = (torch.full((2, 3, columns), 99, dtype=torch.int8, device=device) for _ in range(2))
    expected_scale, scale = (torch.full((3,), torch.nan, device=device) for _ in range(2))
    split_rows(rotated, expected, expected_scale, None, planes)
    rotate_rows(x, q, scale, group, "silu", planes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q, expected)
