"""The weight-only kernels for few rows: multiply-adds, 16-bit dots, split 8-bit terms, 64-bit words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit.kernels import matmul_blocks as matmul_blocks_module
from lowbit.kernels.decode import decode_reference
from lowbit.kernels.matmul_blocks import block_splits, matmul_blocks
from lowbit.kernels.matmul_decode import matmul_decode, matvec_decode
from lowbit.kernels.matmul_split import matmul_split, split_rows, term_count
from lowbit.kernels.runtime import INTERPRETED
from lowbit.kernels.stored_weight import INT4
from testing.measure import relative_error

from .references import split_rows_reference
from .stored import ROTATED, UNROTATED, make

HARDWARE = not INTERPRETED
PLAIN_DOTS = torch.float32 if INTERPRETED else torch.bfloat16
BAR = 1e-5 if INTERPRETED else 4e-3
SIZES = [(24, 256), (33, 80), (40, 1120)]


def _reference(x, weight, bias):
    out = x.double() @ decode_reference(weight, torch.float64, rotated=True).t()
    return out if bias is None else out + bias.double()


def _check(out, x, weight, bias, bar):
    expected = _reference(x, weight, bias)
    assert relative_error(out, expected) < bar


def _partial(splits, rows, count, device):
    return torch.full((splits, rows, count), torch.nan, device=device) if splits > 1 else None


def _codes(weight, hardware=HARDWARE):
    as_bytes = weight.code_name in ("e5m2", "e2m1", "int4") or (not hardware and weight.kind in ("fp8", "mxfp8"))
    return weight.data.view(torch.uint8) if as_bytes else weight.data


@pytest.mark.parametrize("name", [*UNROTATED, "int4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_matvec(device, name, rows):
    for count, columns in SIZES[:1] if name in ROTATED else SIZES:
        weight = make(name, count, columns, device)
        bias = torch.randn(count, device=device)
        x = torch.randn(columns, rows, device=device).t()
        out = torch.full((rows, count), torch.nan, device=device)
        matvec_decode(x, weight, _codes(weight), bias, out, hardware_e4m3=HARDWARE)
        _check(out, x, weight, bias, 1e-5)


@pytest.mark.parametrize("name", [name for name in UNROTATED if not name.startswith("int8")])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("hardware", sorted({HARDWARE, False}))
def test_decode(device, name, splits, hardware):
    for count, columns in SIZES:
        weight = make(name, count, columns, device)
        bias = torch.randn(count, device=device, dtype=PLAIN_DOTS)
        for rows in (3, 17):
            x = torch.randn(rows, columns, device=device, dtype=PLAIN_DOTS)
            out = torch.full((rows, count), torch.nan, device=device, dtype=PLAIN_DOTS)
            matmul_decode(
                x,
                weight,
                _codes(weight, hardware),
                bias,
                out,
                _partial(splits, rows, count, device),
                splits=splits,
                hardware_e4m3=hardware,
                assembly=not INTERPRETED,
            )
            _check(out, x, weight, bias, BAR)


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("planes", [1, 2])
def test_split_rows(device, integer, dtype, planes):
    """The terms add up to x: to its last bit in e4m3, to 2^-16 of the row's largest in int8."""
    x = torch.randn(5, 160, device=device).to(dtype)
    x[1] = 0
    x[2, 3] = 900
    terms = term_count(dtype, integer)
    target = torch.int8 if integer else torch.float8_e4m3fn
    q = torch.empty(terms, 5, 160, dtype=target, device=device)
    scale = torch.empty(5, device=device)
    split_rows(x, q, scale, None, planes)
    expected, expected_scale = split_rows_reference(x, terms, integer, None, planes)
    torch.testing.assert_close(scale[[0, 2, 3, 4]], expected_scale[[0, 2, 3, 4]])
    base = 254.0 if integer else 16.0
    total = sum(q[t].double() / base**t for t in range(terms)) * scale.double().unsqueeze(1)
    straight = torch.cat([x[:, plane::planes] for plane in range(planes)], dim=1).double()
    bar = x.double().abs().amax(dim=1, keepdim=True) * (1.6e-5 if integer else 1e-6)
    assert ((total - straight).abs() <= bar).all()
    assert torch.equal(q[:, 0].float(), expected[:, 0].float()) or integer


def test_split_rows_keeps_nan_and_inf(device):
    x = torch.randn(3, 64, device=device)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    for integer in (True, False):
        q = torch.empty(2, 3, 64, dtype=torch.int8 if integer else torch.float8_e4m3fn, device=device)
        scale = torch.empty(3, device=device)
        split_rows(x, q, scale)
        assert not scale[:2].isfinite().any()
        assert scale[2].isfinite()


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8", "int8_tensor", "int8_convrot", "int4"])
@pytest.mark.parametrize("splits", [1, 2])
def test_split(device, name, splits):
    for count, columns in [(24, 256), (40, 1280)] if name in ROTATED else SIZES:
        weight = make(name, count, columns, device)
        integer = weight.kind != "fp8"
        bias = torch.randn(count, device=device, dtype=torch.bfloat16)
        for rows in (1, 5):
            x = torch.randn(rows, columns, device=device).bfloat16()
            q = torch.empty(2, rows, columns, dtype=torch.int8 if integer else torch.float8_e4m3fn, device=device)
            scale = torch.empty(rows, device=device)
            split_rows(x, q, scale, planes=2 if weight.kind == INT4 else 1)
            out = torch.full((rows, count), torch.nan, device=device)
            options = {"splits": splits, "assembly": not INTERPRETED, "stages": 3}
            matmul_split(q, scale, weight, bias, out, _partial(splits, rows, count, device), **options)
            _check(out, x, weight, bias, 2e-4 if INTERPRETED else 1e-3)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize(
    ("name", "activation", "threads_from_first"),
    [
        ("nvfp4", None, True),
        ("nvfp4", "silu", True),
        ("nvfp4", None, False),
        ("int4_codebook", None, True),
        ("int4_grid", "silu", False),
    ],
)
def test_blocks(device, tiles, name, activation, threads_from_first, monkeypatch):
    """In either order of the dimensions that are loaded: Triton spreads threads along them in one or the other."""
    if INTERPRETED:
        monkeypatch.setattr(matmul_blocks_module, "_THREADS_FROM_FIRST", threads_from_first)
    elif not threads_from_first:
        pytest.skip("compiled for this Triton's order")
    for count, columns in ((24, 256), (140, 1792), (72, 1024)) if name in ROTATED else (*SIZES, (140, 592), (72, 1024)):
        weight = make(name, count, columns, device)
        bias = torch.randn(count, device=device, dtype=PLAIN_DOTS)
        for rows in (1, 5, 17):
            x = torch.randn(rows, columns, device=device, dtype=PLAIN_DOTS)
            out = torch.full((rows, count), torch.nan, device=device, dtype=PLAIN_DOTS)
            partial = torch.full((block_splits(columns), rows, count), torch.nan, device=device)
            options = {"assembly": not INTERPRETED, "hardware_e4m3": not INTERPRETED}
            matmul_blocks(x, weight, bias, out, partial, tiles=tiles, activation=activation, **options)
            activated = x if activation is None else torch.nn.functional.silu(x.double())
            _check(out, activated, weight, bias, max(BAR, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_whose_relative_scales_a_file_has_in_16_bits(device, dtype):
    weight = make("int4_codebook", 24, 256, device)
    weight = dataclasses.replace(weight, block_scale=weight.block_scale.to(dtype))
    x = torch.randn(3, 256, device=device, dtype=PLAIN_DOTS)
    out = torch.full((3, 24), torch.nan, device=device, dtype=PLAIN_DOTS)
    partial = torch.full((block_splits(256), 3, 24), torch.nan, device=device)
    matmul_blocks(x, weight, None, out, partial, assembly=not INTERPRETED, hardware_e4m3=not INTERPRETED)
    _check(out, x, weight, None, max(BAR, 1e-5))
