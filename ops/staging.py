"""The way of bytes between files and a GPU: through one small piece of pinned memory, to which it copies at its full speed."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO

import torch

STAGED = 32 << 20
"""Bytes that are on their way at a time. PyTorch keeps pinned memory for the next one who asks, so it is little."""


def host_blocks(data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(block, the host's memory for it), one after the other: a CPU's data are both, all at once.

    Args:
        data: (N,) uint8 on any device. Whoever reads it copies a block to the host's memory, and whoever fills it back;
            the next block has the same memory.
    """
    if data.device.type == "cpu":
        yield data, data
        return
    staged = torch.empty(min(data.numel(), STAGED), dtype=torch.uint8, pin_memory=data.is_cuda)
    for block in data.split(STAGED):
        yield block, staged[: block.numel()]


def read_whole(file: FileIO, view: memoryview) -> bool:
    """Fill `view`; an unbuffered file may give less than it is asked for. False where the file ends."""
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True
