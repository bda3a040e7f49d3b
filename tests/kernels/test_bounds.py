"""No kernel reads or writes outside its tensors: in the interpreter, where every one of them ends at a page of its own.

On a GPU compute-sanitizer looks at the same calls (tests/gpu/memcheck.py).
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.kernels.attention_int8 import AttentionTiles, attend_int8
from lowbit.kernels.attention_quantize import quantize_attention
from lowbit.kernels.runtime import INTERPRETED
from lowbit.ops.linear_table import REFERENCE, Gpu, choose_path
from lowbit.ops.scratch import Cut, Scratch

from .guarded import guarded
from .products import multiply
from .stored import ROTATED, UNROTATED, make

if not INTERPRETED:
    pytest.skip("the interpreter reads the addresses that a kernel asks for", allow_module_level=True)

SIZES = [(24, 256), (33, 80), (132, 320)]
ROWS = ((1, torch.float16), (2, torch.float32), (17, torch.float16), (70, torch.float16))
HOPPER = Gpu((9, 0), triton=True, kitchen=False)


@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("name", [*UNROTATED, *ROTATED])
def test_products_stay_inside_their_tensors(name, at, monkeypatch):
    def take(scratch, specs, device):
        return Cut(tuple(spec and guarded(torch.zeros(spec[0], dtype=spec[1]), at) for spec in specs), [])

    def new_empty(like, shape, **options):
        # The interpreter's own have a device.
        return plain_empty(like, shape, **options) if options else guarded(torch.zeros(shape, dtype=like.dtype), at)

    plain_empty = torch.Tensor.new_empty
    monkeypatch.setattr(Scratch, "take", take)
    # In front of a tensor a kernel comes by steps back between blocks: there the size of several is looked at.
    for count, columns in SIZES[:1] if name in ROTATED else SIZES[-1:] if at == "start" else SIZES:
        weight = make(name, count, columns, torch.device("cpu"))
        fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
        tensors = {key: guarded(value, at) for key, value in fields.items() if isinstance(value, torch.Tensor)}
        weight = dataclasses.replace(weight, **tensors)
        bias = guarded(torch.randn(count), at)
        for rows, dtype in ROWS:
            paths = {choose_path(weight.kind, fast, rows, count, columns, dtype, HOPPER) for fast in (False, True)}
            for path in paths - {REFERENCE}:
                x = guarded(torch.randn(rows, columns, dtype=dtype), at)
                with monkeypatch.context() as patched:
                    patched.setattr(torch.Tensor, "new_empty", new_empty)
                    out = multiply(path, x, weight, bias, None, HOPPER)
                assert out.isfinite().all()


@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("fp8_values", [False, True])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "masked"), [(1, 1, 64, True), (70, 130, 80, False)])
def test_attention_stays_inside_its_tensors(queries, keys, head_dim, masked, fp8_values, at, monkeypatch):
    def empty(*shape, dtype=None, **options):
        return guarded(plain_empty(*shape, dtype=dtype, **options).zero_(), at)

    plain_empty = torch.empty
    q, k, v = (guarded(torch.randn(1, 1, n, head_dim).half(), at) for n in (queries, keys, keys))
    mask = guarded(torch.ones(1, keys, dtype=torch.bool), at) if masked else None
    out, lse = guarded(torch.zeros_like(q), at), guarded(torch.zeros(1, 1, queries), at)
    tiles = AttentionTiles(64, 64, 4, 2)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        quantized = quantize_attention(q, k, v, mask, 0.1, tiles.rows, fp8_values, shift=True)
    attend_int8(quantized, v, mask, out, lse, tiles)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_a_read_past_the_end_is_noticed():
    """The fence holds: else the tests above could not fail."""
    for place, at in (("[-1:]", "end"), ("[:1]", "start")):
        program = (
            "import ctypes, torch\n"
            "from guarded import guarded\n"
            f"t = guarded(torch.arange(1000, dtype=torch.uint8), {at!r}){place}\n"
            f"ctypes.string_at(t.data_ptr() - {16 if at == 'start' else 0}, 32)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, check=False
        )
        assert done.returncode < 0, (at, done.stderr[-500:])
