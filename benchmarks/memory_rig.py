"""A machine made smaller, for stock ComfyUI as for the pack, and what a server takes of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import torch

from benchmarks.checkpoints import GIB
from benchmarks.memory_group import MemoryGroup, create_group, launcher

_BLOCK = 1 << 28


class SmallerMachine:
    """Leaves `vram` bytes of the GPU free, the server's CUDA context to come out of them, and caps its main memory.

    The GPU: this process holds the rest, so that the driver has no more to give. Main memory: a cgroup that the server is
    started in and told of (`launcher`). No allocator and no accounting of ComfyUI's or the pack's is told anything else.
    None leaves a side alone. Raises RuntimeError where no cgroup can cap main memory.
    """

    def __init__(self, vram: int | None, host: int | None):
        self._held: list[torch.Tensor] = []
        self.group: MemoryGroup | None = None
        self.launcher: list[str] = []
        try:
            if vram is not None:
                self._hold_gpu(vram)
            if host is not None:
                self._cap_host(host)
        except BaseException:
            self.close()
            raise

    def _hold_gpu(self, vram: int) -> None:
        """The allocator takes up to 20 MiB at once: that much less may be left."""
        while (over := torch.cuda.mem_get_info()[0] - vram) > 0:
            self._held.append(torch.empty(min(_BLOCK, over), dtype=torch.uint8, device="cuda"))

    def _cap_host(self, host: int) -> None:
        self.group = create_group(host)
        if self.group is None:
            raise RuntimeError("no cgroup can cap main memory here")
        self.launcher = launcher(self.group, host)

    def close(self) -> None:
        """Gives everything back; what still runs in the cgroup is ended."""
        if self._held:
            self._held.clear()
            torch.cuda.empty_cache()
        if self.group is not None:
            self.group.close()

    def __enter__(self) -> SmallerMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


@dataclass
class Watch:
    """Looks at a server from outside, ten times a second, until it is closed.

    baseline: `vram_used()` before the server was started, so that its CUDA context counts as its own.
    """

    process: int
    baseline: int | None
    usage: Usage = field(default_factory=Usage)
    group: MemoryGroup | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self._note()

    def _note(self) -> None:
        usage = self.usage
        used = vram_used()
        if used is not None and self.baseline is not None:
            usage.vram = max(usage.vram or 0, used - self.baseline)
        try:
            if self.group is not None:
                usage.unreclaimable = max(usage.unreclaimable or 0, self.group.unreclaimable())
                usage.charged, usage.kills = self.group.peak(), self.group.kills()
            usage.resident = max(usage.resident, psutil.Process(self.process).memory_info().rss)
            usage.anonymous = max(usage.anonymous, _anonymous(self.process))
        except (psutil.Error, OSError):
            return

    def close(self) -> Usage:
        """Ends it; returns the most there was."""
        self._stop.set()
        self._thread.join()
        self._note()
        return self.usage


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


def wait_for_gpu(vram: int | None, seconds: float = 30) -> None:
    """After a server's end the driver takes a moment to count its memory as free. Raises RuntimeError where it stays taken."""
    deadline = time.monotonic() + seconds
    while vram is not None and torch.cuda.mem_get_info()[0] < vram:
        if time.monotonic() > deadline:
            raise RuntimeError(f"another process holds the GPU: less than {vram / GIB:.0f} GiB are free")
        time.sleep(0.5)
