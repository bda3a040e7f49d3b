"""Reads how much memory a device holds: an NVIDIA GPU through PyTorch and its driver, or this process's main memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

HOST_NAME = "cpu (host memory)"
"""What reports call the device where there is no GPU: the numbers are this process's resident memory."""

_PROCESS = psutil.Process()
_STATM = Path("/proc/self/statm")
_CGROUP_FOLDERS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_USE_FILES = ("memory.current", "memory.usage_in_bytes")


@dataclass(frozen=True)
class Reading:
    """A device at one moment, in bytes.

    Attributes:
        allocated: held by tensors, weights outside PyTorch's allocator included.
        reserved: taken from the driver, what PyTorch keeps unused included.
        peak: the most that was allocated since the last `reset_peak`; what lies outside PyTorch's allocator counts in
            it as it is now.
        free: what the driver says nobody holds; None where nobody can say.
        outside: the part of `allocated` that lies outside PyTorch's allocator, such as dynamic VRAM's pages of weights.
    """

    allocated: int
    reserved: int
    peak: int
    free: int | None
    outside: int = 0

    @property
    def idle(self) -> int:
        """Reserved and not used."""
        return max(0, self.reserved - self.allocated)


class Device(Protocol):
    """What the ledger measures. `holds_models`: whether weights can leave it for main memory."""

    name: str
    torch_device: torch.device
    holds_models: bool

    def read(self) -> Reading:
        """The device now; must not wait for it."""

    def reset_peak(self) -> None:
        """Starts a new peak."""

    def total(self) -> int:
        """Bytes of memory it has."""

    def clear(self) -> None:
        """Gives back what is reserved and not used; waits for the device."""


class CudaDevice:
    """A GPU. `outside` counts bytes that weights take outside PyTorch's allocator, such as dynamic VRAM's."""

    holds_models = True

    def __init__(self, device: torch.device, outside: Callable[[], int]):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.name = f"cuda:{self.index}"
        self.torch_device = torch.device("cuda", self.index)
        self._outside = outside

    def read(self) -> Reading:
        """PyTorch's counters and the driver's free memory; some tens of microseconds, no synchronization."""
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        outside = self._outside()
        free, _ = torch.cuda.mem_get_info(self.index)
        return Reading(
            allocated["current"] + outside,
            reserved["current"] + outside,
            allocated["peak"] + outside,
            int(free),
            outside,
        )

    def reset_peak(self) -> None:
        """Resets PyTorch's peak counters."""
        torch.cuda.reset_peak_memory_stats(self.index)

    def total(self) -> int:
        """The card's memory."""
        return int(torch.cuda.get_device_properties(self.index).total_memory)

    def clear(self) -> None:
        """Empties PyTorch's cache."""
        torch.cuda.synchronize(self.index)
        torch.cuda.empty_cache()


class HostDevice:
    """This process's main memory, standing in where there is no GPU. Its peak is the highest reading."""

    name = HOST_NAME
    torch_device = torch.device("cpu")
    holds_models = False

    def __init__(self) -> None:
        self._peak = 0

    def read(self) -> Reading:
        """Resident memory of this process, and what the machine (or its container) has left."""
        used = resident_bytes()
        self._peak = max(self._peak, used)
        return Reading(used, used, self._peak, available_host_bytes())

    def reset_peak(self) -> None:
        """Starts from the next reading."""
        self._peak = 0

    def total(self) -> int:
        """Main memory that this process may use."""
        return total_host_bytes()

    def clear(self) -> None:
        """There is nothing to give back."""


def resident_bytes() -> int:
    """Main memory of this process: a read of /proc where there is one, some 10 microseconds."""
    try:
        return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return int(_PROCESS.memory_info().rss)


def total_host_bytes() -> int:
    """Main memory of the machine, or of the container this runs in."""
    total = int(psutil.virtual_memory().total)
    limit = _first_number(_LIMIT_FILES)
    return total if limit is None else min(total, limit)


def available_host_bytes() -> int:
    """Main memory that can still be taken without swapping, the container's limit respected."""
    memory = psutil.virtual_memory()
    limit, used = _first_number(_LIMIT_FILES), _first_number(_USE_FILES)
    if limit is None or used is None or limit >= memory.total:
        return int(memory.available)
    # What the container's page cache holds counts as used there, though the kernel would give it back.
    return max(0, min(int(memory.available), limit - used + _reclaimable(limit)))


def _reclaimable(limit: int) -> int:
    text = _first_text(("memory.stat",)) or ""
    stats = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
    return min(limit, int(stats.get("inactive_file", 0)) + int(stats.get("active_file", 0)))


def _first_number(names: tuple[str, ...]) -> int | None:
    text = _first_text(names)
    return int(text) if text is not None and text.isdigit() else None


def _first_text(names: tuple[str, ...]) -> str | None:
    for folder in _CGROUP_FOLDERS:
        for name in names:
            try:
                return (folder / name).read_text().strip()
            except OSError:
                continue
    return None
