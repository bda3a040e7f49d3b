"""The scratch memory that all quantized linears share: one growing buffer per thread, device and stream."""

from __future__ import annotations

import threading
import weakref

import torch

ALIGNMENT = 256
_ROUND_UP = 2 << 20


class Scratch:
    """One growing byte buffer. Its views are valid until the next `take` of the same thread and stream."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.buffer is None else self.buffer.numel()

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """A uint8 buffer of at least `nbytes` on `device`, grown (never shrunk) when needed."""
        if self.nbytes < nbytes:
            self.buffer = None
            self.buffer = torch.empty(-(-nbytes // _ROUND_UP) * _ROUND_UP, dtype=torch.uint8, device=device)
        return self.buffer


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratches: dict[tuple[int, int], Scratch] = {}


_local = _PerThread()
_all: weakref.WeakSet[Scratch] = weakref.WeakSet()
_lock = threading.Lock()


def _find(device: torch.device) -> Scratch:
    # Work of one stream runs in order, so its calls can share a buffer; two streams, or two threads that
    # interleave their launches on one stream, cannot.
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    scratch = _local.scratches.get(key)
    if scratch is None:
        scratch = _local.scratches[key] = Scratch()
        with _lock:
            _all.add(scratch)
    return scratch


def take_scratch(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """Uninitialized uint8 tensors of `sizes` bytes on `device`, each 256-byte aligned, out of one shared buffer.

    They are overwritten by the next call on the same thread and stream: use them within one linear only. While a CUDA
    graph is captured they come from the graph's own pool, so that a replay never touches memory this module has freed.
    """
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        buffer = torch.empty(total, dtype=torch.uint8, device=device)
    else:
        buffer = _find(device).take(total, device)
    return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def scratch_nbytes() -> int:
    """Bytes of scratch memory held now, over all threads, devices and streams."""
    with _lock:
        return sum(scratch.nbytes for scratch in _all)


def release_scratch() -> int:
    """Give every scratch buffer back to PyTorch's allocator; returns the bytes. The next linear makes a new one.

    Call it between forwards, from the thread that runs them.
    """
    with _lock:
        released = sum(scratch.nbytes for scratch in _all)
        for scratch in _all:
            scratch.buffer = None
    return released
