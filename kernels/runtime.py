"""Whether Triton is there, and stand-ins that let kernel files be imported where it is not."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_log = logging.getLogger("lowbit.kernels")

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

_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_EMPTY_STRIDED = {kind: getattr(_guards, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
"""What PyTorch's own compiler makes tensors by, where it has it: by kind of device, on the current one."""

GLUON_FOUND = TRITON_FOUND and TRITON_VERSION == (3, 6) and os.environ.get("TRITON_INTERPRET") != "1"
"""Triton's lower language is there, as the kernels written in it know it; nothing interprets it."""
if GLUON_FOUND:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
else:
    gluon = gl = hopper = HopperDescriptor = _NoTriton()

CAN_OVERLAP = TRITON_VERSION >= (3, 6)
"""Kernels can be told to wait for the one before (programmatic dependent launch); needs cc 9.0 too."""

SMALLEST_DOT = 8 if TRITON_VERSION >= (3, 5) else 16
"""Columns that a product of two tiles has at least."""

THREADS_FROM_FIRST = TRITON_VERSION < (3, 7)
"""Threads are spread along a load's dimensions from the first one on, else from the last."""

DESCRIPTORS_FIT = TRITON_VERSION >= (3, 5)
"""Before, a kernel on tensor descriptors took shared memory for its output beside that of its steps: 258 KiB in all."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
"""What kernels take that compute in float32."""

MOST_PROGRAMS = 65535
"""Along the second axis of a grid, and the third; the first has 2**31 - 1."""

TURING, AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE_BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
"""The lowest compute capability of each generation of GPUs."""


def constexpr(value):
    """A module constant that kernels may read."""
    return tl.constexpr(value) if TRITON_FOUND else value


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def copied_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How the copy engine lays a block of these sizes out in shared memory, for kernels in Gluon."""
    names = {torch.int8: "int8", torch.float8_e4m3fn: "float8e4nv", torch.float8_e5m2: "float8e5"}
    name = names.get(dtype) or dtype_name(dtype)
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, name))


def current_gpu(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For as long as this lasts kernels are launched on `device`, where that is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a new tensor of this shape."""
    return torch.empty(shape, device="meta").stride()


def maker_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Makes uninitialized tensors, row-major, on `device`, which is the current one.

    As the code does that PyTorch's own compiler writes: its dispatcher takes as long as half a launch.
    """
    make = _EMPTY_STRIDED.get(device.type)
    if make is None:
        return functools.partial(torch.empty, shape, dtype=dtype, device=device)
    # It takes no subclass of a tuple, as a tensor's shape is.
    return functools.partial(make, tuple(shape), row_major_strides(shape), dtype)


def made_to_keep(make: Callable[[], T]) -> T:
    """make() on a thread of its own, for GPU memory that is kept between calls.

    While torch.compile warms up its CUDA graphs ("reduce-overhead"), what this thread allocates comes from the graphs'
    own pool, and the run ends in an error if any of it is still there afterwards. Inference mode stays behind too.
    """
    if torch.compiler.is_compiling():
        return make()

    def made() -> T:
        with kitchen_allocations():
            return make()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(made).result()


def kitchen_allocations() -> contextlib.AbstractContextManager[Any]:
    """Where comfy-kitchen (0.2.40 and up) makes what outlives a call, for whoever manages the memory; else nothing."""
    allocation = sys.modules.get("comfy_kitchen.allocation")
    return contextlib.nullcontext() if allocation is None else allocation.allocation_context()


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


@functools.cache
def triton_builds() -> bool:
    """Whether Triton's driver starts: it compiles a helper in C first, so an image without gcc has Triton in name only."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
        _log.warning(
            "Triton is installed but cannot build kernels (%s): quantized linears run in plain torch, which is slower. "
            "Install a C compiler (gcc) and Python's headers.",
            reason,
        )
        return False
    return True


def kernels_run_on(x: torch.Tensor) -> bool:
    """Whether Triton kernels can take tensors on x's device: an NVIDIA GPU, or any CPU under TRITON_INTERPRET=1."""
    if not TRITON_FOUND:
        return False
    if x.device.type != "cuda":
        return INTERPRETED and x.device.type == "cpu"
    return torch.version.hip is None and (INTERPRETED or triton_builds())
