"""The scratch memory that all quantized linears share: one growing buffer per thread, device and stream."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any, NamedTuple

import torch

from ..kernels.runtime import INTERPRETED, made_to_keep

ALIGNMENT = 256
_ROUND_UP = 2 << 20
_MOST_CUTS = 256

Spec = tuple[tuple[int, ...], torch.dtype] | None
"""Shape and dtype of one scratch tensor; None where a call needs none."""


class Cut(NamedTuple):
    """Uninitialized memory of some specs, each 256-byte aligned.

    Attributes:
        tensors: one for each spec, None for None.
        addresses: of those that are tensors.
    """

    tensors: tuple[torch.Tensor | None, ...]
    addresses: list[int]


Cuts = dict[tuple[Spec, ...], Cut]


class Scratch:
    """One growing byte buffer and what was cut from it, which is valid until the next `take` of the same owner.

    Args:
        kept: the buffer outlives the calls; else it is of what is captured now, and no other call's.
    """

    def __init__(self, kept: bool = True) -> None:
        self._kept = kept
        # One attribute, so that a release by another thread never leaves half of it.
        self._held: tuple[torch.Tensor | None, Cuts] = (None, {})
        self.left: tuple[Cut, Any] | None = None
        """The last cut and what its caller says is in it; the next `take` forgets it."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        buffer, _ = self._held
        return 0 if buffer is None else buffer.numel()

    def take(self, specs: tuple[Spec, ...], device: torch.device) -> Cut:
        """Memory for `specs`, cut from the buffer, which grows (and never shrinks) when they do not fit."""
        self.left = None
        buffer, cuts = self._held
        cut = cuts.get(specs)
        if cut is None:
            total = sum(map(_nbytes, specs))
            if buffer is None or buffer.numel() < total:
                # The old buffer goes before the new one comes, not after.
                buffer, cuts = self.release()
                buffer = self._buffer(total, device)
                self._held = buffer, cuts
            if len(cuts) >= _MOST_CUTS:
                cuts.clear()
            cut = cuts[specs] = _cut(buffer, specs)
        return cut

    def release(self) -> tuple[None, Cuts]:
        """Give the buffer back to PyTorch's allocator, as soon as nothing cut from it is in use."""
        nothing: tuple[None, Cuts] = (None, {})
        self._held = nothing
        self.left = None
        return nothing

    def _buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """If kept an ordinary tensor, which can be written inside and outside of inference mode, on the caller's stream."""
        if not self._kept:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def make() -> torch.Tensor:
            with torch.cuda.stream(stream):
                return torch.empty(-(-nbytes // _ROUND_UP) * _ROUND_UP, dtype=torch.uint8, device=device)

        return made_to_keep(make)


def _nbytes(spec: Spec) -> int:
    return 0 if spec is None else -(-math.prod(spec[0]) * spec[1].itemsize // ALIGNMENT) * ALIGNMENT


def _cut(buffer: torch.Tensor, specs: tuple[Spec, ...]) -> Cut:
    tensors: list[torch.Tensor | None] = []
    start = 0
    for spec in specs:
        if spec is None:
            tensors.append(None)
            continue
        shape, dtype = spec
        tensors.append(buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        start += _nbytes(spec)
    return Cut(tuple(tensors), [tensor.data_ptr() for tensor in tensors if tensor is not None])


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratches: dict[tuple[int, int], Scratch] = {}


_local = _PerThread()
_all: weakref.WeakSet[Scratch] = weakref.WeakSet()
_lock = threading.Lock()


def scratch_here(device: torch.device) -> Scratch:
    """The scratch memory of this thread and its current stream.

    Work of one stream runs in order, so its calls can share a buffer; two streams, or two threads that interleave
    their launches on one stream, cannot. While a CUDA graph is captured each call has its own, of the graph's pool, so
    that a replay never touches memory this module has freed.
    """
    if device.type != "cuda":
        key = (-1, 0)
        if not INTERPRETED:
            return Scratch(kept=False)
    elif torch._C._cuda_isCurrentStreamCapturing():
        return Scratch(kept=False)
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        key = (index, torch._C._cuda_getCurrentRawStream(index))
    scratch = _local.scratches.get(key)
    if scratch is None:
        scratch = _local.scratches[key] = Scratch()
        with _lock:
            _all.add(scratch)
    return scratch


def scratch_nbytes() -> int:
    """Bytes of scratch memory held now, over all threads, devices and streams."""
    with _lock:
        return sum(scratch.nbytes for scratch in _all)


def release_scratch() -> int:
    """Give every scratch buffer back to PyTorch's allocator; returns the bytes. The next linear makes a new one."""
    with _lock:
        released = sum(scratch.nbytes for scratch in _all)
        for scratch in _all:
            scratch.release()
    return released
