"""What this machine offers attention: the GPU, the driver, and the versions of the packages that hold kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..versions import package_version

# import name -> distribution name
PACKAGES = {
    "sageattention": "sageattention",
    "sageattn3": "sageattn3",
    "comfy_kitchen": "comfy-kitchen",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "triton": "triton",
}


@dataclass(frozen=True)
class Environment:
    """One device and the software around it.

    device_type: "cuda", "cpu" or another torch device type. capability: (major, minor), (0, 0) where there is no GPU.
    cuda: the CUDA version torch was built with, (0, 0) without. cudnn: as torch numbers it, 0 without.
    packages: (import name, version) of those installed.
    """

    device_type: str
    capability: tuple[int, int] = (0, 0)
    gpu: str = ""
    cuda: tuple[int, int] = (0, 0)
    driver: str = ""
    torch: str = torch.__version__
    packages: tuple[tuple[str, str], ...] = ()
    cudnn: int = 0

    @property
    def compute_capability(self) -> str:
        """As people write it: "9.0"."""
        return f"{self.capability[0]}.{self.capability[1]}"

    def version(self, package: str) -> str | None:
        """The installed version of a package by its import name, None when it is not installed."""
        return dict(self.packages).get(package)

    def fingerprint(self) -> str:
        """One line naming everything a timing depends on: GPU, driver, torch, CUDA, cuDNN, the packages and this pack."""
        packages = " ".join(f"{name}={version}" for name, version in self.packages)
        cuda = ".".join(map(str, self.cuda))
        return (
            f"{self.gpu or self.device_type}; cc {self.compute_capability}; driver {self.driver}; torch {self.torch}; "
            f"cuda {cuda}; cudnn {self.cudnn}; {packages}; lowbit {_pack_version()}"
        )


def _is_installed(name: str) -> bool:
    """Whether a package can be found. A bare module that another pack has put in its place has no spec: not installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError):
        return False


@functools.cache
def _pack_version() -> str:
    """This pack's version, from the file beside the code."""
    try:
        lines = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split('"')[1] for line in lines if line.startswith("version = ")), "unknown")


def _package_version(name: str, distribution: str) -> str | None:
    return (package_version(distribution) or "unknown") if _is_installed(name) else None


@functools.cache
def _driver_version() -> str:
    """The NVIDIA driver's version, "unknown" where it cannot be read."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
        return next(word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit())
    except (OSError, StopIteration):
        pass
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            return answer.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    return "unknown"


@functools.cache
def detect(device: torch.device) -> Environment:
    """The environment of `device`; found once per device and process."""
    packages = tuple(
        (name, version)
        for name, distribution in PACKAGES.items()
        if (version := _package_version(name, distribution)) is not None
    )
    if device.type != "cuda":
        return Environment(device.type, packages=packages)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return Environment(
        device_type="cuda",
        capability=torch.cuda.get_device_capability(device),
        gpu=torch.cuda.get_device_name(device),
        cuda=(cuda[0], cuda[1]),
        driver=_driver_version(),
        packages=packages,
        cudnn=torch.backends.cudnn.version() or 0,
    )


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """Imports a package once. Returns it and "", or None and why not."""
    if not _is_installed(name.partition(".")[0]):
        return None, "not installed"
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken extension module raises anything
        return (
            None,
            f"installed, but it does not import ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
        )
