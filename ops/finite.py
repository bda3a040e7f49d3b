"""Finds what is no number (NaN, Inf) among stored weights and scales, about as fast as memory can be read."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

_CHUNK = 8 << 20
"""Bytes looked at in one call, twice: the second look finds them in the processor's cache, and between calls a thread waits for
Python's lock, for which the thread that loads has to wait in turn."""
_PIECE = 64 << 20
_MOST_THREADS = 16


@dataclass(frozen=True)
class FloatBits:
    """Where a dtype keeps NaN and Inf: read as integers, they are the largest of either sign.

    Attributes:
        unsigned: an integer of the same size, by its NumPy code.
        positive: the smallest bits of a positive NaN or Inf; None where there is none.
        negative: the same with the sign bit.
    """

    unsigned: str
    positive: int | None
    negative: int

    def any_not_finite(self, data: Any) -> bool:
        """Whether `data`, a NumPy array of the bytes of such numbers, holds one."""
        bits = data.view(self.unsigned)
        if bits.max(initial=0) >= self.negative:
            return True
        return self.positive is not None and bits.view(f"i{bits.itemsize}").max(initial=0) >= self.positive


FLOAT_BITS: Mapping[torch.dtype, FloatBits] = MappingProxyType(
    {
        torch.float8_e4m3fn: FloatBits("u1", 0x7F, 0xFF),
        torch.float8_e5m2: FloatBits("u1", 0x7C, 0xFC),
        torch.float8_e8m0fnu: FloatBits("u1", None, 0xFF),
        torch.float16: FloatBits("u2", 0x7C00, 0xFC00),
        torch.bfloat16: FloatBits("u2", 0x7F80, 0xFF80),
        torch.float32: FloatBits("u4", 0x7F800000, 0xFF800000),
        torch.float64: FloatBits("u8", 0x7FF0000000000000, 0xFFF0000000000000),
    }
)


class FiniteCheck:
    """Looks at tensors on threads of its own, beside whatever the caller does in the meantime; none is left of one that is dropped.

    Args:
        tensors: names and tensors in host memory; those of other dtypes than `FLOAT_BITS` are passed over.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # Half of them: loading and what comes after it work at the same time.
        threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lowbit-finite")
        self._looks = [self._pool.submit(_look, piece) for piece in _pieces(tensors)]
        self._pool.shutdown(wait=False)
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def first(self) -> str | None:
        """Wait, and name the first tensor that holds NaN or Inf; None where all are numbers. No thread is left."""
        try:
            return next((look.result()[0] for look in self._looks if look.result()[1]), None)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or Inf; None where all are numbers."""
    return FiniteCheck(tensors).first()


def _pieces(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, FloatBits, Any]]:
    for name, tensor in tensors:
        bits = FLOAT_BITS.get(tensor.dtype)
        # Text encoders store their causal mask, which is -Inf where a token must not look.
        if bits is None or tensor.numel() == 0 or "mask" in name.rpartition(".")[2]:
            continue
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, data.size, _PIECE):
            yield name, bits, data[start : start + _PIECE]


def _look(piece: tuple[str, FloatBits, Any]) -> tuple[str, bool]:
    name, bits, data = piece
    parts = (data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK))
    return name, any(bits.any_not_finite(part) for part in parts)
