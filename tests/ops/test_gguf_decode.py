"""Every block format of GGUF decodes to what the `gguf` package makes of the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.ops.gguf_decode import DECODERS, decode

gguf = pytest.importorskip("gguf")
NAMES = sorted({item.name for item in gguf.quants._type_traits})


def raw_blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Random bytes, among them scales that are infinite or no number."""
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return np.random.default_rng(seed).integers(0, 256, (count, nbytes), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf.quants")  # of scales that are no numbers
@pytest.mark.parametrize("name", NAMES)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_numbers_are_the_packages_own(name, count, seed):
    kind = gguf.GGMLQuantizationType[name]
    values, _ = gguf.GGML_QUANT_SIZES[kind]
    raw = raw_blocks(name, count, seed)
    want = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(raw, kind))).float()
    got = decode(torch.from_numpy(raw), name, (count, values))
    torch.testing.assert_close(got, want.view(count, values), rtol=0, atol=0, equal_nan=True)


def test_formats_that_are_decoded_here_are_the_packages():
    assert set(DECODERS) <= set(NAMES)
