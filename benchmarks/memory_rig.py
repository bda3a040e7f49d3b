"""What the memory benchmark stands on: checkpoints of real dimensions, a machine made smaller, and what a server takes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import torch

from lowbit.memory.devices import available_host_bytes

GIB = 1 << 30
_POOL = 1 << 26
_EMBEDDINGS = ("embed_tokens.weight", "shared.weight", "relative_attention_bias.weight")

_HOLD_GPU = """
import sys, torch
total, cap = torch.cuda.mem_get_info()[1], int(sys.argv[1])
kept = []
while torch.cuda.mem_get_info()[0] > cap:
    kept.append(torch.empty(min(1 << 28, torch.cuda.mem_get_info()[0] - cap + 1), dtype=torch.uint8, device="cuda"))
print("ready", flush=True)
sys.stdin.read()
"""
_HOLD_HOST = """
import sys
kept, left = [], int(sys.argv[1])
while left > 0:
    block = bytearray(min(1 << 28, left))
    block[::4096] = b"x" * len(block[::4096])
    kept.append(block)
    left -= len(block)
print("ready", flush=True)
sys.stdin.read()
"""


def write_checkpoint(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A safetensors file of bfloat16 Gaussian weights at the scale of a trained model's, written as it is drawn.

    Matrices have variance 1 / fan-in, so that activations keep their size through the network and no product is of zeros.
    extra: tensors that go in as they are, of uint8.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = dict(extra or {})
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    for name, tensor in extra.items():
        header[name] = {
            "dtype": "U8",
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.numel()],
        }
        position += tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(min(_POOL, max(math.prod(shape) for shape in shapes.values())), generator=generator)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, shape) in enumerate(shapes.items()):
            _write_tensor(file, name, shape, pool, index)
        for tensor in extra.values():
            file.write(tensor.numpy().tobytes())
    partial.rename(path)
    return path


def _write_tensor(file, name: str, shape: tuple[int, ...], pool: torch.Tensor, index: int) -> None:
    scale, shift = _scale(name, shape)
    left, start = math.prod(shape), index * 7919 % max(1, len(pool) // 2)
    while left:
        part = pool[start : start + left]
        file.write((part * scale + shift).bfloat16().view(torch.uint8).numpy().tobytes())
        left, start = left - len(part), 0


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Factor and offset of a tensor's Gaussian values."""
    if name.endswith("modulation"):
        return shape[-1] ** -0.5, 0.0
    if name.endswith("bias"):
        return 0.02, 0.0
    if name.endswith("gamma") or len(shape) == 1:
        return 0.1, 1.0
    return (1.0 if name.endswith(_EMBEDDINGS) else math.prod(shape[1:]) ** -0.5), 0.0


def same_file(path: Path, other: Path) -> str:
    """Makes `path` a copy of `other` where the disk has room, else a link to it; returns which."""
    if path.exists():
        return "a link" if path.is_symlink() else "a file of its own"
    size = other.stat().st_size
    if shutil.disk_usage(other.parent).free > size + 4 * GIB:
        shutil.copyfile(other, path)
        return "a file of its own"
    path.symlink_to(other)
    return "a link"


class SmallerMachine:
    """Processes that hold memory, so that only `vram` bytes of the GPU and `host` bytes of main memory are left.

    What is left is really all there is, for stock ComfyUI as for the pack: no allocator and no accounting is told anything.
    None leaves a side alone.
    """

    def __init__(self, vram: int | None, host: int | None):
        self._holders: list[subprocess.Popen[str]] = []
        try:
            if vram is not None:
                self._hold(_HOLD_GPU, vram)
            if host is not None:
                self._hold(_HOLD_HOST, max(0, available_host_bytes() - host))
        except BaseException:
            self.close()
            raise

    def _hold(self, program: str, nbytes: int) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", program, str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the machine could not be made smaller: {nbytes / GIB:.1f} GiB")

    def close(self) -> None:
        """Gives everything back."""
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders.clear()

    def __enter__(self) -> SmallerMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Usage:
    """The most a server took, in bytes: of the GPU by the driver's count, of main memory by the kernel's."""

    vram: int | None = None
    resident: int = 0
    anonymous: int = 0


@dataclass
class Watch:
    """Looks at a server from outside, ten times a second, until it is closed.

    baseline: `vram_used()` before the server was started, so that its CUDA context counts as its own.
    """

    process: int
    baseline: int | None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self._note()

    def _note(self) -> None:
        used = vram_used()
        if used is not None and self.baseline is not None:
            self.usage.vram = max(self.usage.vram or 0, used - self.baseline)
        try:
            self.usage.resident = max(self.usage.resident, psutil.Process(self.process).memory_info().rss)
            self.usage.anonymous = max(self.usage.anonymous, _anonymous(self.process))
        except (psutil.Error, OSError):
            return

    def close(self) -> Usage:
        """Ends it; returns the most there was."""
        self._stop.set()
        self._thread.join()
        self._note()
        return self.usage


def vram_used() -> int | None:
    """Bytes of the GPU in use, by any process; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _anonymous(process: int) -> int:
    """Main memory that no file backs, pinned memory included: what no other use of the machine can take back."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = {
        line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem"))
    }
    return sum(sizes.values())


def wait_for_memory(vram: int | None, host: int | None, seconds: float = 30) -> None:
    """After a server's end the driver and the kernel take a moment to count its memory as free."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        free = torch.cuda.mem_get_info()[0] if vram is not None else 0
        if (vram is None or free >= vram) and (host is None or available_host_bytes() >= host):
            return
        time.sleep(0.5)
