"""A second launch goes straight to the compiled kernel, and only where Triton would have taken the same one."""

from __future__ import annotations

import types

import pytest
import torch

from lowbit.kernels import launch as module
from lowbit.kernels.launch import Described, Launcher, launch

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


def launcher(kernel: Kernel, **options) -> Launcher:
    return Launcher(kernel, (2, 1, 1), (32, 0.5), {"BLOCK": 64, "FAST": True}, warps=8, stages=2, **options)


def test_a_launcher_launches_as_launch_does():
    kernel, x, y = Kernel(), tensor(4), tensor(8)
    several = launcher(kernel)
    for first in (x, y, x):
        several(first, y)
    launch(kernel, (2, 1, 1), (x, y, 32, 0.5), {"BLOCK": 64, "FAST": True}, warps=8, stages=2)
    assert len(kernel.usual) == 1
    assert [call[13] for call in kernel.direct] == [y.data_ptr(), x.data_ptr(), x.data_ptr()]
    assert {call[:13] + call[14:] for call in kernel.direct} == {kernel.direct[0][:13] + kernel.direct[0][14:]}


@pytest.mark.parametrize(
    "odd", [tensor(4, offset=1), tensor(4).as_subclass(torch.Tensor), tensor(4, dtype=torch.float16)]
)
def test_a_launcher_sends_tensors_of_another_kind_the_usual_way(odd):
    kernel, x = Kernel(), tensor(4)
    several = launcher(kernel)
    for _ in range(2):
        several(x, x)
    assert (len(kernel.usual), len(kernel.direct)) == (1, 1)
    several(x, odd)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 1)
    several(x, x)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 2)


def test_a_launcher_knows_each_gpu_by_itself(monkeypatch):
    kernel, x = Kernel(), tensor(4)
    several = launcher(kernel)
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda device=device: device, raising=False)
        several(x, x)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 2)


def test_a_launcher_leaves_launches_to_triton_under_a_profiler(monkeypatch):
    kernel, x = Kernel(), tensor(4)
    several = launcher(kernel)
    several(x, x)
    monkeypatch.setattr(module, "_hooked", lambda: True)
    several(x, x)
    assert (len(kernel.usual), len(kernel.direct)) == (2, 0)


def test_a_launcher_makes_a_descriptor_once_for_a_place_in_memory(monkeypatch):
    made = []

    def make(argument, metadata):
        made.append((metadata, argument.base.data_ptr(), tuple(argument.block_shape)))
        return [f"map {len(made)}", *argument.base.shape]

    monkeypatch.setattr(module, "make_tensordesc_arg", make, raising=False)
    kernel, x, y = Kernel(described=True), tensor(64, 32), tensor(64, 32)
    several = launcher(kernel, blocks=((16, 32), (8, 32)))
    for first, second in ((x, x), (x, x), (y, x), (x, x)):
        several(first, second)
    assert len(kernel.usual) == 1
    places = [x.data_ptr(), x.data_ptr(), y.data_ptr()]
    assert made == list(zip(["first", "second", "first"], places, [(16, 32), (8, 32), (16, 32)], strict=True))
    given = [call[13:19] for call in kernel.direct]
    assert given == [(name, 64, 32, "map 2", 64, 32) for name in ("map 1", "map 3", "map 1")]


def test_launches_and_descriptors_are_kept_in_bounds(monkeypatch):
    monkeypatch.setattr(module, "_MOST_LAUNCHES", 4)
    monkeypatch.setattr(module, "_MOST_DESCRIPTORS", 4)
    monkeypatch.setattr(module, "make_tensordesc_arg", lambda argument, metadata: [0], raising=False)
    kernel, kept = Kernel(described=True), [tensor(64, 32) for _ in range(12)]
    several = launcher(kernel, blocks=((16, 32), (8, 32)))
    for number, x in enumerate(kept):
        several(x, x)
        launch(
            kernel, (1, 1, 1), (Described(x, (16, 32)), Described(x, (8, 32)), number, 0.5), {"BLOCK": 64, "FAST": True}
        )
        assert len(module._launches) <= 4
        assert all(len(descriptors) <= 4 for _, descriptors in several._known.values())
