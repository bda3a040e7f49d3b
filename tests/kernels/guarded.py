"""Tensors that lie against memory which nobody may read: a kernel that goes past one ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
ALIGNMENT = 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor: torch.Tensor, at: str = "end") -> torch.Tensor:
    """A contiguous copy in pages of its own, whose neighbours cannot be read or written. Never freed.

    at: which of its ends touches the page beside it; `end` leaves up to 15 bytes, so that it stays aligned.
    """
    nbytes = tensor.numel() * tensor.element_size()
    room = -(-max(nbytes, 1) // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, room + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
    for fence in (address, address + PAGE + room):
        assert _libc.mprotect(fence, PAGE, 0) == 0, ctypes.get_errno()
    if nbytes == 0:
        return tensor.clone()
    offset = PAGE if at == "start" else PAGE + (room - nbytes) // ALIGNMENT * ALIGNMENT
    buffer = (ctypes.c_char * nbytes).from_address(address + offset)
    copy = torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
