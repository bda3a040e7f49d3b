"""Checkpoints of real dimensions with random weights: written fast, quantized once, taken out of the page cache."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.cache import cached_path, quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import AUTO
from lowbit.ops.sampled_errors import sampled_errors
from testing.tiny.tensors import scale_and_shift

GIB = 1 << 30
CACHE = "lowbit_cache"
"""The pack's folder of quantized files, in the models folder."""

_POOL = (1 << 25) - 39
"""Values drawn once for all tensors: a prime number, so that the rows of a larger matrix do not repeat."""

_PIECE = 1 << 26


def write_checkpoint(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A safetensors file of bfloat16 Gaussian weights at the scale of a trained model's, unless it is there already.

    Matrices have variance 1 / fan-in, so that activations keep their size through the network and no product is of zeros.
    All tensors are cut from one pool of values, each from another place, scaled and shifted once per kind.
    extra: tensors that go in as they are, of uint8.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = dict(extra or {})
    pool = _Pool(max(math.prod(shape) for shape in shapes.values()))
    partial = path.with_suffix(".partial")
    with partial.open("wb", buffering=0) as file:
        _write(file, memoryview(_header(shapes, metadata or {}, extra)))
        for index, (name, shape) in enumerate(shapes.items()):
            for piece in pool.pieces(math.prod(shape), index, *scale_and_shift(name, shape)):
                _write(file, piece)
        for tensor in extra.values():
            _write(file, memoryview(tensor.numpy()))
    partial.rename(path)
    return path


def _write(file, data: memoryview) -> None:
    while data:
        data = data[file.write(data[:_PIECE]) :]


def _header(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], extra: Mapping[str, torch.Tensor]
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    sizes = [(name, "BF16", shape, 2) for name, shape in shapes.items()]
    sizes += [(name, "U8", tuple(tensor.shape), 1) for name, tensor in extra.items()]
    for name, dtype, shape, width in sizes:
        end = position + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Pool:
    """Gaussian values as bfloat16 bytes, one copy for each scale and shift."""

    def __init__(self, largest: int):
        self._values = torch.randn(min(_POOL, largest), generator=torch.Generator().manual_seed(0))
        self._bytes: dict[tuple[float, float], memoryview] = {}

    def pieces(self, count: int, index: int, scale: float, shift: float) -> Iterator[memoryview]:
        """`count` values in pieces, the first from a place of the tensor's own."""
        key = (scale, shift)
        if key not in self._bytes:
            scaled = (self._values * scale + shift).bfloat16()
            self._bytes[key] = memoryview(scaled.view(torch.uint8).numpy())
        start = index * 7919 % max(1, len(self._values) // 2)
        while count:
            part = self._bytes[key][2 * start : 2 * (start + count)]
            yield part
            count, start = count - len(part) // 2, 0


def second_name(path: Path, other: Path) -> Path:
    """The same file under another name: two models of one size without the disk for both."""
    if not path.exists():
        os.link(other, path)
    return path


def quantize(path: Path, cache: Path) -> float | None:
    """Makes what `auto` will load instead of `path`, as the loader would.

    Returns:
        Seconds; None when it is there, or would not be made.
    """
    checkpoint = open_checkpoint(path)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    measure = partial(sampled_errors, device=where, folder=cache)
    plan = FormatChooser(checkpoint, device_info(), None, measure).choose(AUTO).plan
    if not plan.changes_weights:
        return None
    target = cached_path(checkpoint, plan, cache)
    if target.exists():
        return None
    started = time.monotonic()
    quantized_file(checkpoint, plan, cache, device=where)
    if where == "cuda":
        torch.cuda.empty_cache()
    return time.monotonic() - started


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """The next read of these files comes from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
