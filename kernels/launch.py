"""Launching a compiled kernel again at a few microseconds of host time: Triton's own launch takes tens."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
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
    else:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        known = _launches[key] = _launch_by_triton(kernel, grid, arguments, constants, options)
    if _recorder.made is not None:
        _recorder.made.append((known, grid, arguments))


def _launch_by_triton(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple, constants: dict[str, Any], options: dict[str, Any]
) -> _Launch | None:
    compiled = kernel[grid](*map(as_triton, arguments), **constants, **options)
    return _found(compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]))


_Made = tuple[_Launch | None, tuple[int, int, int], tuple]
"""What `launch` launched: the kernel, the grid and the arguments."""


class _Recorder(threading.local):
    """What `launch` launched on this thread, for the `Replay` that is waiting for it."""

    made: list[_Made] | None = None


_recorder = _Recorder()


class _Relaunch(NamedTuple):
    """One launch of a `Replay`: everything but addresses is in place.

    Attributes:
        call: as in `_Launch`.
        template: all that it takes, as it was the first time.
        places: of addresses among that, and which of the addresses each is.
        descriptors: the same of tensor descriptors.
    """

    call: Callable[..., None]
    template: list[Any]
    places: list[tuple[int, int]]
    descriptors: list[tuple[int, int, _Descriptors]]


def _relaunch(
    known: _Launch | None, grid: tuple[int, int, int], arguments: tuple, addresses: Sequence[int]
) -> _Relaunch:
    """Raises ValueError for what only Triton launches, or a tensor that is at none of `addresses` or at several."""
    if known is None:
        raise ValueError
    again = _Relaunch(known.call, [*grid, 0, *known.before], [], [])
    template = again.template
    for argument in arguments:
        place, kind = len(template), type(argument)
        if kind is int or kind is float:
            template.append(argument)
            continue
        slot = _only(addresses, (argument.tensor if kind is Described else argument).data_ptr())
        if kind is Described:
            descriptors = _Descriptors(as_triton(argument), known.metadata[len(again.descriptors)])
            again.descriptors.append((place, slot, descriptors))
            template += descriptors[addresses[slot]]
        else:
            again.places.append((place, slot))
            template.append(addresses[slot])
    template += known.after
    return again


_STREAM = 3
"""Its place among what a compiled kernel's launcher takes."""


def _only(addresses: Sequence[int], address: int) -> int:
    if addresses.count(address) != 1:
        raise ValueError
    return addresses.index(address)


class _Address(int):
    """Stands in for the tensor there."""

    def data_ptr(self) -> int:
        return self


class _Descriptors(dict[int, list[Any]]):
    """Address -> what a launch takes for the descriptor of a tensor there: that of the first tensor, moved."""

    def __init__(self, descriptor: Any, metadata: Any) -> None:
        super().__init__()
        self._descriptor, self._metadata = self._moved(descriptor, 0), metadata

    def __missing__(self, address: int) -> list[Any]:
        if len(self) >= _MOST_DESCRIPTORS:
            self.clear()
        made = self[address] = make_tensordesc_arg(self._moved(self._descriptor, address), self._metadata)
        return made

    @staticmethod
    def _moved(descriptor: Any, address: int) -> Any:
        moved = copy.copy(descriptor)
        moved.base = _Address(address)
        return moved


def addresses_of(aligned: list[int], *tensors: torch.Tensor | None) -> list[int] | None:
    """`aligned`, which are on multiples of 16 bytes, and those of `tensors`.

    None where another is on none: Triton compiles another kernel for it.
    """
    addresses, bits = aligned.copy(), 0
    for tensor in tensors:
        if tensor is not None:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
    return None if bits & 15 else addresses


class Replay:
    """Launches what a function launched before, for other tensors: only their places differ from call to call.

    Make one for one GPU and for each function, size, stride and dtype of its tensors.
    """

    __slots__ = ("_device", "_launches")

    def __init__(self) -> None:
        self._device = 0
        self._launches: tuple[_Relaunch, ...] = ()

    def again(self, addresses: list[int] | None) -> bool:
        """Launch what was recorded, on the current stream; False: nothing is, or only Triton can launch now.

        Args:
            addresses: of all tensors that the kernels take, in the same order each time; None: they are not aligned.
        """
        launches = self._launches
        if not launches or addresses is None or _hooked():
            return False
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for call, template, places, descriptors in launches:
            given = template.copy()
            given[_STREAM] = stream
            for place, slot in places:
                given[place] = addresses[slot]
            for place, slot, known in descriptors:
                given[place] = known[addresses[slot]][0]
            call(*given)
        return True

    def record(self, addresses: list[int] | None, function: Callable[..., None], *arguments: Any) -> None:
        """function(*arguments), which launches on the current stream and does nothing besides; `addresses` as for `again`."""
        made: list[_Made] = []
        _recorder.made = made
        try:
            function(*arguments)
        finally:
            _recorder.made = None
        if addresses is not None and made:
            with contextlib.suppress(ValueError):
                relaunches = tuple(_relaunch(*one, addresses) for one in made)
                self._device, self._launches = torch._C._cuda_getDevice(), relaunches


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
