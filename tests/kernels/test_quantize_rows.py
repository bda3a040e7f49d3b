"""The row quantizer against its reference: dtypes, activations, strides, long rows, strange values."""

from __future__ import annotations

import pytest
import torch

from lowbit.kernels import quantize_rows as module
from lowbit.kernels.quantize_rows import ACTIVATIONS, quantize_rows, quantize_rows_reference

TARGETS = (torch.int8, torch.float8_e4m3fn)


def _run(x, dtype, **options):
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.full((x.shape[0],), torch.nan, device=x.device)
    quantize_rows(x, q, scale, **options)
    return q, scale


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference(device, dtype, source, activation):
    x = (torch.randn(7, 150, device=device) * 4).to(source)
    q, scale = _run(x, dtype, activation=activation)
    expected, expected_scale = quantize_rows_reference(x, dtype, 0, activation)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    # exp and the reciprocal round differently: a value on the edge may go to its neighbour.
    apart = (q.float() != expected.float()).float().mean()
    assert apart < 0.02
    assert ((q.float() - expected.float()).abs() <= 0.13 * expected.float().abs() + 1).all()


@pytest.mark.parametrize("dtype", TARGETS)
def test_long_rows_take_two_passes(device, dtype, monkeypatch):
    monkeypatch.setattr(module, "ONE_PASS_COLUMNS", 100)
    x = torch.randn(2, 5000, device=device)
    q, scale = _run(x, dtype)
    expected, expected_scale = quantize_rows_reference(x, dtype)
    torch.testing.assert_close(scale, expected_scale)
    torch.testing.assert_close(q.float(), expected.float(), rtol=0.13, atol=1)


@pytest.mark.parametrize("dtype", TARGETS)
def test_any_strides(device, dtype):
    base = torch.randn(12, 80, device=device)
    expected = _run(base.contiguous(), dtype)
    for view in (base.t().contiguous().t(), base.repeat_interleave(2, 1)[:, ::2], torch.stack([base, base])[1]):
        q, scale = _run(view, dtype)
        assert torch.equal(q.float(), expected[0].float())
        assert torch.equal(scale, expected[1])
    q, _ = _run(base[:1].expand(3, 80), dtype)
    assert torch.equal(q[2].float(), expected[0][0].float())


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("sizes", [(3, 5), (2, 1), (1, 4)])
def test_samples_that_lie_apart(device, dtype, sizes):
    samples, rows = sizes
    x = torch.randn(samples, rows + 4, 96, device=device)[:, 3 : 3 + rows, ::2]
    q, scale = (
        torch.empty(samples * rows, *shape, dtype=of, device=device)
        for shape, of in (((48,), dtype), ((), torch.float32))
    )
    quantize_rows(x, q, scale)
    expected = _run(x.reshape(-1, 48), dtype)
    assert torch.equal(q.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("dtype", TARGETS)
def test_strange_values(device, dtype):
    x = torch.randn(6, 33, device=device)
    x[0], x[1, 3], x[2, 4], x[3], x[4] = 0, torch.nan, -torch.inf, 1e-40, x[4] * 1e37
    q, scale = _run(x, dtype)
    assert (q[0].float() == 0).all()
    assert (q[3].float() * scale[3]).abs().max() < 1e-28
    assert scale[1].isnan()
    assert scale[2].isinf()
    assert scale[[0, 3, 4, 5]].isfinite().all()
    torch.testing.assert_close(q[4].float() * scale[4], x[4], rtol=0.07, atol=1e37 / 20)


def test_weight_scale_is_folded_in(device):
    x, weight_scale = torch.randn(3, 64, device=device), torch.tensor([0.25], device=device)
    plain, folded = _run(x, torch.int8), _run(x, torch.int8, weight_scale=weight_scale)
    assert torch.equal(plain[0], folded[0])
    torch.testing.assert_close(folded[1], plain[1] * 0.25)
