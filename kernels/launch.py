"""Launching a compiled kernel again at a few microseconds of host time: Triton's own launch takes tens."""

from __future__ import annotations

from typing import Any

import torch

from .runtime import INTERPRETED, TRITON_FOUND, TRITON_VERSION

# The second launch of a specialization calls what Triton 3.6's JITFunction.run ends in; other versions launch as usual.
_DIRECT = TRITON_FOUND and not INTERPRETED and TRITON_VERSION == (3, 6)
if _DIRECT:
    from triton import knobs

_compiled: dict[tuple, tuple[Any, tuple]] = {}


def _hooked() -> bool:
    """Whether a profiler listens to launches, which only Triton's own launch tells."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _trait(value: Any) -> Any:
    """What of an argument Triton compiles for: alignment and dtype of pointers, ones and multiples of 16."""
    kind = type(value)
    if kind is int:
        return 1 if value == 1 else (value & 15 == 0, -(1 << 31) <= value < 1 << 31)
    if kind is float:
        return None
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    return kind, value.base.dtype, tuple(value.block_shape)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple,
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    overlap: bool = False,
) -> None:
    """kernel[grid](*arguments, **constants) on the current device and stream.

    Args:
        kernel: a `triton.jit` function whose constexpr parameters come last.
        grid: programs along three axes.
        arguments: the parameters that are not constexpr, in order.
        constants: the constexpr parameters by name.
        warps: warps of a program.
        stages: stages of software pipelines.
        overlap: start while the kernel before still runs (cc 9.0): the kernel itself waits for it.
    """
    options = {"num_warps": warps, "num_stages": stages, **({"launch_pdl": True} if overlap else {})}
    if not _DIRECT:
        kernel[grid](*arguments, **constants, **options)
        return
    device = torch.cuda.current_device()
    # `constants` keep the order of their call site, so their values alone tell them apart within one kernel.
    key = (kernel.fn, device, warps, stages, overlap, *map(_trait, arguments), *constants.values())
    found = _compiled.get(key)
    if found is None or _hooked():
        compiled = kernel[grid](*arguments, **constants, **options)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, values = found
    compiled.run(
        *grid,
        torch._C._cuda_getCurrentRawStream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *arguments,
        *values,
    )
