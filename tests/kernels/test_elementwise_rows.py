"""Modulation and the norms of heads: the kernels beside float64, in every layout that models hand them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lowbit.kernels.modulate_rows import modulate_rows
from lowbit.kernels.norm_heads import norm_heads

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}


def near(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor) -> None:
    """Rounded once: half a step of the number, and float32's own of what was added up."""
    assert got.shape == want.shape
    bound = want.abs() * HALF_STEP[got.dtype] * 1.01 + size * 2**-22 + 1e-7
    assert ((got.double() - want).abs() <= bound).all()


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 3),
    st.integers(1, 21),
    st.sampled_from([1, 7, 64, 1025, 2048]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_modulation_and_gate(dtype, batch, rows, columns, shared_base, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, columns, generator=generator).to(dtype)
    shift, factor = torch.randn(batch, 2, 1, columns, generator=generator).to(dtype).unbind(1)
    base = shift if shared_base else torch.randn(x.shape, generator=generator).to(dtype)
    got = modulate_rows(base, x, factor)
    assert got.dtype == dtype
    product = x.double() * factor.double()
    near(got, base.double() + product, base.double().abs() + product.abs())


def test_modulation_of_other_layouts_is_torchs_own():
    x = torch.randn(2, 6, 8)
    row, gate = torch.randn(2, 1, 8), torch.randn(1, 1, 8)
    for base, value, factor in (
        (x, x, gate),
        (x.transpose(1, 2), x.transpose(1, 2), torch.randn(2, 1, 6)),
        (row, x, x),
        (x, x, row.double().float().repeat(1, 1, 2)[..., ::2]),
        (row[0], x[0], gate[0]),
        (row[:, :0], x[:, :0], row),
    ):
        assert torch.equal(modulate_rows(base, value, factor), torch.addcmul(base, value, factor))


def test_modulation_carries_what_is_no_number():
    x, row = torch.randn(1, 9, 40), torch.randn(1, 1, 40)
    x[0, 3, 5], x[0, 8, 39] = float("nan"), float("inf")
    got = modulate_rows(row, x, row.abs() + 1)
    assert got.isnan().nonzero().tolist() == [[0, 3, 5]] and got.isinf().nonzero().tolist() == [[0, 8, 39]]


LAYOUTS = {
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "seen by heads": lambda x: x.transpose(1, 2),
    "of one product": lambda x: torch.cat([x, x, x], dim=-1).transpose(1, 2)[..., x.shape[-1] : 2 * x.shape[-1]],
    "rows": lambda x: x.flatten(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3)),
    st.sampled_from([1, 40, 64, 128, 256, 384]),
    st.integers(0, 2**31),
)
def test_norms_of_heads(layout, dtype, sizes, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(*sizes, columns, generator=generator).to(dtype))
    weight = torch.randn(columns, generator=generator).to(dtype)
    got = norm_heads(x, weight, 1e-6)
    assert got.dtype == dtype and got.is_contiguous()
    wide = x.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    near(got, want, want.abs() * 4)


def test_a_row_with_no_number_does_not_touch_the_others():
    x, weight = torch.randn(1, 2, 50, 128), torch.randn(128)
    x[0, 1, 7, 3] = float("nan")
    got = norm_heads(x, weight, 1e-6)
    assert got[0, 1, 7].isnan().all() and int(got.isnan().sum()) == 128


def test_norms_without_weight_or_eps_are_torchs_own():
    x = torch.randn(1, 2, 5, 128)
    assert torch.equal(norm_heads(x, None, 1e-6), F.rms_norm(x, (128,), None, 1e-6))
    assert torch.equal(norm_heads(x, torch.ones(128), None), F.rms_norm(x, (128,), torch.ones(128)))
