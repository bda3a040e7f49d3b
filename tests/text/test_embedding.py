"""Claims about looking tokens up: the rows of the whole table, whatever it is stored in."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.formats import find_format
from lowbit.ops.quantize import quantize_to_tensor
from lowbit.text.embedding import embedded

TOKENS = torch.tensor([7, 0, 36, 7])


@pytest.mark.parametrize("name", ["fp8_e4m3fn_scaled", "fp8_e5m2", "int8", "int8_convrot_fast", "fp4_scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_table(name, dtype):
    table = quantize_to_tensor(torch.randn(37, 256), find_format(name))
    rows = embedded(table, TOKENS, dtype)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, table.dequantize()[TOKENS].to(dtype), rtol=1e-2, atol=1e-5)


def test_a_plain_table_gives_its_own_dtype_but_for_8_bits():
    table = torch.randn(37, 5)
    for stored, dtype in ((torch.float16, torch.float16), (torch.float8_e5m2, torch.bfloat16)):
        rows = embedded(table.to(stored), TOKENS, torch.bfloat16)
        assert rows.dtype == dtype
        assert torch.equal(rows, table.to(stored)[TOKENS].to(dtype))
