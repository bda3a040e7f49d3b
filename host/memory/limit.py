"""Makes ComfyUI's own accounting, dynamic VRAM and PyTorch's allocator see a smaller card, and undoes it again."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy_aimdo.control
import torch

from ...memory.devices import Device, Reading

log = logging.getLogger("lowbit.memory")

_HEADROOM = "simple_vram_headroom"


class VramLimit:
    """A limit on the bytes that this process may take of a device; none until `apply`.

    ComfyUI asks `get_free_memory` and `get_total_memory` before it loads, batches or tiles anything: both answer for the
    smaller card. Dynamic VRAM keeps a headroom free instead, one for all GPUs, and PyTorch's allocator has a cap of its
    own. All of them count what this process holds, so that other programs on the card make no difference.

    Args:
        device: what is limited.
        holds: whether whoever asks now is to be limited; ComfyUI's own display of the whole card, for one, is not.

    Attributes:
        kept_free: bytes of the limit that PyTorch's allocator may not take; see `keep_free`.
        pages_give_way: whether dynamic VRAM's pages of weights leave as soon as anything else needs their part of it.
    """

    def __init__(self, device: Device, holds: Callable[[], bool] = lambda: True):
        self.device = device
        self._holds = holds
        self.nbytes: int | None = None
        self.kept_free = 0
        self.pages_give_way = False
        self._lock = threading.Lock()
        self._undo: list[Callable[[], None]] = []

    def apply(self, nbytes: int | None) -> None:
        """Sets the limit, or removes it with None. Does nothing where there is no device that holds models."""
        with self._lock:
            if nbytes == self.nbytes:
                return
            self._restore()
            if nbytes is None or not self.device.holds_models:
                return
            self.nbytes = nbytes
            try:
                self._hook("get_free_memory", self._room_for_models)
                self._hook("get_total_memory", lambda limit: limit)
                if self.device.torch_device.type == "cuda":
                    self._cap_allocator()
                    self._cap_dynamic_vram(nbytes)
            except BaseException:
                self._restore()
                raise

    def keep_free(self, nbytes: int) -> None:
        """Keep this much of the limit from PyTorch's allocator, for what lies outside it and does not give way to it.

        Dynamic VRAM only ever frees pages: beside the buffers that weights stream through, a tensor would go past the
        limit without an error.
        """
        with self._lock:
            if self.nbytes is None or nbytes == self.kept_free:
                return
            self.kept_free = nbytes
            if self.device.torch_device.type == "cuda":
                self._set_allocator_cap()

    def remove(self) -> None:
        """Everything as it was before."""
        with self._lock:
            self._restore()

    @property
    def budget(self) -> int:
        """Bytes that this process may hold in all: the limit, or what it holds and what is free."""
        return self.budget_at(self.device.read())

    @property
    def room(self) -> int:
        """Bytes that this process can still take, beside what is kept free."""
        reading = self.device.read()
        return max(0, self.budget_at(reading) - self.kept_free - reading.allocated)

    def budget_at(self, reading: Reading) -> int:
        """`budget`, from a reading that is there already."""
        there = self.there(reading)
        return there if self.nbytes is None else min(self.nbytes, there)

    def there(self, reading: Reading) -> int:
        """Bytes that this process might hold without a limit: what it holds and what is free."""
        return self.device.total() if reading.free is None else reading.reserved + reading.free

    def _restore(self) -> None:
        """Undoes everything; what cannot be undone is no reason to leave the rest, or to fail the next prompt."""
        self.nbytes, self.kept_free, self.pages_give_way = None, 0, False
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # noqa: BLE001
                log.warning("A part of the VRAM limit could not be removed: %s", error)

    def _hook(self, name: str, most: Callable[[int], int]) -> None:
        """Has core's function `name` of a device answer no number, or none of several, over `most` of the limit."""
        original = getattr(comfy.model_management, name)

        def hook(*arguments: Any, **options: Any) -> Any:
            answer, limit = original(*arguments, **options), self.nbytes
            if limit is None or not self._applies_to(arguments[0] if arguments else options.get("dev")):
                return answer
            bound = most(limit)
            return tuple(min(number, bound) for number in answer) if isinstance(answer, tuple) else min(answer, bound)

        def restore() -> None:
            # Whoever wrapped it since calls this hook, which only passes on once there is no limit.
            if getattr(comfy.model_management, name) is hook:
                setattr(comfy.model_management, name, original)

        setattr(comfy.model_management, name, hook)
        self._undo.append(restore)

    def _applies_to(self, device: torch.device | None) -> bool:
        if not self._holds():
            return False
        if device is None:
            return True
        asked, ours = torch.device(device), self.device.torch_device
        return asked.type == ours.type and asked.index in (None, ours.index)

    def _room_for_models(self, limit: int) -> int:
        return max(0, limit - self.kept_free - self.device.read().allocated)

    def _cap_allocator(self) -> None:
        index = self.device.torch_device.index or 0
        before = _allocator_fraction(index)
        self._set_allocator_cap()
        self._undo.append(lambda: torch.cuda.set_per_process_memory_fraction(before, index))

    def _set_allocator_cap(self) -> None:
        """PyTorch raises its out-of-memory error past this, after it has given back what it holds unused."""
        most = max(0, (self.nbytes or 0) - self.kept_free)
        index = self.device.torch_device.index or 0
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / self.device.total()), index)

    def _cap_dynamic_vram(self, nbytes: int) -> None:
        """Dynamic VRAM faults weights in until only its headroom is free: the headroom becomes what lies past the limit."""
        library = comfy_aimdo.control.lib
        # The headroom is one for all GPUs: where there are more, the marks of pages.py have to do.
        if not comfy.memory_management.aimdo_enabled or library is None or torch.cuda.device_count() > 1:
            return
        before = _headroom(library)
        if before is None:
            return
        # It subtracts the headroom from the card's capacity and compares the rest with what this process holds.
        library.set_simple_vram_headroom(max(before, self.device.total() - nbytes))
        self.pages_give_way = True
        self._undo.append(lambda: library.set_simple_vram_headroom(before))


def _allocator_fraction(index: int) -> float:
    """The allocator's cap now, as it can be set again: cudaMallocAsync says some hundred millions for none."""
    return min(1.0, float(torch.cuda.get_per_process_memory_fraction(index)))


def _headroom(library: Any) -> int | None:
    """Dynamic VRAM's headroom now; None where this version cannot say, which leaves it alone."""
    try:
        return int(ctypes.c_int64.in_dll(library, _HEADROOM).value)
    except (AttributeError, ValueError):
        return None
