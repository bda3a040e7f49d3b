"""A second launch goes straight to the compiled kernel, and only where Triton would have taken the same one."""

from __future__ import annotations

import itertools
import types
import weakref
from threading import Thread

import pytest
import torch

from lowbit.kernels import launch as module
from lowbit.kernels.launch import Described, Replay, addresses_of, launch

DEVICE, STREAM = 3, 77


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def tensor(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    """`offset` elements behind a multiple of 16 bytes."""
    memory = torch.zeros(offset + 16 + torch.Size(shape).numel(), dtype=dtype)
    return memory[offset : offset + torch.Size(shape).numel()].view(shape).as_subclass(OnGpu)


class Kernel:
    """Stands in for a `triton.jit` function of Triton 3.6: counts what is launched by it, and what without it."""

    arg_names = ("x", "y", "n", "scale", "BLOCK", "FAST")

    def __init__(self, scratch: int = 0, described: bool = False):
        self.fn, self.usual, self.direct = object(), [], []
        self.scratch, self.described = scratch, described

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.usual.append((grid, arguments, options))
            launcher = types.SimpleNamespace(
                launch_cooperative_grid=0,
                launch_pdl=int(options.get("launch_pdl", False)),
                global_scratch_size=self.scratch,
                profile_scratch_size=0,
                launch=self._wrapped() if self.described else print,
            )
            if not self.described:
                launcher.launch = types.MethodType(Kernel._launch, self)
            return types.SimpleNamespace(run=launcher, function=11, packed_metadata=(4, 1, 0))

        return run

    def _launch(self, *arguments):
        self.direct.append(arguments)

    def _wrapped(self):
        launcher, tensordesc_meta = self._launch, ["first", "second"]

        def inner(*arguments):
            return launcher(tensordesc_meta)

        return inner


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """As on a GPU with Triton 3.6."""
    monkeypatch.setattr(module, "_DIRECT", True)
    monkeypatch.setattr(module, "_launches", {})
    monkeypatch.setattr(module, "_hooked", lambda: False)
    for name, value in (("_cuda_getDevice", lambda: DEVICE), ("_cuda_getCurrentRawStream", lambda device: STREAM)):
        monkeypatch.setattr(torch._C, name, value, raising=False)


def test_the_second_launch_is_given_what_the_first_was_compiled_for():
    kernel, x, y = Kernel(), tensor(4), tensor(8)
    for first in (x, y):
        launch(kernel, (2, 3, 1), (first, y, 32, 0.5), {"FAST": True, "BLOCK": 64}, warps=8, stages=2, overlap=True)
    options = {"FAST": True, "BLOCK": 64, "num_warps": 8, "num_stages": 2, "launch_pdl": True}
    assert kernel.usual == [((2, 3, 1), (x, y, 32, 0.5), options)]
    before = (11, 0, 1, None, None, (4, 1, 0), None, None, None)
    values = (y.data_ptr(), y.data_ptr(), 32, 0.5)
    assert kernel.direct == [(2, 3, 1, STREAM, *before, *values, 64, True)], "constants in the kernel's order"


@pytest.mark.parametrize(
    "other",
    [
        ((tensor(4, offset=1), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True}, {}),
        ((tensor(4, dtype=torch.float16), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True}, {}),
        ((tensor(4), tensor(4), 1, 0.5), {"BLOCK": 64, "FAST": True}, {}),
        ((tensor(4), tensor(4), 33, 0.5), {"BLOCK": 64, "FAST": True}, {}),
        ((tensor(4), tensor(4), 1 << 40, 0.5), {"BLOCK": 64, "FAST": True}, {}),
        ((tensor(4), tensor(4), 32, 0.5), {"BLOCK": 128, "FAST": True}, {}),
        ((tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": False}, {}),
        ((tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True}, {"warps": 8}),
        ((tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True}, {"stages": 1}),
        ((tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True}, {"overlap": True}),
    ],
)
def test_what_triton_compiles_another_kernel_for_is_launched_as_usual(other):
    kernel = Kernel()
    launch(kernel, (1, 1, 1), (tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True})
    arguments, constants, options = other
    launch(kernel, (1, 1, 1), arguments, constants, **options)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 0)
    launch(kernel, (1, 1, 1), arguments, constants, **options)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 1)


def test_tensors_that_are_not_on_the_gpu_are_tritons_to_refuse():
    kernel, here = Kernel(), tensor(4)
    there = here.as_subclass(torch.Tensor)
    launch(kernel, (1, 1, 1), (here, here, 32, 0.5), {"BLOCK": 64, "FAST": True})
    launch(kernel, (1, 1, 1), (here, there, 32, 0.5), {"BLOCK": 64, "FAST": True})
    assert (len(kernel.usual), len(kernel.direct)) == (2, 0)


@pytest.mark.parametrize("reason", ["another Triton", "a profiler", "scratch memory", "a launcher of another build"])
def test_every_launch_is_tritons_own_with(reason, monkeypatch):
    kernel = Kernel(scratch=64 if reason == "scratch memory" else 0)
    if reason == "another Triton":
        monkeypatch.setattr(module, "_DIRECT", False)
    if reason == "a profiler":
        monkeypatch.setattr(module, "_hooked", lambda: True)
    if reason == "a launcher of another build":
        kernel.described = True
        kernel._wrapped = lambda: lambda *arguments: None
    for _ in range(3):
        launch(kernel, (1, 1, 1), (tensor(4), tensor(4), 32, 0.5), {"BLOCK": 64, "FAST": True})
    assert (len(kernel.usual), len(kernel.direct)) == (3, 0)


def run(replay: Replay, addresses: list[int] | None, function, *arguments) -> None:
    """As products do it."""
    if not replay.again(addresses):
        replay.record(addresses, function, *arguments)


def replayed(kernel: Kernel, replay: Replay, first: torch.Tensor, second: torch.Tensor) -> None:
    """Two launches, of which the second takes the tensors the other way round."""

    def function(first: torch.Tensor, second: torch.Tensor) -> None:
        launch(kernel, (2, 1, 1), (first, second, 32, 0.5), {"BLOCK": 64, "FAST": True}, warps=8, stages=2)
        launch(kernel, (3, 1, 1), (second, first, 48, 0.5), {"BLOCK": 64, "FAST": True})

    run(replay, addresses_of([], first, None, second), function, first, second)


def test_a_replay_launches_what_the_function_did():
    kernel, replay, x, y, z = Kernel(), Replay(), tensor(4), tensor(8), tensor(4)
    for first in (x, y, z):
        replayed(kernel, replay, first, y if first is not y else x)
    assert len(kernel.usual) == 2
    given = [(call[:4], call[13:]) for call in kernel.direct]
    places = [(y, x), (x, y), (z, y), (y, z)]
    expected = [
        ((grid, 1, 1, STREAM), (one.data_ptr(), other.data_ptr(), number, 0.5, 64, True))
        for (one, other), grid, number in zip(places, (2, 3) * 2, (32, 48) * 2, strict=True)
    ]
    assert given == expected
    assert {call[4:13] for call in kernel.direct} == {(11, 0, 0, None, None, (4, 1, 0), None, None, None)}


@pytest.mark.parametrize(
    "reason", ["off 16 bytes", "twice the same", "one that is not told of", "a profiler", "scratch memory"]
)
def test_what_cannot_be_replayed_is_done_by_the_function(reason, monkeypatch):
    kernel, replay, x = Kernel(scratch=64 if reason == "scratch memory" else 0), Replay(), tensor(4)
    other = {"off 16 bytes": tensor(4, offset=1), "twice the same": x}.get(reason, tensor(4))
    if reason == "a profiler":
        monkeypatch.setattr(module, "_hooked", lambda: True)
    calls = []

    def function():
        calls.append(1)
        launch(kernel, (1, 1, 1), (x, other, 32, 0.5), {"BLOCK": 64, "FAST": True})

    told = (x,) if reason == "one that is not told of" else (x, other)
    for _ in range(3):
        run(replay, addresses_of([], *told), function)
    assert len(calls) == 3
    assert len(kernel.usual) + len(kernel.direct) == 3


def test_a_replay_takes_no_other_threads_launches_and_none_of_a_call_that_failed():
    kernel, other, replay, x = Kernel(), Kernel(), Replay(), tensor(4)

    def function(fails: bool):
        launch(kernel, (1, 1, 1), (x, x, 32, 0.5), {"BLOCK": 64, "FAST": True})
        thread = Thread(target=launch, args=(other, (1, 1, 1), (x, x, 32, 0.5), {"BLOCK": 64, "FAST": True}))
        thread.start()
        thread.join()
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(replay, addresses_of([], x), function, True)
    for _ in range(3):
        run(replay, addresses_of([], x), function, False)
    assert (len(kernel.usual), len(kernel.direct)) == (1, 3)
    assert (len(other.usual), len(other.direct)) == (1, 1)


def described(kernel: Kernel, replay: Replay, first: torch.Tensor, second: torch.Tensor) -> None:
    def function():
        arguments = Described(first, (16, 32)), Described(second, (8, 32)), 32, 0.5
        launch(kernel, (2, 1, 1), arguments, {"BLOCK": 64, "FAST": True})

    run(replay, addresses_of([], first, second), function)


def test_a_replay_makes_a_descriptor_once_for_a_place_in_memory(monkeypatch):
    made = []

    def make(argument, metadata):
        made.append((metadata, argument.base.data_ptr(), tuple(argument.block_shape)))
        return [f"map {len(made)}", *argument.shape]

    monkeypatch.setattr(module, "make_tensordesc_arg", make, raising=False)
    kernel, replay, x, y, z = Kernel(described=True), Replay(), tensor(64, 32), tensor(64, 32), tensor(64, 32)
    for first, second in ((x, z), (x, z), (y, z), (x, z)):
        described(kernel, replay, first, second)
    assert len(kernel.usual) == 1
    places = [x.data_ptr(), z.data_ptr(), y.data_ptr()]
    assert made == list(zip(["first", "second", "first"], places, [(16, 32), (8, 32), (16, 32)], strict=True))
    given = [call[13:19] for call in kernel.direct]
    assert given == [(name, 64, 32, "map 2", 64, 32) for name in ("map 1", "map 3", "map 1")]


def test_launches_and_descriptors_are_kept_in_bounds(monkeypatch):
    monkeypatch.setattr(module, "_MOST_LAUNCHES", 4)
    monkeypatch.setattr(module, "_MOST_DESCRIPTORS", 4)
    monkeypatch.setattr(module, "make_tensordesc_arg", lambda argument, metadata: [0], raising=False)
    kernel, replay, kept = Kernel(described=True), Replay(), [tensor(64, 32) for _ in range(12)]
    for number, (x, y) in enumerate(itertools.pairwise(kept)):
        described(kernel, replay, x, y)
        arguments = Described(x, (16, 32)), Described(y, (8, 32)), number, 0.5
        launch(kernel, (1, 1, 1), arguments, {"BLOCK": 64, "FAST": True})
        assert len(module._launches) <= 4
        (again,) = replay._launches
        assert all(len(descriptors) <= 4 for *_, descriptors in again.descriptors)


def test_a_replay_keeps_no_tensor_alive(monkeypatch):
    monkeypatch.setattr(module, "make_tensordesc_arg", lambda argument, metadata: [0], raising=False)
    kernel, replay, x, y = Kernel(described=True), Replay(), tensor(64, 32), tensor(64, 32)
    for _ in range(2):
        described(kernel, replay, x, y)
    assert len(kernel.direct) == 1
    kernel.usual.clear()
    gone = weakref.ref(x)
    del x
    assert gone() is None
