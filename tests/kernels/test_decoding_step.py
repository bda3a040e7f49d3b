"""Claims about the kernels of a decoding step: each equals its plain-torch reference."""

from __future__ import annotations

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit.kernels import gather_prompt as gathering
from lowbit.kernels.attend_cache import attend_cache, attend_cache_reference
from lowbit.kernels.cache_heads import HeadNorms, _cache_heads_reference, cache_heads
from lowbit.kernels.evict_slot import evict_slot, evict_slot_reference
from lowbit.kernels.gate_rows import gate_rows
from lowbit.kernels.gather_prompt import gather_prompt, gather_prompt_reference
from lowbit.kernels.matvec_together import PLAIN, matvec_together
from lowbit.kernels.norm_rows import add_norm, add_norm_reference
from lowbit.kernels.quantize_rows import apply_activation
from lowbit.kernels.runtime import INTERPRETED
from lowbit.ops.layouts import register_layouts
from lowbit.text.linears import HeldLinears, Linear

from .stored import MAKERS

register_layouts()

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from(list(TOLERANCE))
DOT_DTYPES = st.sampled_from([torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
"""The interpreter has no products of bfloat16 tiles."""


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@given(DTYPES, st.integers(1, 300), st.booleans(), st.booleans())
@settings(max_examples=6)
def test_add_norm(dtype, width, has_branch, norms_branch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, branch = torch.randn(2, 1, width, device=device).to(dtype)
    weight, branch_weight = (1 + torch.randn(2, width, device=device) / 10).to(dtype)
    arguments = (x, branch if has_branch else None, branch_weight if norms_branch else None, weight, 1e-6)
    for actual, expected in zip(add_norm(*arguments), add_norm_reference(*arguments), strict=True):
        near(actual, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gate_rows(activation, dtype, device):
    gate, up = torch.randn(2, 1, 1300, device=device).to(dtype)
    gate[0, 0], gate[0, 1] = 30.0, -30.0
    near(gate_rows(gate, up, activation), apply_activation(gate, activation) * up)


@given(
    DTYPES,
    st.sampled_from([(4, 2, 32, 16), (7, 1, 40, 20), (6, 3, 48, 8), (2, 2, 24, 12)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
)
@settings(max_examples=6)
def test_cache_heads(dtype, sizes, norms_heads, norms_value, step):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, kv_heads, width, half = sizes
    q, k, v = (torch.randn(count, width, device=device).to(dtype) for count in (heads, kv_heads, kv_heads))
    angle = torch.rand(5, half, device=device) * 6
    weights = (1 + torch.randn(2, width, device=device) / 10).to(dtype) if norms_heads else (None, None)
    norms = HeadNorms(*weights, norms_value)
    slot = torch.randint(0, 9, (kv_heads if norms_value else 1,), device=device).expand(kv_heads)
    caches = torch.randn(2, kv_heads, 9, width, device=device).to(dtype)
    expected_caches = caches.clone()
    place = torch.tensor([step], device=device)
    tables = (angle.cos(), angle.sin())
    near(
        cache_heads(q, k, v, norms, *tables, place, slot, *caches),
        _cache_heads_reference(q, k, v, norms, *tables, place, slot, *expected_caches),
    )
    near(caches, expected_caches)
    # A layer that reads another one's cache writes nothing.
    before = caches.clone()
    near(
        cache_heads(q, None, None, norms, *tables, place, slot, *caches),
        _cache_heads_reference(q, None, None, norms, *tables, place, slot, *expected_caches),
    )
    assert torch.equal(before, caches)


@given(
    DOT_DTYPES,
    st.sampled_from([(4, 2, 32), (7, 1, 40), (20, 1, 16), (3, 3, 64)]),
    st.integers(1, 150),
    st.integers(0, 40),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=8)
def test_attend_cache_reads_what_is_filled(dtype, sizes, slots, start, step, gathers):
    """Slots that are not filled yet hold NaN: nothing of them may get through."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, kv_heads, width = sizes
    length = min(start + step + 1, slots)
    q = torch.randn(heads, width, device=device).to(dtype)
    caches = torch.randn(2, kv_heads, slots, width, device=device).to(dtype)
    caches[:, :, length:] = torch.nan
    scale = width**-0.5
    gathered = torch.rand(kv_heads, slots, device=device) if gathers else None
    expected, weights = attend_cache_reference(q, *caches, length, scale)
    before = None if gathered is None else gathered.clone()
    near(attend_cache(q, *caches, torch.tensor([step], device=device), start, scale, gathered), expected)
    if gathered is not None:
        before[:, :length] += weights
        torch.testing.assert_close(gathered, before, rtol=2e-3, atol=2e-3)


@given(
    DTYPES,
    st.sampled_from([(4, 2, 32), (3, 1, 20), (2, 2, 80)]),
    st.integers(1, 150),
    st.sampled_from([None, "causal", "window"]),
)
@example(torch.float32, (4, 2, 32), 130, "window")
@settings(max_examples=8)
def test_gather_prompt(dtype, sizes, count, masked):
    """Against the whole matrix of probabilities in float64; tokens first in memory, as core hands them over."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, kv_heads, width = sizes
    q = torch.randn(count, heads, width, device=device).to(dtype).transpose(0, 1)
    k = (3 * torch.randn(count, kv_heads, width, device=device)).to(dtype).transpose(0, 1)
    causal = torch.full((count, count), float("-inf"), device=device).triu_(1)
    window = causal + torch.full_like(causal, float("-inf")).tril_(-5) if masked == "window" else causal
    mask = None if masked is None else torch.nan_to_num(window, neginf=float("-inf"))[None, None].to(dtype)
    scores = q.double() @ k.double().repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * width**-0.5
    scores += causal.double() if mask is None else mask[0, 0].double()
    expected = scores.softmax(-1).sum(1).view(kv_heads, -1, count).sum(1).float()
    for gathers in (gather_prompt, gather_prompt_reference):
        torch.testing.assert_close(gathers(q, k, mask, width**-0.5), expected, rtol=2e-2, atol=2e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "_MOST_SCORES", 7 * heads * count)
        actual = gather_prompt_reference(q, k, mask, width**-0.5)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@given(
    DTYPES,
    st.sampled_from(["int8", "e4m3", PLAIN]),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([None, "row", "tensor"]),
    st.booleans(),
)
@example(torch.float32, "int8", [1, 2], 1, "row", False)
@settings(max_examples=15)
def test_matvec_together(dtype, kind, rows, columns, scaled, has_bias):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns *= 16
    x = torch.randn(1, columns, device=device).to(dtype)
    weights, scales, biases = [], [], []
    for count in rows:
        values = torch.randn(count, columns, device=device)
        stored = {"int8": (values * 40).clamp(-128, 127).to(torch.int8), "e4m3": values.to(torch.float8_e4m3fn)}
        weights.append(stored.get(kind, values.to(dtype)))
        sizes = {"row": count, "tensor": 1}
        scales.append(None if scaled is None or kind == PLAIN else torch.rand(sizes[scaled], device=device) + 0.1)
        biases.append(torch.randn(count, device=device).to(dtype) if has_bias else None)
    out = torch.full((1, sum(rows)), torch.nan, device=device).to(dtype)
    options = {"kind": kind, "assembly": not INTERPRETED}
    matvec_together(x, weights, scales, biases, out, **options)
    expected = [
        (x.float() @ weight.float().T) * (1.0 if scale is None else scale) + (0.0 if bias is None else bias.float())
        for weight, scale, bias in zip(weights, scales, biases, strict=True)
    ]
    size = torch.cat(expected, dim=1).abs().mean()
    near((out.float() / size).to(dtype), (torch.cat(expected, dim=1) / size).to(dtype))
    if len(rows) == 2 and rows[0] == rows[1]:
        out = torch.full((1, rows[0]), torch.nan, device=device).to(dtype)
        matvec_together(x, weights, scales, biases, out, gate="silu", **options)
        gate, up = (part.to(dtype) for part in expected)
        wanted = torch.nn.functional.silu(gate) * up
        near((out.float() / size**2).to(dtype), (wanted.float() / size**2).to(dtype))


@given(st.integers(1, 5), st.integers(2, 40), st.integers(1, 12), st.integers(0, 45), st.integers(0, 30))
@settings(max_examples=20)
def test_evict_slot(heads, slots, window, start, step):
    """A free slot while there is one; then the lightest token outside the window, and the first of equals."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window, start = min(window, slots - 1), min(start, slots)
    gathered = torch.randint(0, 4, (heads, slots), device=device).float()
    newest = torch.arange(slots, device=device) - slots + step
    born = torch.stack([newest[torch.randperm(slots, device=device)] for _ in range(heads)])
    twins = gathered.clone(), born.clone()
    place = torch.tensor([step], device=device)
    slot = evict_slot(gathered, born, place, start, window)
    assert slot.tolist() == evict_slot_reference(*twins, place, start, window).tolist()
    assert torch.equal(gathered, twins[0])
    assert torch.equal(born, twins[1])


@pytest.mark.parametrize("name", ["int8", "int8_tensor", "e4m3", "nvfp4", "e5m2", "int8_convrot", "mxfp8"])
def test_held_linears_of_any_kind_multiply_as_each_alone(name, device):
    """Together where a kernel takes them, else one by one; and act(first) * second."""
    layout, options = MAKERS[name]
    weights = [
        QuantizedTensor.from_float(torch.randn(count, 512, device=device), layout, **options) for count in (128, 128)
    ]
    x = torch.randn(1, 512, device=device).half()
    bias = torch.randn(128, device=device).half()
    linears = HeldLinears([Linear(weight, bias) for weight in weights])
    with comfy_kitchen.use_backend("eager"):  # its kernels have no float32
        plain = [weight.dequantize().float() for weight in weights]
    expected = [torch.nn.functional.linear(x.float(), weight, bias.float()) for weight in plain]
    for actual, wanted in zip(linears(x), expected, strict=True):
        torch.testing.assert_close(actual.float() / 20, wanted / 20, rtol=6e-3, atol=6e-3)
    wanted = torch.nn.functional.silu(expected[0]) * expected[1]
    torch.testing.assert_close(linears.gated(x, "silu").float() / 400, wanted / 400, rtol=6e-3, atol=6e-3)
