"""Finds what is no number (NaN, Inf) among stored weights and scales, about as fast as memory can be read."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

_CHUNK = 8 << 20
"""Bytes looked at in one call, twice: the second look finds them in the processor's cache, and between calls a thread waits for
Python's lock, for which the thread that loads has to wait in turn."""
_PIECE = 64 << 20
_SMALL = 64 << 10
"""Bytes of a tensor up to which it is looked at with others: a model has hundreds of biases and scales."""
MOST_THREADS = 16


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


@dataclass(frozen=True)
class _Piece:
    """Part of a large tensor, or many small ones.

    Attributes:
        bits: of their dtype.
        members: the place among all tensors and the name of each.
        data: each one's bytes, (N,) uint8.
    """

    bits: FloatBits
    members: tuple[tuple[int, str], ...]
    data: tuple[torch.Tensor, ...]


class FiniteCheck:
    """Looks at tensors on threads of its own, beside whatever the caller does in the meantime; one that is dropped looks no further.

    Args:
        tensors: names and tensors in host memory, asked for on those threads; other dtypes than `FLOAT_BITS` are passed over.
        threads: at most, until the caller waits; never more than half of the processor's, since the caller works as well.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], threads: int = MOST_THREADS) -> None:
        self._most = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._pieces = _Shared(_pieces(tensors))
        self._looks: list[Future[list[tuple[int, str]]]] = []
        self._look_on(min(threads, self._most))
        weakref.finalize(self, self._pieces.stop)

    @property
    def answered(self) -> bool:
        """Whether `first` does not wait."""
        return all(look.done() for look in self._looks)

    def first(self) -> str | None:
        """Wait, and name the first tensor that holds NaN or Inf; None where all are numbers."""
        if not self.answered:
            self._look_on(self._most - len(self._looks))
        return min((found for look in self._looks for found in look.result()), default=(0, None))[1]

    def _look_on(self, threads: int) -> None:
        for _ in range(threads):
            look: Future[list[tuple[int, str]]] = Future()
            self._looks.append(look)
            threading.Thread(target=_answer, args=(look, self._pieces), name="lowbit-finite").start()


def _answer(look: Future[list[tuple[int, str]]], pieces: _Shared) -> None:
    try:
        look.set_result(_look_at_all(pieces))
    except Exception as error:  # noqa: BLE001  # for whoever waits
        look.set_exception(error)


class _Shared:
    """Pieces that several threads take from."""

    def __init__(self, pieces: Iterator[_Piece]) -> None:
        self._pieces = pieces
        self._taking = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[_Piece]:
        while (piece := self._take()) is not None:
            yield piece

    def stop(self) -> None:
        """No further piece is given."""
        self._stopped = True

    def _take(self) -> _Piece | None:
        with self._taking:
            # The end of a process waits for its threads.
            if not threading.main_thread().is_alive():
                raise InterruptedError("Python ends before all tensors were looked at.")
            return None if self._stopped else next(self._pieces, None)


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of `tensors` that holds NaN or Inf; None where all are numbers."""
    tensors = list(tensors)
    if sum(tensor.nbytes for _, tensor in tensors) > _PIECE:
        return FiniteCheck(tensors).first()
    return min(_look_at_all(_pieces(tensors)), default=(0, None))[1]


def _pieces(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[_Piece]:
    small: dict[FloatBits, list[tuple[tuple[int, str], torch.Tensor]]] = {}
    for place, (name, tensor) in enumerate(tensors):
        bits = FLOAT_BITS.get(tensor.dtype)
        # Text encoders store their causal mask, which is -Inf where a token must not look.
        if bits is None or tensor.numel() == 0 or "mask" in name.rpartition(".")[2]:
            continue
        data = tensor.detach().reshape(-1).view(torch.uint8)
        if data.numel() <= _SMALL:
            small.setdefault(bits, []).append(((place, name), data))
        else:
            yield from (_Piece(bits, ((place, name),), (part,)) for part in data.split(_PIECE))
    for bits, listed in small.items():
        members, datas = zip(*listed, strict=True)
        yield _Piece(bits, members, datas)


def _look_at_all(pieces: Iterable[_Piece]) -> list[tuple[int, str]]:
    """The place and the name of the first in each piece that is no number."""
    return [found for piece in pieces if (found := _look(piece)) is not None]


def _look(piece: _Piece) -> tuple[int, str] | None:
    together = piece.data[0] if len(piece.data) == 1 else torch.cat(piece.data)
    if not _any_not_finite(piece.bits, together):
        return None
    each = zip(piece.members, piece.data, strict=True)
    return next(member for member, data in each if _any_not_finite(piece.bits, data))


def _any_not_finite(bits: FloatBits, data: torch.Tensor) -> bool:
    return any(bits.any_not_finite(part.numpy()) for part in data.split(_CHUNK))
