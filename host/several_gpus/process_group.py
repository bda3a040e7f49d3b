"""The processes of one group on torch.distributed: NCCL between GPUs, gloo on a CPU; made, measured and left."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
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
    "NCCL_NVLS_ENABLE": "0",
}
"""Without these the engine would end ComfyUI itself over a worker that is gone, look for workers on the network, and set up
multicasts that no exchange makes use of."""
_AHEAD = 8
"""Transfers behind which a processor may be queueing work: a GPU's queue that is full would stop it where nobody can wake it."""
_LOOK = 2e-4
_LONGEST_ABORT = 10.0
"""Seconds; nothing can wake NCCL's processes while they are about to meet."""
_SIDE, _PRODUCTS = 4096, 8


class ProcessGroup:
    """One process's place in a group. Whoever waits in it is woken when it ends; what is sent is bytes.

    Args:
        backend: of torch.distributed.
        device: what this process computes on.
    """

    def __init__(self, backend: Any, device: torch.device):
        self._backend = backend
        self._device = device
        self._under_way: deque[torch.cuda.Event] = deque()
        self._met = False
        self.ended = False

    def rank(self) -> int:
        """This process's number."""
        return int(self._backend.rank())

    def alltoall_base(self, received: torch.Tensor, sent: torch.Tensor, *counts: Any) -> Pending:
        """As a backend's. Raises ConnectionAbortedError where the group has ended."""
        return self._begin(self._backend.alltoall_base, received, sent, *counts)

    def send_to_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """Fills every process's tensors, contiguous and of the same shapes, with the first one's."""
        options = distributed.BroadcastOptions()
        options.rootRank = 0
        for tensor in tensors:
            if tensor.numel():
                self._begin(self._backend.broadcast, [as_bytes(tensor)], options).wait()

    def hand_over(self, out: torch.Tensor) -> None:
        """The second process gives the first a result, which awaits it with `take_over`; all others call it too."""
        sent = as_bytes(out.contiguous() if self.rank() == 1 else out.new_empty(0))
        self._from_second(sent.new_empty(0), sent)

    def take_over(self, out: torch.Tensor) -> torch.Tensor:
        """Fills `out`, contiguous, with what the second process hands over."""
        self._from_second(as_bytes(out), as_bytes(out.new_empty(0)))
        return out

    def meet(self) -> None:
        """Sends a little every way: NCCL connects two processes when they first do, and cannot be woken from that."""
        size = self._backend.size()
        little = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self.send_to_all([little])
        counts = [1] * size
        self.alltoall_base(little, little.clone(), counts, counts, distributed.AllToAllOptions()).wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._met = True

    def wait(self, work: Any) -> None:
        """The result is there for what is queued from now on: a GPU's stream waits for it, the processor seldom.

        Raises:
            ConnectionAbortedError: the group has ended.
            InterruptProcessingException: the user interrupts, while this waits for a process that may never come.
        """
        if self._device.type == "cuda":
            work.wait()
            self._under_way.append(event := torch.cuda.Event())
            event.record(torch.cuda.current_stream(self._device))
            if len(self._under_way) > _AHEAD:
                self._look(self._under_way.popleft().query, _LOOK)
            self._still_there()
        else:
            self._look(work.is_completed, 0)
            work.wait()

    def end(self) -> None:
        """No transfer goes on."""
        self.ended = True
        if self._device.type != "cuda":
            _ABANDONED.append(self._backend)
            return
        abort = threading.Thread(target=self._abort, daemon=True)
        abort.start()
        abort.join(_LONGEST_ABORT)
        if abort.is_alive():
            _ABANDONED.append(self._backend)

    def _abort(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._backend.abort()

    def _begin(self, transfer: Callable[..., Any], *arguments: Any) -> Pending:
        self._still_there()
        return Pending(self, transfer(*arguments))

    def _look(self, is_done: Callable[[], bool], seconds: float) -> None:
        while not is_done():
            self._still_there()
            if self._met:  # before, this is a `Meeting`, and who waits for it looks
                comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(seconds)

    def _still_there(self) -> None:
        if self.ended:
            raise ConnectionAbortedError("The group of processes has ended.")

    def _from_second(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        others = [0] * (self._backend.size() - 2)
        counts = [0, received.numel(), *others], [sent.numel(), 0, *others]
        self.alltoall_base(received, sent, *counts, distributed.AllToAllOptions()).wait()


class Pending:
    """A transfer under way."""

    def __init__(self, group: ProcessGroup, work: Any):
        self._group = group
        self._work = work

    def wait(self) -> None:
        """Raises RuntimeError or ConnectionError where another process is gone."""
        self._group.wait(self._work)


_ABANDONED: list[Any] = []
"""Ended groups that cannot be taken apart without waiting for whoever they wait for: gloo's, and NCCL's that never met."""


class Meeting:
    """The processes of some groups connect, in a thread of its own: who waits for it can still be told of a worker's end."""

    def __init__(self, groups: Iterable[ProcessGroup]):
        self._groups = list(groups)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Whether all have met, after so many seconds at most. Raises what kept this process from it."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for group in self._groups:
                group.meet()
        except Exception as error:  # noqa: BLE001  # for whoever asks
            self._error = error


def join(meeting_place: Path, rank: int, size: int, device: torch.device) -> ProcessGroup:
    """This process's place in the group; the processes connect in a `Meeting`.

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
        return ProcessGroup(distributed.ProcessGroupNCCL(store, rank, size, options), device)
    options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = _PATIENCE
    options._threads = 1
    return ProcessGroup(distributed.ProcessGroupGloo(store, rank, size, options), device)


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
    """Whether two of the GPUs cannot reach each other's memory, or NCCL was told not to."""
    indices = [device.index or 0 for device in devices if device.type == "cuda"]
    if len(indices) > 1 and os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return True
    return any(not torch.cuda.can_device_access_peer(a, b) for a in indices for b in indices if a != b)
