"""What this machine can do, as plain data: passed around instead of asking torch everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """A device that models run on.

    Attributes:
        name: as the driver calls it.
        capability: CUDA compute capability, None for a CPU or another vendor.
        memory_bytes: device memory in all; 0 for a CPU.
    """

    name: str
    capability: tuple[int, int] | None
    memory_bytes: int

    @property
    def label(self) -> str:
        """Name, compute capability and memory in one phrase."""
        if self.capability is None:
            return self.name
        return f"{self.name} (cc {self.capability[0]}.{self.capability[1]}, {self.memory_bytes / 2**30:.0f} GiB)"


def device_info(device: torch.device | str | None = None) -> DeviceInfo:
    """Describe `device`; None means the current CUDA device, or the CPU where there is none."""
    device = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    if device.type != "cuda":
        return DeviceInfo("CPU" if device.type == "cpu" else device.type, None, 0)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(properties.name, (properties.major, properties.minor), properties.total_memory)
