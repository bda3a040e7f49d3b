"""A machine made smaller, for stock ComfyUI as for the pack, and what a server takes of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.checkpoints import GIB
from benchmarks.memory_group import MemoryGroup, create_group, launcher

_BLOCK = 1 << 28


@dataclass(frozen=True)
class SmallerMachine:
    """What a server is started in. group: its cgroup; launcher: what enters it and tells the server of it."""

    group: MemoryGroup | None = None
    launcher: Sequence[str] = ()


WHOLE_MACHINE = SmallerMachine()


@contextlib.contextmanager
def smaller_machine(vram: int | None, host: int | None) -> Iterator[SmallerMachine]:
    """Leaves `vram` bytes of the GPU free, the server's CUDA context to come out of them, and caps its main memory.

    The GPU: this process holds the rest, so that the driver has no more to give. Main memory: a cgroup that the server is
    started in and told of. No allocator and no accounting of ComfyUI's or the pack's is told anything else.
    None leaves a side alone. Raises RuntimeError where no cgroup can cap main memory.
    """
    with contextlib.ExitStack() as stack:
        if vram is not None:
            stack.enter_context(_held_gpu(vram))
        if host is None:
            yield SmallerMachine()
            return
        group = create_group(host)
        if group is None:
            raise RuntimeError("no cgroup can cap main memory here")
        stack.callback(group.close)
        yield SmallerMachine(group, launcher(group, host))


@contextlib.contextmanager
def _held_gpu(vram: int) -> Iterator[None]:
    """The allocator takes up to 20 MiB at once: that much less than `vram` may be left."""
    held = []
    try:
        while (over := torch.cuda.mem_get_info()[0] - vram) > 0:
            held.append(torch.empty(min(_BLOCK, over), dtype=torch.uint8, device="cuda"))
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


@dataclass
class Usage:
    """The most a server took, in bytes.

    Attributes:
        vram: of the GPU, by the driver's count.
        resident: pages mapped into its process, those of files among them.
        anonymous: main memory that no file backs, memory registered with CUDA included.
        unreclaimable: all that its cgroup was charged but the page cache; None without a cgroup.
        charged: the same with the page cache, which fills what there is.
        kills: how often the kernel ended it for want of main memory.
    """

    vram: int | None = None
    resident: int = 0
    anonymous: int = 0
    unreclaimable: int | None = None
    charged: int | None = None
    kills: int = 0


@contextlib.contextmanager
def watched(process: int, baseline: int | None, usage: Usage, group: MemoryGroup | None = None) -> Iterator[None]:
    """Looks at a server from outside, ten times a second, and keeps the most it took in `usage`.

    baseline: `vram_used()` before the server was started, so that its CUDA context counts as its own.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            _note(process, baseline, usage, group)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _note(process, baseline, usage, group)


def _note(process: int, baseline: int | None, usage: Usage, group: MemoryGroup | None) -> None:
    used = vram_used()
    if used is not None and baseline is not None:
        usage.vram = max(usage.vram or 0, used - baseline)
    with contextlib.suppress(psutil.Error, OSError):
        if group is not None:
            usage.unreclaimable = max(usage.unreclaimable or 0, group.unreclaimable())
            usage.charged, usage.kills = group.peak(), group.kills()
        usage.resident = max(usage.resident, psutil.Process(process).memory_info().rss)
        usage.anonymous = max(usage.anonymous, _anonymous(process))


def vram_used() -> int | None:
    """Bytes of the GPU in use, by any process, this one's CUDA context among them; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _anonymous(process: int) -> int:
    """Main memory that no file backs: what no other use of the machine can take back."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = {
        line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem"))
    }
    return sum(sizes.values())


def wait_for_gpu(vram: int | None) -> None:
    """After a server's end the driver takes a moment to count its memory as free. Raises RuntimeError where it stays taken."""
    deadline = time.monotonic() + 30
    while vram is not None and torch.cuda.mem_get_info()[0] < vram:
        if time.monotonic() > deadline:
            raise RuntimeError(f"another process holds the GPU: less than {vram / GIB:.0f} GiB are free")
        time.sleep(0.5)
