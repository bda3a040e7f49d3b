"""8-bit attention: the quantizers and the kernel against float64 and against their reference; shapes, strides, masks, strange values."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import lowbit.attention.int8  # noqa: F401  (registers the operator)
from lowbit.kernels import attention_quantize
from lowbit.kernels.attention_hopper import QUERY_BLOCK, attend_hopper, can_copy_in_bulk
from lowbit.kernels.attention_int8 import AttentionTiles, attend_int8, tiles_for
from lowbit.kernels.attention_quantize import KEY_BLOCK, key_order, quantize_attention
from lowbit.kernels.runtime import GLUON_FOUND, INTERPRETED, compute_capability

from .references import attention_int8_reference

ON_HOPPER = GLUON_FOUND and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
KERNELS = ("any GPU", "hopper") if ON_HOPPER else ("any GPU",)
SMALL = AttentionTiles(64, 64, 4, 2)
LIMITS = {True: 4e-2, False: 1.3e-2}


def _values(device) -> list[bool]:
    fp8 = INTERPRETED or compute_capability(device.index or 0) >= (8, 9)
    return [True, False] if fp8 else [False]


def exact(q, k, v, mask=None, scale=None):
    """Attention and its log-sum-exp in float64; zeros and minus infinity where no key counts."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        v = torch.where(mask[:, None, :, None], v, 0.0)
        scores = torch.where(mask[:, None, None, :], scores, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def _attend(kernel, q, k, v, mask=None, scale=None, fp8=True, tiles=SMALL, lse=False):
    """The kernels' attention, and its log-sum-exp when asked for."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    batch, heads, queries, head_dim = q.shape
    rows = QUERY_BLOCK if kernel == "hopper" else tiles.rows
    quantized = quantize_attention(q, k, v, mask, scale, rows, fp8, shift=lse)
    if mask is not None and not fp8:
        v = v.masked_fill(~mask[:, None, :, None], 0)
    out = torch.full((batch, queries, heads, head_dim), torch.nan, dtype=q.dtype, device=q.device).transpose(1, 2)
    sums = torch.full((batch, heads, queries), torch.nan, device=q.device) if lse else None
    if kernel == "hopper":
        attend_hopper(quantized, v if fp8 or can_copy_in_bulk(v) else v.contiguous(), mask, out, sums)
    else:
        attend_int8(quantized, v, mask, out, sums, tiles)
    return (out, sums) if lse else out


@pytest.fixture(scope="module", params=KERNELS)
def attend(request):
    """Each kernel that runs here."""
    return functools.partial(_attend, request.param)


def apart(out, want) -> float:
    """The relative error; NaN is infinitely far."""
    return ((out.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).nan_to_num(torch.inf).item()


def qkv(device, batch=1, heads=2, kv_heads=2, queries=70, keys=150, head_dim=64, dtype=torch.bfloat16):
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, n, length, head_dim, device=device).to(dtype) for n, length in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 128), (2, 1, 80)])
def test_is_attention(device, attend, dtype, heads, kv_heads, head_dim):
    q, k, v = qkv(device, 2, heads, kv_heads, 70, 200, head_dim, dtype)
    want, want_lse = exact(q, k, v)
    for fp8 in _values(device):
        out, lse = attend(q, k, v, fp8=fp8, lse=True)
        assert apart(out, want) < LIMITS[fp8]
        # Over several blocks the weights are rounded against other maxima than the last.
        reference = attention_int8_reference(q, k, v, None, head_dim**-0.5, fp8)
        assert apart(out, reference) < (4e-2 if fp8 else 4e-3)
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=3e-2)


def test_equals_its_reference_over_one_block(device, attend):
    q, k, v = qkv(device, keys=60)
    mask = torch.rand(1, 60, device=device) < 0.8
    for fp8 in _values(device):
        for each in (None, mask):
            assert apart(attend(q, k, v, each, fp8=fp8), attention_int8_reference(q, k, v, each, 0.125, fp8)) < 4e-3


@settings(max_examples=8)
@given(
    queries=st.integers(1, 130),
    keys=st.integers(1, 270),
    head_dim=st.sampled_from([64, 80]),
    group=st.integers(1, 3),
    masked=st.booleans(),
    fp8=st.booleans(),
    scale=st.sampled_from([None, 0.0, 0.3, -0.2]),
    rows=st.sampled_from([64, 128]),
)
def test_any_shape(device, attend, queries, keys, head_dim, group, masked, fp8, scale, rows):
    q, k, v = qkv(device, 2, 2 * group, 2, queries, keys, head_dim)
    mask = torch.rand(2, keys, device=device) < 0.6 if masked else None
    fp8 = fp8 and True in _values(device)
    out, lse = attend(q, k, v, mask, scale, fp8, AttentionTiles(rows, 64, 4, 2), lse=True)
    want, want_lse = exact(q, k, v, mask, scale)
    # One key's values alone are rounded to three bits: 6 % at most.
    assert apart(out, want) < (6.5e-2 if fp8 else 3e-2)
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    assert (lse - want_lse).nan_to_num(0.0).abs().max() < 0.2


@pytest.mark.parametrize("fp8", [True, False])
def test_outliers_and_an_offset_stay_within_the_budget(device, attend, fp8):
    if fp8 not in _values(device):
        pytest.skip("this GPU has no FP8")
    q, k, v = qkv(device, 1, 1, 1, 64, 1000, 128)
    q[..., [3, 40, 77]] *= 6
    k[..., [3, 40, 77]] *= 6
    k += 3 * torch.randn(128, device=device).bfloat16()
    want, _ = exact(q, k, v)
    assert apart(attend(q, k, v, fp8=fp8, tiles=AttentionTiles(64, 128, 4, 2)), want) < (5e-2 if fp8 else 2e-2)


def test_short_sums_of_many_keys_lose_nothing(device, attend):
    """Values with a mean: Hopper's FP8 sums would lose a fifth of it over thousands of keys."""
    q, k, v = qkv(device, 1, 1, 1, 64, 1024 if INTERPRETED else 40_000, 64)
    v += 0.5
    for fp8 in _values(device):
        assert apart(attend(q, k, v, fp8=fp8, tiles=AttentionTiles(64, 128, 4, 2)), exact(q, k, v)[0]) < 3e-2


@pytest.mark.parametrize("fp8", [True, False])
def test_masked_keys_are_not_there(device, attend, fp8):
    """Whatever lies in them, NaN too; and a batch without any key gives zeros."""
    if fp8 not in _values(device):
        pytest.skip("this GPU has no FP8")
    q, k, v = qkv(device, 3)
    mask = torch.rand(3, 150, device=device) < 0.5
    mask[1], mask[2, :129] = False, False
    want, want_lse = exact(q, k, v, mask)
    k[~mask[:, None].expand(3, 2, 150)] = torch.nan
    v[~mask[:, None].expand(3, 2, 150)] = torch.inf
    out, lse = attend(q, k, v, mask, fp8=fp8, lse=True)
    assert apart(out, want) < LIMITS[fp8]
    assert (out[1] == 0).all()
    assert lse[1].isneginf().all()
    torch.testing.assert_close(lse[0::2].double(), want_lse[0::2], rtol=0, atol=5e-2)


def test_one_mask_for_every_batch(device, attend):
    q, k, v = qkv(device, 2)
    mask = torch.rand(1, 150, device=device) < 0.5
    for fp8 in _values(device):
        assert torch.equal(attend(q, k, v, mask, fp8=fp8), attend(q, k, v, mask.repeat(2, 1), fp8=fp8))


def test_any_strides(device, attend):
    q, k, v = qkv(device, 1, 2, 2, 40, 70, 64)
    for fp8 in _values(device):
        want = attend(q, k, v, fp8=fp8)
        tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert torch.equal(attend(*tokens_first, fp8=fp8), want)
        apart_dims = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        assert torch.equal(attend(*apart_dims, fp8=fp8), want)
        odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v)]
        assert torch.equal(attend(*odd, fp8=fp8), want)
        one = (k[:, :1].expand_as(k), v[:, :1].expand_as(v))
        assert torch.equal(attend(q, *one, fp8=fp8), attend(q, *(x.contiguous() for x in one), fp8=fp8))
        assert torch.equal(attend(q, *(x[:, :1] for x in one), fp8=fp8), attend(q, *one, fp8=fp8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-40, 1e-7, 6e4, 3e38])
def test_finite_inputs_give_finite_outputs(device, attend, dtype, size):
    most = torch.finfo(dtype).max
    for fp8 in _values(device):
        q, k, v = (
            (x.sign() * min(size, most) * (x.abs() > 0.1)).to(dtype)
            for x in qkv(device, 1, 1, 1, 20, 140, 64, torch.float32)
        )
        out, lse = attend(q, k, v, fp8=fp8, lse=True)
        assert out.isfinite().all()
        assert size > 1e30 or not lse.isnan().any()
        # Weights are rounded to e4m3, and what they are divided by is not.
        assert out.abs().max().double() <= v.abs().max().double() * 1.07


def test_float16_values_of_any_size(device, attend):
    q, k, v = qkv(device, dtype=torch.float16)
    v = (v * 1e4).clamp(-65504, 65504)
    v[..., 0] = 65504
    for fp8 in _values(device):
        out = attend(q, k, v, fp8=fp8)
        assert apart(out, exact(q, k, v)[0]) < LIMITS[fp8]


def test_a_strange_key_that_counts_is_seen(device, attend):
    q, k, v = qkv(device)
    k[0, 0, 3, 5] = torch.nan
    for fp8 in _values(device):
        out = attend(q, k, v, fp8=fp8)
        assert out[:, 0].isnan().all()
        assert out[:, 1].isfinite().all()


def test_the_order_of_the_values_is_that_of_the_products(device):
    """Within 16 positions: result columns 2q, 2q+1 and 2q+8, 2q+9 are neighbours in an 8-bit operand."""
    order = key_order(torch.arange(32))
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert order.sort().values.equal(torch.arange(32))
    assert order[16:].equal(order[:16] + 16)
    _, k, v = qkv(device, keys=KEY_BLOCK)
    codes = quantize_attention(k, k, v, None, 1.0, 64, True)
    back = torch.empty_like(codes.v.float())
    back[..., key_order(torch.arange(KEY_BLOCK, device=device))] = codes.v.float()
    back = (back * codes.v_scale[..., None]).transpose(1, 2).view_as(v)
    torch.testing.assert_close(back, v.float(), rtol=0.07, atol=1e-3)


def test_the_rotation_is_one(device):
    for size in (64, 128):
        matrix = attention_quantize.sylvester(size, torch.device("cpu"), torch.float32) * size**0.5
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))


def test_every_capability_has_tiles():
    assert tiles_for((9, 0), True) != tiles_for((9, 0), False)
    assert tiles_for((8, 9), True) == tiles_for((8, 6), True)
    assert tiles_for((12, 1), True) == tiles_for((12, 0), True)
    for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        for fp8 in (True, False):
            assert KEY_BLOCK % tiles_for(capability, fp8).keys == 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_and_its_shape_agree(device, masked):
    """torch.compile plans with the shape and the strides that the fake gives."""
    q, k, v = qkv(device, 2, 4, 2, 20, 70, 80)
    mask = torch.rand(2, 70, device=device) < 0.5 if masked else None
    arguments = (q, k, v, mask, None, False)
    out = torch.ops.lowbit.int8_attention(*arguments)
    assert apart(out, exact(q, k, v, mask)[0]) < LIMITS[False]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = torch.ops.lowbit.int8_attention(*fakes)
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert out.transpose(1, 2).is_contiguous(), "merging the heads afterwards costs nothing"
