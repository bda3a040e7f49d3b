"""Launching a compiled kernel again at a few microseconds of host time: Triton's own launch takes tens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .runtime import INTERPRETED, TRITON_FOUND, TRITON_VERSION, HopperDescriptor, copied_layout

if TRITON_FOUND:
    from triton.tools.tensor_descriptor import TensorDescriptor

# A launch that was made before ends in what Triton 3.6's JITFunction.run ends in; other versions launch as usual.
_DIRECT = TRITON_FOUND and not INTERPRETED and TRITON_VERSION == (3, 6)
if _DIRECT:
    from triton import knobs
    from triton.backends.nvidia.driver import make_tensordesc_arg

_MOST_LAUNCHES = 4096
_MOST_DESCRIPTORS = 4096


class Described(NamedTuple):
    """A tensor that a kernel reads or writes block by block through a tensor descriptor (TMA).

    layout: how Gluon lays a block out in shared memory; None for kernels in Triton.
    """

    tensor: torch.Tensor
    block: Sequence[int]
    layout: Any = None


def in_blocks(x: torch.Tensor, *block: int) -> Described:
    """What kernels in Gluon copy blocks of x by."""
    return Described(x, block, copied_layout(block, x.dtype))


@dataclass(frozen=True, slots=True)
class _Launch:
    """A compiled kernel and what every launch of it is given.

    Attributes:
        call: takes the grid, the stream, `before`, the arguments and `after`.
        before: the function, its metadata, no hooks and no scratch memory.
        after: the constexpr parameters in the kernel's order.
        metadata: of its tensor descriptors.
    """

    call: Callable[..., None]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    metadata: Sequence[Any] = ()

    def described(self, place: int, argument: Described) -> list[Any]:
        """What `call` takes for the descriptor at `place` among them: it holds an address and sizes, no memory."""
        return make_tensordesc_arg(as_triton(argument), self.metadata[place])


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
) -> _Launch | None:
    """kernel[grid](*arguments, **constants) on the current device and stream.

    Args:
        kernel: a `triton.jit` function whose constexpr parameters come last.
        grid: programs along three axes.
        arguments: the parameters that are not constexpr, in order: tensors, `Described` ones, numbers.
        constants: the constexpr parameters by name.
        warps: warps of a program.
        stages: stages of software pipelines.
        overlap: start while the kernel before still runs (cc 9.0): the kernel itself waits for it.

    Returns:
        What launches it again, for arguments that Triton takes for the same; None where only Triton does.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if overlap:
        options["launch_pdl"] = True
    if not _DIRECT:
        kernel[grid](*map(as_triton, arguments), **constants, **options)
        return None
    device = torch._C._cuda_getDevice()
    # `constants` keep the order of their call site, so their values alone tell them apart within one kernel.
    key = (kernel.fn, device, warps, stages, overlap, *_traits(arguments), *constants.values())
    known = _launches.get(key)
    if known is not None and not _hooked():
        stream = torch._C._cuda_getCurrentRawStream(device)
        known.call(*grid, stream, *known.before, *_values(known, arguments), *known.after)
        return known
    compiled = kernel[grid](*map(as_triton, arguments), **constants, **options)
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    after = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    known = _launches[key] = _found(compiled, after)
    return known


class Launcher:
    """A launch of which only the places of its tensors differ from call to call; what else it takes is found once.

    Make one for each size and stride of its tensors, and call it with them.

    Args:
        blocks: of the first tensors, which are `Described`.
        numbers: the parameters after the tensors that are not constexpr.
        kernel, grid, constants, warps, stages: as `launch` takes them.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple,
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 3,
        blocks: Sequence[Sequence[int]] = (),
    ) -> None:
        self._kernel, self._grid, self._numbers, self.blocks = kernel, grid, numbers, blocks
        self._described = len(blocks)
        self._constants, self._warps, self._stages = constants, warps, stages
        self._known: dict[tuple, tuple[_Launch, dict[tuple[int, int], list[Any]]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch with `tensors`, the kernel's first parameters, on the current device and stream."""
        addresses = [tensor.data_ptr() for tensor in tensors if tensor.is_cuda]
        bits = 0
        for address in addresses:
            bits |= address
        # Beside dtypes, Triton compiles for addresses that are no multiples of 16; what is not on the GPU it refuses.
        usual = _DIRECT and bits & 15 == 0 and len(addresses) == len(tensors)
        device = torch._C._cuda_getDevice() if usual else -1
        kind = (device, *[tensor.dtype for tensor in tensors])
        found = self._known.get(kind)
        if found is None or _hooked():
            arguments = self._arguments(tensors)
            known = launch(self._kernel, self._grid, arguments, self._constants, self._warps, self._stages)
            if known is not None and usual:
                self._known[kind] = known, {}
            return
        known, descriptors = found
        values: list[Any] = []
        for place, address in enumerate(addresses):
            if place >= self._described:
                values += addresses[place:]
                break
            if (place, address) not in descriptors:
                if len(descriptors) >= _MOST_DESCRIPTORS:
                    descriptors.clear()
                descriptors[place, address] = known.described(place, Described(tensors[place], self.blocks[place]))
            values += descriptors[place, address]
        stream = torch._C._cuda_getCurrentRawStream(device)
        known.call(*self._grid, stream, *known.before, *values, *self._numbers, *known.after)

    def _arguments(self, tensors: Sequence[torch.Tensor]) -> tuple:
        described = map(Described, tensors, self.blocks)
        return (*described, *tensors[self._described :], *self._numbers)


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
