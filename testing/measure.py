"""Errors, sizes and where they were measured, as the demo, the benchmarks and the tests report them."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "comfy-kitchen",
    "comfy-aimdo",
    "sageattention",
    "torchao",
    "gemlite",
    "diffusers",
    "lowbit",
)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    difference = value.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, quantized data and scales as stored, shared storage once."""
    storages: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in plain_tensors(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or the data and scales of a quantized one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from plain_tensors(getattr(tensor, name))


def environment(host: str = "") -> dict[str, Any]:
    """Where and with what the numbers were made: the header of every results file. host: what ran the pack, if anything did."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": host,
        "device": f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return found
