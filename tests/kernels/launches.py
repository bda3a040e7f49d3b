"""What kernels would be launched with on a GPU, written down without one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.kernels import launch as launch_module
from lowbit.kernels import matmul_hopper, matmul_rows
from lowbit.kernels.launch import Replay
from lowbit.ops import linear_few_rows
from lowbit.ops import scratch as scratch_module


class Launches(list):
    """What is launched, as the compiled kernels are given it; nothing is compiled."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.compiled = 0
        patch.setattr(launch_module, "_DIRECT", True)
        patch.setattr(launch_module, "_launches", {})
        patch.setattr(launch_module, "_hooked", lambda: False)
        patch.setattr(launch_module, "_launch_by_triton", self._launch)
        patch.setattr(launch_module, "make_tensordesc_arg", self._describe, raising=False)
        patch.setattr(scratch_module, "INTERPRETED", True)  # kept, as a GPU's is
        # One has its narrow tiles done after the wide ones.
        for owner, count in ((linear_few_rows, 132), (matmul_rows, 1), (matmul_hopper, 132)):
            patch.setattr(owner, "multiprocessor_count", lambda index, count=count: count)
        patch.setattr(matmul_hopper, "compute_capability", lambda index: (9, 0))
        for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
            patch.setattr(torch._C, name, lambda *args: 0, raising=False)

    def _launch(self, kernel, grid, arguments, constants, options):
        self.compiled += 1
        before = (kernel.fn.__name__, *options.items())
        known = launch_module._Launch(lambda *given: self.append(given), before, tuple(constants.items()), (1, 2, 3))
        known.call(*grid, 0, *before, *launch_module._values(known, arguments), *known.after)
        return known

    def _describe(self, descriptor, metadata):
        return [(descriptor.base.data_ptr(), metadata, *descriptor.block_shape), *descriptor.shape, *descriptor.strides]


class OnlyViews(TorchDispatchMode):
    """Fails at every operation of PyTorch but a view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view, func
        return func(*args, **(kwargs or {}))


class WatchedReplay(Replay):
    """Its function must do nothing that a later call would leave out, and is called once."""

    __slots__ = ("called",)

    def record(self, addresses, function, *arguments):
        def watched(*arguments):
            assert not hasattr(self, "called")
            self.called = True
            with OnlyViews():
                function(*arguments)

        super().record(addresses, watched, *arguments)
