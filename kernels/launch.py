"""Launching a compiled kernel again at a few microseconds of host time: Triton's own launch takes tens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .runtime import INTERPRETED, TRITON_FOUND, TRITON_VERSION, HopperDescriptor

if TRITON_FOUND:
    from triton.tools.tensor_descriptor import TensorDescriptor

# A launch that was made before ends in what Triton 3.6's JITFunction.run ends in; other versions launch as usual.
_DIRECT = TRITON_FOUND and not INTERPRETED and TRITON_VERSION == (3, 6)
if _DIRECT:
    from triton import knobs
    from triton.backends.nvidia.driver import make_tensordesc_arg

_MOST_LAUNCHES = 4096
_MOST_DESCRIPTORS = 16384


class Described(NamedTuple):
    """A tensor that a kernel reads or writes block by block through a tensor descriptor (TMA).

    layout: how Gluon lays a block out in shared memory; None for kernels in Triton.
    """

    tensor: torch.Tensor
    block: Sequence[int]
    layout: Any = None


@dataclass(frozen=True, slots=True)
class _Launch:
    """A compiled kernel and what every launch of it is given.

    Attributes:
        call: takes the grid, the stream, `before`, the arguments and `after`.
        before: the function, its metadata, no hooks and no scratch memory.
        after: the constexpr parameters in the kernel's order.
        metadata: of its tensor descriptors.
        descriptors: by their place and tensor, what `call` takes for each; they hold addresses and sizes, no memory.
    """

    call: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    metadata: Sequence[Any] = ()
    descriptors: dict[tuple, list[Any]] = field(default_factory=dict)

    def described(self, place: int, argument: Described) -> list[Any]:
        """What `call` takes for the descriptor at `place` among them."""
        tensor = argument.tensor
        key = (place, tensor.data_ptr(), tensor.shape, tensor.stride())
        made = self.descriptors.get(key)
        if made is None:
            if len(self.descriptors) >= _MOST_DESCRIPTORS:
                self.descriptors.clear()
            made = self.descriptors[key] = make_tensordesc_arg(as_triton(argument), self.metadata[place])
        return made


_launches: dict[tuple, _Launch | None] = {}
"""None for a kernel that can only be launched as usual."""


def _hooked() -> bool:
    """Whether a profiler listens to launches, which only Triton's own launch tells."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _traits(arguments: tuple) -> list[Any]:
    """What a kernel is compiled for of its arguments, or more.

    Triton compiles for the alignment and dtype of pointers, for integers that are 1, and for multiples of 16.
    """
    traits: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is float:
            traits.append(argument)
        elif kind is Described:
            traits += argument.tensor.dtype, *argument.block
        else:
            traits += argument.dtype, argument.data_ptr() & 15, argument.is_cuda
    return traits


def _values(known: _Launch, arguments: tuple) -> list[Any]:
    """The arguments as the launcher takes them fastest: of a tensor it would ask the driver whose memory it is."""
    values: list[Any] = []
    place = 0
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is float:
            values.append(argument)
        elif kind is Described:
            values += known.described(place, argument)
            place += 1
        else:
            values.append(argument.data_ptr())
    return values


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
        arguments: the parameters that are not constexpr, in order: tensors, `Described` ones, numbers.
        constants: the constexpr parameters by name.
        warps: warps of a program.
        stages: stages of software pipelines.
        overlap: start while the kernel before still runs (cc 9.0): the kernel itself waits for it.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if overlap:
        options["launch_pdl"] = True
    if not _DIRECT:
        kernel[grid](*map(as_triton, arguments), **constants, **options)
        return
    device = torch._C._cuda_getDevice()
    # `constants` keep the order of their call site, so their values alone tell them apart within one kernel.
    key = (kernel.fn, device, warps, stages, overlap, *_traits(arguments), *constants.values())
    known = _launches.get(key)
    if known is not None and not _hooked():
        stream = torch._C._cuda_getCurrentRawStream(device)
        known.call(*grid, stream, *known.before, *_values(known, arguments), *known.after)
        return
    compiled = kernel[grid](*map(as_triton, arguments), **constants, **options)
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = _found(compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]))


def as_triton(argument: Any) -> Any:
    """The argument as Triton's own launch takes it."""
    if type(argument) is not Described:
        return argument
    if argument.layout is None:
        return TensorDescriptor.from_tensor(argument.tensor, list(argument.block))
    return HopperDescriptor.from_tensor(argument.tensor, list(argument.block), argument.layout)


def _found(compiled: Any, after: tuple[Any, ...]) -> _Launch | None:
    """How to launch a compiled kernel directly; None where its launcher has parts that this does not know."""
    launcher = compiled.run
    try:
        options = launcher.launch_cooperative_grid, launcher.launch_pdl
        call, metadata = launcher.launch, ()
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        if inspect.isfunction(call):
            inside = inspect.getclosurevars(call).nonlocals
            call, metadata = inside["launcher"], inside["tensordesc_meta"]
            if None in metadata:
                return None
    except (AttributeError, KeyError):
        return None
    before = (compiled.function, *options, None, None, compiled.packed_metadata, None, None, None)
    return _Launch(call, before, after, metadata)
