"""The memory benchmark's checkpoints: written fast at real dimensions, quantized once, taken out of the page cache."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.ops.auto_format import choose_format
from lowbit.ops.cache import cached_path, quantized_file
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import AS_STORED, find_format
from lowbit.ops.keep_rules import parse_rules
from lowbit.ops.plan import make_plan

GIB = 1 << 30
CACHE = "lowbit_cache"
"""The pack's folder of quantized files, in the models folder."""

_POOL = (1 << 25) - 39
"""Values drawn once for all tensors: a prime number, so that the rows of a larger matrix do not repeat."""

_EMBEDDINGS = ("embed_tokens.weight", "shared.weight", "relative_attention_bias.weight")
_PIECE = 1 << 26


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes that want the same file waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_taken(path: Path) -> bool:
    """Whether another process is `alone` with the file now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_checkpoint(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A safetensors file of bfloat16 Gaussian weights at the scale of a trained model's, unless it is there already.

    Matrices have variance 1 / fan-in, so that activations keep their size through the network and no product is of zeros.
    All tensors are cut from one pool of values, each from another place, scaled and shifted once per kind.
    extra: tensors that go in as they are, of uint8.
    """
    with alone(path):
        if path.exists():
            return path
        extra = dict(extra or {})
        pool = _Pool(max(math.prod(shape) for shape in shapes.values()))
        partial = path.with_suffix(".partial")
        with partial.open("wb", buffering=0) as file:
            _write(file, memoryview(_header(shapes, metadata or {}, extra)))
            for index, (name, shape) in enumerate(shapes.items()):
                for piece in pool.pieces(math.prod(shape), index, *_scale(name, shape)):
                    _write(file, piece)
            for tensor in extra.values():
                _write(file, memoryview(tensor.numpy()))
        partial.rename(path)
    return path


def _write(file, data: memoryview) -> None:
    while data:
        data = data[file.write(data[:_PIECE]) :]


def _header(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], extra: Mapping[str, torch.Tensor]
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    sizes = [(name, "BF16", shape, 2) for name, shape in shapes.items()]
    sizes += [(name, "U8", tuple(tensor.shape), 1) for name, tensor in extra.items()]
    for name, dtype, shape, width in sizes:
        end = position + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Pool:
    """Gaussian values as bfloat16 bytes, one copy for each scale and shift."""

    def __init__(self, largest: int):
        self._values = torch.randn(min(_POOL, largest), generator=torch.Generator().manual_seed(0))
        self._bytes: dict[tuple[float, float], memoryview] = {}

    def pieces(self, count: int, index: int, scale: float, shift: float) -> Iterator[memoryview]:
        """`count` values in pieces, the first from a place of the tensor's own."""
        key = (scale, shift)
        if key not in self._bytes:
            scaled = (self._values * scale + shift).bfloat16()
            self._bytes[key] = memoryview(scaled.view(torch.uint8).numpy())
        start = index * 7919 % max(1, len(self._values) // 2)
        while count:
            part = self._bytes[key][2 * start : 2 * (start + count)]
            yield part
            count, start = count - len(part) // 2, 0


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Factor and offset of a tensor's Gaussian values."""
    if name.endswith("modulation"):
        return shape[-1] ** -0.5, 0.0
    if name.endswith("bias"):
        return 0.02, 0.0
    if name.endswith("gamma") or len(shape) == 1:
        return 0.1, 1.0
    return (1.0 if name.endswith(_EMBEDDINGS) else math.prod(shape[1:]) ** -0.5), 0.0


def second_name(path: Path, other: Path) -> Path:
    """The same file under another name: two models of one size without the disk for both."""
    with alone(path):
        if not path.exists():
            os.link(other, path)
    return path


@dataclass(frozen=True)
class Quantized:
    """A quantized copy that the pack's loaders find when they are asked for format `auto`."""

    file: str
    format: str
    seconds: float
    nbytes: int


def quantize(path: Path, cache: Path) -> Quantized | None:
    """Makes what `auto` will load instead of `path`, as the loader would; None when it is there, or would not be made.

    One process at a time makes it, so that runs beside each other do not each write tens of gigabytes.
    """
    checkpoint, rules, device = open_checkpoint(path), parse_rules("auto"), device_info()
    name, _ = choose_format(checkpoint, device, rules)
    if name == AS_STORED:
        return None
    plan = make_plan(checkpoint, find_format(name), rules, named=False)
    target = cached_path(checkpoint, plan, cache)
    with alone(cache / path.name):
        if target.exists():
            return None
        started = time.monotonic()
        where = "cuda" if torch.cuda.is_available() else "cpu"
        made = quantized_file(checkpoint, plan, cache, device=where)
        if where == "cuda":
            torch.cuda.empty_cache()
        return Quantized(path.name, name, time.monotonic() - started, made.stat().st_size)


def quantize_all(paths: Iterable[Path], cache: Path) -> list[Quantized]:
    """`quantize` for each file, those last that another process is at: several share the work. Returns what this one made."""
    waiting, made = [], []
    for path in paths:
        if is_taken(cache / path.name):
            waiting.append(path)
        else:
            made.append(quantize(path, cache))
    made += [quantize(path, cache) for path in waiting]
    return [copy for copy in made if copy is not None]


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """The next read of these files comes from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(folder: Path, nbytes: int = 2 * GIB) -> dict[str, float]:
    """Gigabytes a second: into the page cache, onto the disk, and from the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    path, piece = folder / "rate.probe", memoryview(torch.randn(_PIECE // 4).view(torch.uint8).numpy())
    times = {}
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // _PIECE):
            _write(file, piece)
        times["to_cache"] = time.monotonic() - started
        os.fsync(file.fileno())
    times["to_disk"] = time.monotonic() - started
    drop_from_page_cache([path])
    started = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(_PIECE):
            pass
    times["from_disk"] = time.monotonic() - started
    path.unlink()
    return {name: round(nbytes / seconds / 1e9, 2) for name, seconds in times.items()}
