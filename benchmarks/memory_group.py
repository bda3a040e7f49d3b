"""A cgroup with a memory limit. Run as a script it enters one and starts a program that takes the limit for the machine.

    python memory_group.py GROUP LIMIT main.py [ARGUMENT ...]

Imports neither torch nor the pack, since the program it starts has not set them up yet.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_numbers = itertools.count()


@dataclass(frozen=True)
class Layout:
    """The files of a memory cgroup, and the lines of its statistics that count the page cache."""

    limit: str
    swap: str
    current: str
    peak: str
    events: str
    file: tuple[str, ...]


V2 = Layout(
    "memory.max",
    "memory.swap.max",
    "memory.current",
    "memory.peak",
    "memory.events",
    ("active_file", "inactive_file"),
)
V1 = Layout(
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
    ("total_active_file", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryGroup:
    """A memory cgroup that exists, or a folder with the same files. Sizes in bytes."""

    folder: Path

    @property
    def layout(self) -> Layout:
        """Of the cgroup version that this is of."""
        return V2 if (self.folder / V2.limit).exists() else V1

    def enter(self) -> None:
        """Moves this process in; what it has allocated before stays charged where it was."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, nbytes: int) -> None:
        """Caps memory, without swap. Raises OSError where the kernel does not take it."""
        (self.folder / self.layout.limit).write_text(str(nbytes))
        if int((self.folder / self.layout.limit).read_text()) > nbytes:
            raise OSError(f"{self.folder} does not keep its limit")
        with suppress(OSError):  # a kernel without swap accounting has no such file
            (self.folder / self.layout.swap).write_text("0" if self.layout == V2 else str(nbytes))

    def unreclaimable(self) -> int:
        """All that is charged but the page cache, which the kernel takes back when it must."""
        found = _pairs(self.folder / "memory.stat")
        cached = sum(found.get(name, 0) for name in self.layout.file)
        return max(0, int((self.folder / self.layout.current).read_text()) - cached)

    def peak(self) -> int | None:
        """The most that was charged, page cache included; None where the kernel does not say."""
        with suppress(OSError, ValueError):
            return int((self.folder / self.layout.peak).read_text())
        return None

    def kills(self) -> int:
        """Processes that the kernel ended here for want of memory."""
        return _pairs(self.folder / self.layout.events).get("oom_kill", 0)

    def close(self, seconds: float = 5) -> None:
        """Ends what still runs in it and removes it."""
        deadline = time.monotonic() + seconds
        while self.folder.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                for process in (self.folder / "cgroup.procs").read_text().split():
                    os.kill(int(process), signal.SIGKILL)
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)


def _pairs(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def create_group(nbytes: int) -> MemoryGroup | None:
    """A new cgroup below this process's own, capped at `nbytes`; None where cgroups cannot be used."""
    for parent in _parents():
        folder = parent / f"lowbit-{os.getpid()}-{next(_numbers)}"
        group = MemoryGroup(folder)
        try:
            folder.mkdir()
            group.limit(nbytes)
            if (folder / "cgroup.procs").exists():
                return group
        except (OSError, ValueError):
            pass
        with suppress(OSError):
            folder.rmdir()
    return None


def _parents() -> list[Path]:
    """Groups that may get children: ours in each hierarchy that counts memory, mounted now where none is yet."""
    found = memory_hierarchies(Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    if not found and os.geteuid() == 0:
        folder = Path(tempfile.mkdtemp(prefix="lowbit-cgroup-"))
        subprocess.run(["mount", "-t", "cgroup2", "none", str(folder)], capture_output=True, check=False)
        found = [folder] if "memory" in _words(folder / "cgroup.controllers") else []
    return [parent for group in found for parent in [*_enabled(group), *_enabled_above(group)]]


def _enabled(group: Path) -> list[Path]:
    """The group, if its children can count memory."""
    return [group] if not (group / "cgroup.subtree_control").exists() or _enable(group) else []


def _enabled_above(group: Path) -> list[Path]:
    """Groups above it whose children count memory already: one with other processes in it cannot be made to."""
    return [parent for parent in group.parents if "memory" in _words(parent / "cgroup.subtree_control")]


def memory_hierarchies(mounts: str, own: str) -> list[Path]:
    """This process's group in each mounted hierarchy with the memory controller, from /proc/mounts and /proc/self/cgroup."""
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in own.splitlines() if line.count(":") >= 2}
    found = []
    for line in mounts.splitlines():
        _, root, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), "/")
        elif kind == "cgroup2" and "memory" in _words(Path(root) / "cgroup.controllers"):
            path = paths.get("", "/")
        else:
            continue
        group = Path(root) / path.lstrip("/")
        found.append(group if group.is_dir() else Path(root))
    return found


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _enable(parent: Path) -> bool:
    """Hands the memory controller to the children; a group other than the root must then have no process of its own."""
    for attempt in range(2):
        if "memory" in _words(parent / "cgroup.subtree_control"):
            return True
        with suppress(OSError):
            (parent / "cgroup.subtree_control").write_text("+memory")
            continue
        if attempt == 0:
            with suppress(OSError):
                leaf = MemoryGroup(parent / "lowbit-rest")
                leaf.folder.mkdir(exist_ok=True)
                leaf.enter()
    return "memory" in _words(parent / "cgroup.subtree_control")


def launcher(group: MemoryGroup, nbytes: int) -> list[str]:
    """What goes between `python` and a program to start it in the group."""
    return [str(Path(__file__).resolve()), str(group.folder), str(nbytes)]


def limited_memory(group: MemoryGroup, nbytes: int) -> Callable[[], object]:
    """A `psutil.virtual_memory` for a machine with `nbytes` of main memory of which the group's use is taken."""
    whole_machine = psutil.virtual_memory

    def virtual_memory() -> object:
        used = min(nbytes, group.unreclaimable())
        left = nbytes - used
        return whole_machine()._replace(
            total=nbytes, available=left, used=used, free=left, percent=round(100 * used / nbytes, 1)
        )

    return virtual_memory


def main(arguments: list[str]) -> None:
    """Enters the group, has psutil tell its limit, and runs the program as `python` would."""
    folder, nbytes, program, *rest = arguments
    group = MemoryGroup(Path(folder))
    group.enter()
    psutil.virtual_memory = limited_memory(group, int(nbytes))
    sys.argv = [program, *rest]
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
