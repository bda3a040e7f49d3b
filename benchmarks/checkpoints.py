"""Checkpoints of real dimensions with random weights: written fast, quantized once, taken out of the page cache."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from lowbit.ops.auto_format import FormatChooser
from lowbit.ops.cache import cached_path, quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import AUTO
from lowbit.ops.sampled_errors import sampled_errors
from lowbit.ops.writer import CheckpointWriter, names_nbytes
from testing.tiny.tensors import scale_and_shift

GIB = 1 << 30
CACHE = "lowbit_cache"
"""The pack's folder of quantized files, in the models folder."""

_POOL = (1 << 25) - 39
"""Values drawn once for all tensors: a prime number, so that the rows of a larger matrix do not repeat."""


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
    if not path.exists():
        extra = dict(extra or {})
        pool = _Pool(max(math.prod(shape) for shape in shapes.values()))
        names = [*shapes, *extra]
        with CheckpointWriter(
            path, name_bytes=names_nbytes(names), name_count=len(names), metadata=metadata or {}
        ) as writer:
            for index, (name, shape) in enumerate(shapes.items()):
                writer.add(name, pool.tensor(shape, index, *scale_and_shift(name, shape)))
            for name, tensor in extra.items():
                writer.add(name, tensor)
    return path


class _Pool:
    """Gaussian values as bfloat16, one copy for each scale and shift."""

    def __init__(self, largest: int):
        self._values = torch.randn(min(_POOL, largest), generator=torch.Generator().manual_seed(0))
        self._scaled: dict[tuple[float, float], torch.Tensor] = {}

    def tensor(self, shape: tuple[int, ...], index: int, scale: float, shift: float) -> torch.Tensor:
        """Values from a place of the tensor's own on, and from the beginning as often as they are needed."""
        if (scale, shift) not in self._scaled:
            self._scaled[scale, shift] = (self._values * scale + shift).bfloat16()
        values, count = self._scaled[scale, shift], math.prod(shape)
        first = values[index * 7919 % max(1, len(values) // 2) :][:count]
        rest = count - len(first)
        return torch.cat([first, *[values] * (rest // len(values)), values[: rest % len(values)]]).view(shape)


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
