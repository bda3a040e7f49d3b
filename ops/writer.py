"""Writes a safetensors file tensor by tensor, without holding it in memory, under a temporary name until it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import CheckpointError, StorageError
from .checkpoint import open_checkpoint
from .header import DTYPES
from .lock_file import LockFile, abandoned
from .overlap import WriteBehind
from .staging import host_blocks, read_whole

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 4 << 20
_LOOK = 1 << 20
"""Bytes read back at a time: they stay in the processor's cache for the comparison."""
_CHECKERS = min(8, os.cpu_count() or 1)
"""Threads that read back what was written: one alone is hardly faster than the one that writes."""
_FLUSHED = 64 << 20
"""Bytes after which the disk is sent what was written, so that it has little left to do at the end."""
_BEGIN_WRITING = 2
"""SYNC_FILE_RANGE_WRITE of Linux."""
_HEADER_ENTRY_BYTES = 160
_STEM_BYTES = 100
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
TEMPORARY_PREFIX = ".lowbit-"
TEMPORARY_SUFFIX = ".partial"
_LOCK_SUFFIX = ".lock"
_UNLOCKED_SECONDS = 24 * 3600
"""A half-written file without a lock is an earlier version's, which may still be at work; after this long it is not."""


def names_nbytes(names: Iterable[str]) -> int:
    """Bytes that `names` take in a header."""
    return sum(len(json.dumps(name)) for name in names)


def short_stem(name: str) -> str:
    """The beginning of a file's name, as text of so few bytes that there is room for a suffix on every file system."""
    return name.encode("utf-8", "ignore")[:_STEM_BYTES].decode("utf-8", "ignore")


class CheckpointWriter:
    """Writes tensors one after the other to `path`; the file appears there whole, on a clean exit, or not at all.

    Each piece is read back and compared with the tensor as soon as it is written, while the next is being written.

    Tensors whose size is no multiple of 8 bytes are held back and written last, by falling element size, so that every
    tensor lies aligned without gaps, which the format forbids.

    Args:
        path: the file to make; replaced if it exists.
        name_bytes: bytes in a header of all names to come (`names_nbytes`), an upper bound, to reserve the header.
        name_count: how many tensors will come, an upper bound.
        metadata: text entries of the header.
        behind: write on a thread of its own: tensors must stay as they are until the writer is closed.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        *,
        name_bytes: int,
        name_count: int,
        metadata: Mapping[str, str],
        behind: bool = False,
    ) -> None:
        self.path = path
        self._behind = WriteBehind() if behind else None
        self._metadata = dict(metadata)
        reserved = len(json.dumps({"__metadata__": self._metadata})) + name_bytes + name_count * _HEADER_ENTRY_BYTES
        self._reserved = -(-reserved // 8) * 8
        self._position = 0
        self._header: dict[str, dict[str, Any]] = {}
        self._checkers = ThreadPoolExecutor(_CHECKERS, "lowbit-reads-back")
        self._flusher = ThreadPoolExecutor(1, "lowbit-flusher")
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._held: list[tuple[str, torch.Tensor]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary, self._lock, descriptor = _create_temporary(path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written ({error.strerror or error}): choose another place, or free the disk."
            ) from None
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._file.seek(8 + self._reserved)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append `tensor` (any device; written contiguous; not written to before `close`) under `name`.

        Raises:
            CheckpointError: `name` was written before.
            StorageError: the disk is full.
        """
        if name in self._header or any(name == held for held, _ in self._held):
            raise CheckpointError(f"The tensor '{name}' would be written twice to {self.path.name}.")
        tensor = tensor.detach().contiguous()
        if tensor.device.type != "cpu":
            # The thread that writes has a stream of its own.
            torch.accelerator.synchronize(tensor.device)
        if tensor.dtype == torch.float8_e8m0fnu:
            # ComfyUI's memory-mapped reader does not know this dtype; it views bytes as it.
            tensor = tensor.view(torch.uint8)
        if tensor.nbytes % 8:
            self._held.append((name, tensor))
        else:
            self._append(name, tensor)

    def close(self) -> None:
        """Write what was held back and the header, check the file by reading it back, and give it its name.

        Raises:
            StorageError: the disk is full, or what was read back differs from what was written.
        """
        try:
            for name, tensor in sorted(self._held, key=lambda item: -item[1].element_size()):
                self._append(name, tensor)
            self._held.clear()
            if self._behind is not None:
                self._behind.wait()
            self._write_header()
            self._wait_for_flush()
            os.fsync(self._file.fileno())
            self._end()
            self._check_header()
            self._checkers.shutdown()
            os.replace(self._temporary, self.path)
            self._lock.release()
        except OSError as error:
            self.discard()
            raise StorageError(
                f"{self.path} could not be written ({error.strerror or error}): free the disk."
            ) from None
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written so far."""
        self._end()
        self._checkers.shutdown(cancel_futures=True)
        self._temporary.unlink(missing_ok=True)
        self._lock.release()

    def _end(self) -> None:
        """No more writes."""
        if self._behind is not None:
            self._behind.close()
        self._flusher.shutdown()
        self._file.close()

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        end = self._position + tensor.nbytes
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end
        if self._behind is None:
            self._write(name, tensor)
        else:
            self._behind.add(tensor.nbytes, partial(self._write, name, tensor))

    def _place(self, name: str) -> int:
        """Where in the file the tensor begins by the header."""
        return 8 + self._reserved + self._header[name]["data_offsets"][0]

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        place = self._place(name)
        try:
            for block, host in host_blocks(data):
                if host is not block:
                    host.copy_(block)
                # The next block has the same memory: this one is compared by then.
                if not all(looked.result() for looked in self._write_block(host.numpy(), place)):
                    raise StorageError(
                        f"{self.path.name}: '{name}' reads back differently than written: check the disk."
                    )
                place += host.numel()
        except OSError as error:
            raise StorageError(
                f"{self.path.name} could not be written to {self.path.parent} ({error.strerror or error}): free the disk."
            ) from None

    def _write_block(self, block: Any, place: int) -> list[Future[bool]]:
        """Write (N,) uint8 that is to lie at byte `place`; whether each piece of it reads back the same."""
        looks = []
        for start in range(0, block.size, _CHUNK):
            piece = block[start : start + _CHUNK]
            self._write_all(memoryview(piece.data))
            looks.append(self._checkers.submit(_reads_back, self._temporary, place + start, piece))
        return looks

    def _write_header(self) -> None:
        table = {"__metadata__": self._metadata, **self._header} if self._metadata else self._header
        encoded = json.dumps(table, separators=(",", ":")).encode()
        if len(encoded) > self._reserved:
            raise CheckpointError(f"The header of {self.path.name} outgrew the {self._reserved} bytes reserved for it.")
        self._file.seek(0)
        self._write_all(memoryview(self._reserved.to_bytes(8, "little") + encoded.ljust(self._reserved)))

    def _write_all(self, piece: memoryview) -> None:
        """An unbuffered file may take less than it is given."""
        while piece:
            written = self._file.write(piece)
            piece = piece[written:]
            self._unflushed += written
        if self._unflushed >= _FLUSHED and (self._flushing is None or self._flushing.done()):
            self._wait_for_flush()
            self._flushing, self._unflushed = self._flusher.submit(_send_to_disk, self._file.fileno()), 0

    def _wait_for_flush(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def _check_header(self) -> None:
        found = {
            name: (_NAMES[entry.dtype], list(entry.shape), entry.offset)
            for name, entry in open_checkpoint(self._temporary).entries.items()
        }
        meant = {name: (entry["dtype"], entry["shape"], self._place(name)) for name, entry in self._header.items()}
        if found != meant:
            raise StorageError(f"The header of {self.path.name} reads back differently than written: check the disk.")


def _send_to_disk(descriptor: int) -> None:
    """What was written so far, while more is being written: Linux need not be waited for, others are."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    everything = ctypes.c_int64(0)
    if begin is None or begin(descriptor, everything, everything, _BEGIN_WRITING) != 0:
        getattr(os, "fdatasync", os.fsync)(descriptor)


def _create_temporary(path: Path) -> tuple[Path, LockFile, int]:
    """A fresh file beside `path` with the permissions that any file the user makes gets, its lock and its descriptor."""
    # A name that the file system does not take is said before the work, not after it.
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder")
    while True:
        name = f"{TEMPORARY_PREFIX}{short_stem(path.stem)}-{secrets.token_hex(4)}"
        temporary = path.with_name(name + TEMPORARY_SUFFIX)
        with contextlib.suppress(FileExistsError):
            lock = LockFile(path.with_name(name + _LOCK_SUFFIX))
            try:
                return temporary, lock, os.open(temporary, _CREATE, 0o666)
            except BaseException:
                lock.release()
                raise


def remove_half_written(folder: Path) -> None:
    """Remove from `folder` what killed processes left half-written, and nothing that is being written."""
    for lock in folder.glob(f"{TEMPORARY_PREFIX}*{_LOCK_SUFFIX}"):
        with contextlib.suppress(OSError), abandoned(lock) as dead:
            if dead:
                lock.with_suffix(TEMPORARY_SUFFIX).unlink(missing_ok=True)
    for temporary in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            age = time.time() - temporary.stat().st_mtime
            if age > _UNLOCKED_SECONDS and not os.path.exists(temporary.with_suffix(_LOCK_SUFFIX)):
                temporary.unlink()


def check_free_space(folder: Path, nbytes: int, what: str) -> None:
    """Remove what killed processes left half-written in `folder`, and refuse a write that will not fit.

    Raises:
        StorageError: fewer than `nbytes` plus 64 MiB are free where `folder` is, or will be.
    """
    remove_half_written(folder)
    existing = folder
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be looked at ({error.strerror or error}): choose another folder."
        ) from None
    if free < nbytes + (64 << 20):
        raise StorageError(
            f"{what} needs {nbytes / 2**30:.2f} GiB in {folder}, which has {free / 2**30:.2f} GiB free: "
            "free the disk or choose another folder."
        )


def _reads_back(path: Path, place: int, piece: Any) -> bool:
    """Whether the file has `piece`, (N,) uint8, at byte `place`."""
    found = torch.empty(min(piece.size, _LOOK), dtype=torch.uint8).numpy()
    with path.open("rb", buffering=0) as file:
        file.seek(place)
        for start in range(0, piece.size, _LOOK):
            part = piece[start : start + _LOOK]
            same = found[: part.size]
            if not read_whole(file, memoryview(same.data)) or (same != part).any():
                return False
    return True
