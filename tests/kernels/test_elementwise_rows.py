"""Modulation, norms, rotary embeddings and joined heads: the kernels beside float64, in every layout that models hand them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels import modulate_rows as modulate_rows_module
from lowbit.kernels import rope as rope_module
from lowbit.kernels.join_heads import join_heads
from lowbit.kernels.modulate_rows import modulate_rows
from lowbit.kernels.normalize import normalize
from lowbit.kernels.rope import rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(batch, rows, columns, generator=generator, device=DEVICE).to(dtype)
    shift, factor = torch.randn(batch, 2, 1, columns, generator=generator, device=DEVICE).to(dtype).unbind(1)
    base = shift if shared_base else torch.randn(x.shape, generator=generator, device=DEVICE).to(dtype)
    got = modulate_rows(base, x, factor)
    assert got.dtype == dtype
    product = x.double() * factor.double()
    near(got, base.double() + product, base.double().abs() + product.abs())


def test_modulation_of_other_layouts_is_torchs_own():
    x = torch.randn(2, 6, 8, device=DEVICE)
    row, gate = torch.randn(2, 1, 8, device=DEVICE), torch.randn(1, 1, 8, device=DEVICE)
    for base, value, factor in (
        (x, x, gate),
        (x.transpose(1, 2), x.transpose(1, 2), torch.randn(2, 1, 6, device=DEVICE)),
        (row, x, x),
        (x, x, row.double().float().repeat(1, 1, 2)[..., ::2]),
        (row[0], x[0], gate[0]),
        (row[:, :0], x[:, :0], row),
        (row.double() / 3, x.double() / 3, row.double() / 7),
    ):
        assert torch.equal(modulate_rows(base, value, factor), torch.addcmul(base, value, factor))


@pytest.mark.parametrize("sizes", [(1, 300_000, 8), (70_000, 1, 8)])
def test_launches_stay_in_the_bounds_of_a_grid(monkeypatch, sizes):
    """CUDA has 65,535 programs along the second axis and the third."""
    grids = []
    monkeypatch.setattr(modulate_rows_module, "launch", lambda kernel, grid, *_: grids.append(grid))
    monkeypatch.setattr(rope_module, "launch", lambda kernel, grid, *_: grids.append(grid))
    x = torch.zeros(sizes, dtype=torch.float16, device=DEVICE)
    modulate_rows(x, x, x[:, :1])
    rope(x[:, None], torch.zeros(1, 1, sizes[1], 4, 2, 2, device=DEVICE))
    assert all(second <= 65535 and third <= 65535 for _, second, third in grids)


def test_modulation_carries_what_is_no_number():
    x, row = torch.randn(1, 9, 40, device=DEVICE), torch.randn(1, 1, 40, device=DEVICE)
    x[0, 3, 5], x[0, 8, 39] = float("nan"), float("inf")
    got = modulate_rows(row, x, row.abs() + 1)
    assert got.isnan().nonzero().tolist() == [[0, 3, 5]]
    assert got.isinf().nonzero().tolist() == [[0, 8, 39]]


LAYOUTS = {
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "seen by heads": lambda x: x.transpose(1, 2),
    "of one product": lambda x: torch.cat([x, x, x], dim=-1).transpose(1, 2)[..., x.shape[-1] : 2 * x.shape[-1]],
    "rows": lambda x: x.flatten(0, 2),
}
PARTS = st.sampled_from([(), ("weight",), ("weight", "bias")])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("centered", [True, False])
@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3)),
    st.sampled_from([1, 40, 64, 128, 256, 384, 1030]),
    PARTS,
    st.integers(0, 2**31),
)
def test_norms(centered, layout, dtype, sizes, columns, parts, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(*sizes, columns, generator=generator, device=DEVICE).add_(0.5).to(dtype))
    weight, bias = torch.randn(2, columns, generator=generator, device=DEVICE).to(dtype)
    weight, bias = weight if "weight" in parts else None, bias if "bias" in parts and centered else None
    got = normalize(x, weight, bias, 1e-3, centered=centered)
    assert got.dtype == dtype
    assert got.is_contiguous()
    wide = x.double() - (x.double().mean(-1, keepdim=True) if centered else 0)
    scale = (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    want = wide * scale * (1 if weight is None else weight.double())
    size = want.abs() + 8 * scale * (x.double().abs().amax(-1, keepdim=True) if centered else 0)
    near(
        got,
        want + (0 if bias is None else bias.double()),
        size * (1 if weight is None else 1 + weight.double().abs()) * 4,
    )


@pytest.mark.parametrize("centered", [True, False])
def test_a_row_with_no_number_does_not_touch_the_others(centered):
    x, weight = torch.randn(1, 2, 50, 128, device=DEVICE), torch.randn(128, device=DEVICE)
    x[0, 1, 7, 3] = float("nan")
    got = normalize(x, weight, None, 1e-6, centered=centered)
    assert got[0, 1, 7].isnan().all()
    assert int(got.isnan().sum()) == 128


def test_norms_of_other_kinds_are_torchs_own():
    x, ones, apart = (
        torch.randn(1, 2, 5, 128, device=DEVICE),
        torch.ones(128, device=DEVICE),
        torch.randn(256, device=DEVICE)[::2],
    )
    assert torch.equal(normalize(x, ones, None, None, centered=False), F.rms_norm(x, (128,), ones))
    assert torch.equal(normalize(x, apart, ones, 1e-6, centered=True), F.layer_norm(x, (128,), apart, ones, 1e-6))
    assert torch.equal(
        normalize(x.double(), None, None, 1e-6, centered=True), F.layer_norm(x.double(), (128,), eps=1e-6)
    )
    assert normalize(x[:, :, :0], None, None, 1e-6, centered=True).shape == (1, 2, 0, 128)


def frequencies(layout: str, batch: int, length: int, pairs: int, generator: torch.Generator) -> torch.Tensor:
    freqs = torch.randn(batch, length, pairs, 2, 2, generator=generator, device=DEVICE)
    return freqs.unsqueeze(1 if layout == "heads first" else 2)


@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 11)),
    st.booleans(),
    st.sampled_from([1, 20, 32, 64]),
    st.integers(0, 2**31),
)
def test_rotary_embeddings(layout, dtype, freqs_dtype, sizes, shared, pairs, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    batch, length, _ = sizes
    x = torch.randn(*sizes, 2 * pairs, generator=generator, device=DEVICE).to(dtype)
    x = x.transpose(1, 2) if layout == "heads first" else x
    freqs = frequencies(layout, 1 if shared else batch, length, pairs, generator).to(freqs_dtype)
    # One program turns a position of all heads and samples, where that leaves programs enough.
    rope_module.rope_launch.cache_clear()
    with mock.patch.object(rope_module, "_ENOUGH", seed % 2 * 2048):
        got = rope(x, freqs)
    assert got.dtype == dtype
    assert got.is_contiguous()
    pair = x.double().unflatten(-1, (-1, 1, 2))
    parts = freqs.double() * pair
    near(got, parts.sum(-1).flatten(-2), parts.abs().sum(-1).flatten(-2))


def test_rotary_embeddings_of_other_shapes_are_not_ours():
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, freqs = torch.randn(2, 6, 5, 16, device=DEVICE), frequencies("heads first", 1, 5, 8, generator)
    assert rope(x, freqs) is not None
    for other, of in (
        (x, freqs[:, :, :4]),
        (x, freqs.expand(2, 6, -1, -1, -1, -1)),
        (x[..., :8], freqs),
        (x[..., ::2], freqs[..., :4, :, :]),
        (x[0], freqs[0]),
        (x, freqs.transpose(-1, -2)),
        (x.long(), freqs),
        (x.double(), freqs),
        (x, freqs.double()),
        (x, torch.cat([freqs, freqs, freqs])),
    ):
        assert rope(other, of) is None


def test_rotary_embeddings_of_heads_far_apart():
    """Their places do not fit into 32 bits, each head's distance from the next does."""
    heads, apart, length = 3, 3 << 29, 2
    x = torch.empty(heads * apart, dtype=torch.float16, device=DEVICE)
    x = x.as_strided((1, heads, length, 4), (0, apart, 4, 1)).copy_(torch.randn(1, heads, length, 4))
    freqs = frequencies("heads first", 1, length, 2, torch.Generator(DEVICE).manual_seed(0))
    assert torch.equal(rope(x, freqs), rope(x.contiguous(), freqs))


@pytest.mark.parametrize("layout", ["contiguous", "seen by heads", "of one product"])
@settings(max_examples=25)
@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 3)),
    st.sampled_from([1, 40, 64, 128, 5000]),
    st.integers(0, 2**31),
)
def test_joined_heads(layout, dtype, sizes, columns, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    batch, first, second, heads = sizes
    parts = [
        LAYOUTS[layout](torch.randn(batch, length, heads, columns, generator=generator, device=DEVICE).to(dtype))
        for length in (first, second)
    ]
    parts[0][0, 0, 0, 0] = float("nan")
    got = join_heads(*parts)
    assert got.is_contiguous()
    assert torch.equal(got.nan_to_num(7), torch.cat(parts, dim=2).nan_to_num(7))


def test_heads_of_other_kinds_are_joined_by_torch():
    x = torch.randn(2, 3, 5, 8, device=DEVICE)
    for first, second in ((x, x.double()), (x[..., ::2], x[..., :4]), (x[:, :, :0], x), (x.int(), x.int())):
        got, want = join_heads(first, second), torch.cat((first, second), dim=2)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        join_heads(x, x[..., :4])
