"""Whether Triton is there, and stand-ins that let kernel files be imported where it is not."""

from __future__ import annotations

import functools
import os

import torch

MINIMUM_TRITON = (3, 4)


class _NoTriton:
    """Takes the place of `triton` and `triton.language`: decorators give the function back, nothing can be launched."""

    @staticmethod
    def jit(function=None, **_options):
        return function if function is not None else lambda inner: inner

    def __getattr__(self, name: str):
        return self


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


try:
    import triton
    import triton.language as tl

    TRITON_VERSION = _version(triton.__version__)
    TRITON_FOUND = TRITON_VERSION >= MINIMUM_TRITON
except (ImportError, ValueError):
    triton = tl = _NoTriton()
    TRITON_VERSION = (0, 0)
    TRITON_FOUND = False

CAN_OVERLAP = TRITON_VERSION >= (3, 6)
"""Kernels can be told to wait for the one before (programmatic dependent launch); needs cc 9.0 too."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def constexpr(value):
    """A module constant that kernels may read."""
    return tl.constexpr(value) if TRITON_FOUND else value


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessor_count(index: int) -> int:
    """Multiprocessors of CUDA device `index` (or a small number when kernels run in the interpreter)."""
    if INTERPRETED and not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def compute_capability(index: int) -> tuple[int, int]:
    """Compute capability of CUDA device `index`."""
    return torch.cuda.get_device_capability(index)


def kernels_run_on(x: torch.Tensor) -> bool:
    """Whether Triton kernels can take tensors on x's device: an NVIDIA GPU, or any CPU under TRITON_INTERPRET=1."""
    if not TRITON_FOUND:
        return False
    return INTERPRETED if x.device.type == "cpu" else (x.device.type == "cuda" and torch.version.hip is None)
