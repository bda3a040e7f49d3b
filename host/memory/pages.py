"""Parts a limit under dynamic VRAM: pages of weights that stay, weights on their way, and room for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...memory.holders import stored_parts
from .release import runs_here
from .session import session

_PAGE, _CHUNK = 32 << 20, 16 << 20
"""Dynamic VRAM keeps weights in pages of this many bytes, and its buffers grow by chunks of so many."""

_BUFFERS = 2
"""Core streams weights through two buffers, of two streams, and so do blocks that are fetched ahead."""


def part_limit(
    patcher: Any,
    fraction: float,
    working: float,
    beside: Iterable[Any] = (),
    blocks: Sequence[torch.nn.Module] = (),
) -> bool:
    """With dynamic VRAM: mark how many weights stay on the GPU, so that what the model needs beside them has room.

    PyTorch's allocator and dynamic VRAM each keep to a limit on their own: together they keep to it only where each
    leaves the other its part.

    Args:
        patcher: of a model that was prepared to run.
        fraction: of the budget that weights may take.
        working: bytes that the run needs beside its weights.
        beside: further patchers that run with it.
        blocks: that are to be fetched ahead.

    Returns:
        Whether there is room to fetch them.
    """
    limit, pages = session().limit, _pages(patcher)
    if limit.nbytes is None:
        if pages is not None and fraction < 1:
            _mark(pages, int(fraction * limit.budget))
        return True
    moving, ahead = moving_bytes([patcher, *beside]), fetched_bytes(blocks)
    if pages is None:
        limit.keep_free(moving)
        return True
    reading, loaded = session().device.read(), int(pages.loaded_size())
    room = limit.nbytes - working - max(0, reading.allocated - loaded)
    fits = room - moving >= ahead
    kept = moving + (ahead if fits else 0)
    size, allowed = int(pages.offset), fraction * limit.budget
    share = max(0, int(allowed if min(allowed, room) >= size else min(allowed, room - kept)))
    _mark(pages, share)
    if not limit.pages_give_way:
        kept = min(share, size) + max(0, reading.outside - loaded) + (kept if share < size else 0)
    limit.keep_free(kept)
    return fits


def keep_streams_free(patcher: Any) -> None:
    """With dynamic VRAM: what weights of a model that runs next take on their way, others may not have under a limit."""
    limit = session().limit
    if limit.nbytes is not None:
        limit.keep_free(moving_bytes([patcher]) + (0 if limit.pages_give_way else paged_bytes(patcher)))


def moving_bytes(patchers: Iterable[Any]) -> int:
    """GPU memory that layers take at most while they run: the largest in buffers, and one in pages that are in use."""
    models = [patcher.model for patcher in patchers if _streams(patcher)]
    sizes = [_layer_nbytes(layer) for model in models for layer in model.modules()]
    largest = max(sizes, default=0)
    # Its first and its last page may both hold a part of it.
    return _buffer_nbytes(sizes) + (_rounded(largest, _PAGE) + _PAGE if largest else 0)


def fetched_bytes(blocks: Sequence[torch.nn.Module]) -> int:
    """GPU memory that blocks take at most while they are fetched ahead."""
    return _buffer_nbytes([sum(_layer_nbytes(layer) for layer in block.modules()) for block in blocks])


def paged_bytes(patcher: Any) -> int:
    """The most that pages of a model can take."""
    return int(patcher.model_size()) if _streams(patcher) else 0


def _streams(patcher: Any) -> bool:
    return bool(patcher.is_dynamic() and runs_here(patcher))


def _pages(patcher: Any) -> Any:
    """A model's pages; None where it has none, or they cannot be marked."""
    pages = patcher._vbar_get() if _streams(patcher) else None
    return pages if hasattr(pages, "set_watermark") else None


def _mark(pages: Any, nbytes: int) -> None:
    # Pages past the mark that are there from before would stay, and never be used.
    pages.free_memory(max(0, int(pages.loaded_size()) - nbytes))
    pages.set_watermark(nbytes)


def _layer_nbytes(layer: torch.nn.Module) -> int:
    """Bytes of a layer's weights as they are stored, and of the LoRA that is applied to them; 0 for one that does not stream."""
    if not hasattr(layer, "comfy_cast_weights"):
        return 0
    weights = (getattr(layer, name, None) for name in ("weight", "bias"))
    patches = (getattr(layer, f"{name}_lowvram_function", None) for name in ("weight", "bias"))
    parts = (part for weight in weights if weight is not None for part in stored_parts(weight))
    return sum(part.nbytes for part in parts) + sum(
        int(patch.memory_required()) for patch in patches if patch is not None
    )


def _buffer_nbytes(sizes: list[int]) -> int:
    """What the buffers grow to that pieces of these sizes go through in turn."""
    return sum(_rounded(size, _CHUNK) for size in sorted(sizes, reverse=True)[:_BUFFERS])


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
