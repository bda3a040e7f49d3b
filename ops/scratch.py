"""The scratch memory that all quantized linears share: one growing buffer per thread, device and stream."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import torch

from ..kernels.runtime import INTERPRETED, made_to_keep

ALIGNMENT = 256
_ROUND_UP = 2 << 20
_MOST_VIEWS = 256

Spec = tuple[tuple[int, ...], torch.dtype] | None
"""Shape and dtype of one scratch tensor; None where a call needs none."""

Views = dict[tuple[Spec, ...], list[torch.Tensor | None]]


class Scratch:
    """One growing byte buffer and the views cut from it. Views are valid until the next `take` of the same owner."""

    def __init__(self) -> None:
        # One attribute, so that a release by another thread never leaves half of it.
        self._held: tuple[torch.Tensor | None, Views] = (None, {})
        self.left: tuple[list[torch.Tensor | None], Any] | None = None
        """The tensors of the last `take` and what its caller says is in them; the next `take` forgets it."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        buffer, _ = self._held
        return 0 if buffer is None else buffer.numel()

    def take(self, specs: tuple[Spec, ...], device: torch.device) -> list[torch.Tensor | None]:
        """Tensors for `specs`, cut from the buffer, which grows (and never shrinks) when they do not fit."""
        self.left = None
        buffer, views = self._held
        if specs not in views:
            total = _total(specs)
            if buffer is None or buffer.numel() < total:
                # The old buffer goes before the new one comes, not after.
                buffer, views = self.release()
                buffer = _buffer(-(-total // _ROUND_UP) * _ROUND_UP, device)
                self._held = buffer, views
            if len(views) >= _MOST_VIEWS:
                views.clear()
            views[specs] = _cut(buffer, specs)
        return views[specs]

    def release(self) -> tuple[None, Views]:
        """Give the buffer back to PyTorch's allocator, as soon as no view of it is in use."""
        nothing: tuple[None, Views] = (None, {})
        self._held = nothing
        self.left = None
        return nothing


def _buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """An ordinary tensor, which can be written inside and outside of inference mode, on the caller's stream."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def make() -> torch.Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    return made_to_keep(make)


def _nbytes(spec: Spec) -> int:
    return 0 if spec is None else -(-math.prod(spec[0]) * spec[1].itemsize // ALIGNMENT) * ALIGNMENT


def _total(specs: tuple[Spec, ...]) -> int:
    return sum(_nbytes(spec) for spec in specs)


def _cut(buffer: torch.Tensor | None, specs: tuple[Spec, ...]) -> list[torch.Tensor | None]:
    views: list[torch.Tensor | None] = []
    start = 0
    for spec in specs:
        if spec is None or buffer is None:
            views.append(None)
            continue
        shape, dtype = spec
        views.append(buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
        start += _nbytes(spec)
    return views


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratches: dict[tuple[int, int], Scratch] = {}


_local = _PerThread()
_all: weakref.WeakSet[Scratch] = weakref.WeakSet()
_lock = threading.Lock()


def take_scratch(device: torch.device, *specs: Spec) -> list[torch.Tensor | None]:
    """Uninitialized tensors of `specs` on `device`, each 256-byte aligned, out of one shared buffer; None for None.

    They are overwritten by the next call on the same thread and stream: use them within one linear only. While a CUDA
    graph is captured they come from the graph's own pool, so that a replay never touches memory this module has freed.
    """
    scratch = scratch_here(device)
    if scratch is None:
        return _cut(torch.empty(_total(specs), dtype=torch.uint8, device=device), specs)
    return scratch.take(specs, device)


def scratch_here(device: torch.device) -> Scratch | None:
    """The scratch memory of this thread and its current stream; None where each call has its own.

    Work of one stream runs in order, so its calls can share a buffer; two streams, or two threads that interleave
    their launches on one stream, cannot.
    """
    if device.type != "cuda":
        key = (-1, 0)
        if not INTERPRETED:
            return None
    elif torch.cuda.is_current_stream_capturing():
        return None
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
