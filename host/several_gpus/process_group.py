"""The processes of one group on torch.distributed: NCCL between GPUs, gloo on a CPU; made, measured and left."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from .plain_data import as_bytes

_MEETING = datetime.timedelta(seconds=120)
_PATIENCE = datetime.timedelta(days=1)
"""A step may take as long as it likes: who is gone is noticed by its connection, not by the clock."""
_LOOPBACK = "127.0.0.1"
_ENGINE = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Without these the engine would end ComfyUI itself over a worker that is gone, and look for workers on the network."""
_SIDE, _PRODUCTS = 4096, 8


class ProcessGroup:
    """One process's place in a group. Whoever waits in it is woken when it ends; what is sent is bytes.

    Args:
        backend: of torch.distributed.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self._on_gpu = not isinstance(backend, distributed.ProcessGroupGloo)
        self.ended = False

    def rank(self) -> int:
        """This process's number."""
        return int(self._backend.rank())

    def alltoall_base(self, received: torch.Tensor, sent: torch.Tensor, *counts: Any) -> Pending:
        """As a backend's."""
        return Pending(self, self._backend.alltoall_base(received, sent, *counts))

    def send_to_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """Fills every process's tensors, contiguous and of the same shapes, with the first one's."""
        options = distributed.BroadcastOptions()
        options.rootRank = 0
        for tensor in tensors:
            if tensor.numel():
                Pending(self, self._backend.broadcast([as_bytes(tensor)], options)).wait()

    def hand_over(self, out: torch.Tensor) -> None:
        """The second process gives the first a result, which awaits it with `take_over`; all others call it too."""
        sent = as_bytes(out.contiguous() if self.rank() == 1 else out.new_empty(0))
        self._from_second(sent.new_empty(0), sent)

    def take_over(self, out: torch.Tensor) -> torch.Tensor:
        """Fills `out`, contiguous, with what the second process hands over."""
        self._from_second(as_bytes(out), as_bytes(out.new_empty(0)))
        return out

    def _from_second(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        others = [0] * (self._backend.size() - 2)
        counts = [0, received.numel(), *others], [sent.numel(), 0, *others]
        self.alltoall_base(received, sent, *counts, distributed.AllToAllOptions()).wait()

    def wait(self, work: Any) -> None:
        """A GPU's stream waits by itself, and goes on when the group is aborted; a processor has to look."""
        if self._on_gpu:
            work.wait()
            return
        while not work.is_completed():
            if self.ended:
                raise ConnectionAbortedError("The group of processes has ended.")
            time.sleep(0)
        work.wait()

    def end(self) -> None:
        """No transfer goes on."""
        self.ended = True
        if self._on_gpu:
            with contextlib.suppress(RuntimeError):
                self._backend.abort()
        else:
            _ABANDONED.append(self._backend)


class Pending:
    """A transfer under way."""

    def __init__(self, group: ProcessGroup, work: Any):
        self._group = group
        self._work = work

    def wait(self) -> None:
        """Raises RuntimeError or ConnectionError where another process is gone."""
        self._group.wait(self._work)


_ABANDONED: list[Any] = []
"""Gloo's ended groups: to take one apart would wait for whoever it waits for."""


def join(meeting_place: Path, rank: int, size: int, device: torch.device) -> ProcessGroup:
    """The group, once all `size` processes are there.

    Args:
        meeting_place: a file in a folder that other users cannot read; a new one for every group.
        rank: this process's.
        size: how many processes there are.
        device: what this process computes on.
    """
    store = distributed.FileStore(str(meeting_place), size)
    store.set_timeout(_MEETING)
    if device.type == "cuda":
        for name, value in _ENGINE.items():
            os.environ.setdefault(name, value)
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = _PATIENCE
        return ProcessGroup(distributed.ProcessGroupNCCL(store, rank, size, options))
    options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = _PATIENCE
    options._threads = 1
    return ProcessGroup(distributed.ProcessGroupGloo(store, rank, size, options))


def speed(device: torch.device) -> float:
    """Products of 16-bit matrices a second, by which unequal GPUs are given unequal parts; 1 without a GPU."""
    if device.type != "cuda":
        return 1.0
    matrix = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    torch.mm(matrix, matrix)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(_PRODUCTS):
        torch.mm(matrix, matrix)
    torch.cuda.synchronize(device)
    return _PRODUCTS / (time.perf_counter() - began)


def slow_links(devices: Sequence[torch.device]) -> bool:
    """Whether two of the GPUs cannot reach each other's memory."""
    indices = [device.index or 0 for device in devices if device.type == "cuda"]
    return any(not torch.cuda.can_device_access_peer(a, b) for a in indices for b in indices if a != b)
