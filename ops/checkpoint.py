"""Opens safetensors checkpoints, one file or a sharded set, and GGUF files, and reads them one tensor at a time."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import CheckpointError
from .foreign_layers import decoded_layers
from .gguf_decode import decode
from .gguf_file import SUFFIX, open_gguf
from .header import FileStamp, Header, TensorEntry, file_stamp, load_json, opening, read_header
from .staging import host_blocks, read_whole

INDEX_NAME = re.compile(r"^(?P<stem>.+)\.safetensors\.index(\.(?P<variant>[^.]+))?\.json$")
"""Names of a sharded set's index: `model.safetensors.index.json`, in diffusers with a variant before `.json`."""

_ALIGNMENT = 16

_SHARD = re.compile(
    r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(\.(?P<variant>[^.]+))?\.(?P<suffix>safetensors|sft)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """A validated safetensors file or sharded set.

    Attributes:
        path: the file, the index, or the first shard of a set without one.
        files: every file that belongs to it.
        entries: its tensors in file order.
        metadata: the headers' text entries.
        stamps: the state of each file that was read.
    """

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    stamps: tuple[FileStamp, ...]

    @property
    def place(self) -> str:
        """Where it lies, the same for a later state of the same files."""
        return str(self.path.resolve())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in host memory of its own (not a view of the file)."""
        entry = self.entries[name]
        return decoded(entry, self.read_stored(name)).to(entry.dtype)

    def read_stored(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """`read`, but bytes are left as they are where they are coded or several tensors': `decoded` makes numbers of them."""
        return read_stored(self.entries[name], device)

    def read_rows(self, name: str, count: int) -> torch.Tensor:
        """Up to `count` rows of the matrix `name`, spread evenly; no others are read where its numbers are plain."""
        entry = self.entries[name]
        rows, columns = spread(entry.shape[0], count), entry.shape[1]
        if entry.encoding or entry.join is not None:
            return self.read(name)[rows]
        return read_elements(entry, [row * columns for row in rows], columns).view(len(rows), columns)

    def identity(self) -> str:
        """Hex digest that changes when any file's name, size, time, header or sampled content does.

        Raises:
            CheckpointError: a file is gone or cannot be read.
        """
        digest = hashlib.sha256()
        for stamp in self.stamps:
            name = os.fsencode(stamp.path.name)
            digest.update(b"%b\0%d\0%d\0" % (name, stamp.size, stamp.changed_ns))
            with _reading(stamp.path):
                for sample in _content_samples(stamp.path, stamp.size):
                    digest.update(sample)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Make sure that the files are still those whose headers were read.

        Raises:
            CheckpointError: one was replaced, written to or removed since it was opened.
        """
        for stamp in self.stamps:
            with _reading(stamp.path):
                now = file_stamp(stamp.path)
            if now != stamp:
                raise CheckpointError(f"{stamp.path.name} changed while it was read: try again when it is complete.")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check the header(s) of `path`.

    Args:
        path: a `.safetensors` or `.sft` file, one shard of a set, or a set's index (`INDEX_NAME`).

    Raises:
        CheckpointError: the file is missing, empty, truncated, a pickle, its header is not to be believed, or a part of
            its set is missing, or a layer that another tool quantized is not whole.
    """
    checkpoint = _open(Path(path))
    if not checkpoint.entries:
        raise CheckpointError(f"{checkpoint.path.name} holds no tensors: choose the file that has the model's weights.")
    if checkpoint.path.suffix.lower() == SUFFIX:
        return checkpoint
    try:
        entries = decoded_layers(checkpoint.entries, checkpoint.metadata, read_stored)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path.name}: {error}") from None
    return replace(checkpoint, entries=MappingProxyType(dict(entries)))


def _open(path: Path) -> Checkpoint:
    if path.suffix.lower() == SUFFIX:
        entries, metadata, stamps = open_gguf(path)
        files = tuple(stamp.path for stamp in stamps)
        return Checkpoint(path, files, entries, metadata, stamps)
    if INDEX_NAME.match(path.name):
        return _open_indexed(path)
    shard = _SHARD.match(path.name)
    if shard is None:
        header = read_header(path)
        return Checkpoint(
            path, (path,), MappingProxyType(header.entries), MappingProxyType(header.metadata), (header.stamp,)
        )
    index = next((path.with_name(name) for name in _index_names(shard) if os.path.exists(path.with_name(name))), None)
    return _open_indexed(index) if index is not None else _open_unindexed(path, shard)


def decoded(entry: TensorEntry, stored: torch.Tensor) -> torch.Tensor:
    """What `read_stored` read, on whatever device it is now, as numbers: float32 where they were coded."""
    if entry.join is not None:
        starts = _part_starts(entry)
        parts = zip(entry.parts, starts, starts[1:], strict=False)
        return entry.join([decoded(part, _as_stored(part, stored[start:end])) for part, start, end in parts])
    return decode(stored, entry.encoding, entry.shape) if entry.encoding else stored


def read_stored(entry: TensorEntry, device: torch.device | str = "cpu") -> torch.Tensor:
    """Read one tensor into memory of its own, as it is stored: the bytes, uint8, of block formats and joined tensors.

    Raises:
        CheckpointError: the file is gone, cannot be read, or has become shorter since its header was read.
    """
    buffer = torch.empty(buffer_nbytes(entry), dtype=torch.uint8, device=device)
    _fill(entry, buffer)
    return _as_stored(entry, buffer)


def buffer_nbytes(entry: TensorEntry) -> int:
    """Bytes of what `read_stored` gives."""
    return entry.nbytes if entry.join is None else _part_starts(entry)[-1]


def _part_starts(entry: TensorEntry) -> list[int]:
    """Where the parts of a joined tensor begin in its buffer, and where the last ends: each aligned for any dtype."""
    sizes = (-(-buffer_nbytes(part) // _ALIGNMENT) * _ALIGNMENT for part in entry.parts)
    return list(itertools.accumulate(sizes, initial=0))


def _as_stored(entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
    buffer = buffer[: buffer_nbytes(entry)]
    return buffer if entry.encoding or entry.join is not None else buffer.view(entry.dtype).view(entry.shape)


def _fill(entry: TensorEntry, buffer: torch.Tensor) -> None:
    if entry.join is not None:
        for part, start in zip(entry.parts, _part_starts(entry), strict=False):
            _fill(part, buffer[start:])
        return
    with _reading(entry.path), entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for block, host in host_blocks(buffer[: entry.nbytes]):
            if not read_whole(file, memoryview(host.numpy().data)):
                raise _ended_inside(entry)
            if host is not block:
                block.copy_(host)


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the places from 0 to `count` - 1, evenly spread."""
    most = min(count, most)
    return [count * place // most for place in range(most)]


def read_elements(entry: TensorEntry, starts: Sequence[int], count: int) -> torch.Tensor:
    """`count` numbers from each of `starts` on, without reading the rest; beyond the end the last one again.

    Args:
        entry: a tensor whose numbers are plain.
        starts: places in the flattened tensor.
        count: numbers from each.

    Returns:
        (len(starts) * count,) in the tensor's dtype.

    Raises:
        CheckpointError: as `read_stored`.
    """
    size = entry.dtype.itemsize
    pieces = bytearray()
    with _reading(entry.path), entry.path.open("rb", buffering=0) as file:
        for start in starts:
            file.seek(entry.offset + start * size)
            piece = file.read(min(count * size, entry.nbytes - start * size))
            if not piece or len(piece) % size:
                raise _ended_inside(entry)
            pieces += piece + piece[-size:] * (count - len(piece) // size)
    return torch.frombuffer(pieces, dtype=torch.uint8).view(entry.dtype)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one sentence what keeps a file from being read whose header was."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path.name} can no longer be read ({error.strerror or error}): check that it is still there and readable."
        ) from None


def _ended_inside(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(f"{entry.path.name} ended inside tensor '{entry.name}': copy or download it again.")


def _index_names(shard: re.Match[str]) -> Iterator[str]:
    """What the index of a shard may be called; diffusers names a variant in the shard's stem or before its suffix."""
    stem, variant = shard["stem"], shard["variant"]
    if variant is None:
        yield f"{stem}.safetensors.index.json"
        stem, _, variant = stem.rpartition(".")
    if stem and variant:
        yield f"{stem}.safetensors.index.{variant}.json"


def _open_indexed(index: Path) -> Checkpoint:
    shard_of, stamp = _read_index(index)
    headers = {}
    for name in sorted(set(shard_of.values())):
        shard = index.with_name(name)
        if not os.path.exists(shard):
            raise CheckpointError(
                f"{index.name} needs the shard {name}, which is missing: download it beside the others."
            )
        headers[name] = read_header(shard)
    lost = next((name for name, shard in shard_of.items() if name not in headers[shard].entries), None)
    if lost is not None:
        raise CheckpointError(
            f"{index.name} lists '{lost}', which {shard_of[lost]} does not hold: the set is incomplete or mixed."
        )
    return _joined(index, headers, shard_of, (stamp,))


def _read_index(index: Path) -> tuple[dict[str, str], FileStamp]:
    """The shard of each tensor by its name, and the state of the index."""
    with opening(index):
        stamp, text = file_stamp(index), index.read_bytes()
    try:
        shard_of = load_json(text)["weight_map"]
        if not isinstance(shard_of, dict) or not all(isinstance(name, str) and name for name in shard_of.values()):
            raise ValueError("its weight_map does not name a file for each tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index.name} is not a safetensors index ({error}): download it again.") from None
    outside = next((name for name in shard_of.values() if Path(name).name != name or "\0" in name), None)
    if outside is not None:
        raise CheckpointError(f"{index.name} names the shard {outside!r} outside its own folder: do not trust it.")
    return shard_of, stamp


def _open_unindexed(path: Path, shard: re.Match[str]) -> Checkpoint:
    """A set that has lost its index, or never had one, is whole when each of its numbered files is there."""
    variant = f".{shard['variant']}" if shard["variant"] else ""
    names = [
        f"{shard['stem']}-{number:05}-of-{shard['count']}{variant}.{shard['suffix']}"
        for number in range(1, int(shard["count"]) + 1)
    ]
    if path.name not in names:
        raise CheckpointError(f"{path.name} is numbered beyond the end of its own set: check the file's name.")
    missing = next((name for name in names if not os.path.exists(path.with_name(name))), None)
    if missing is not None:
        raise CheckpointError(
            f"{path.name} is one part of {len(names)}, and the shard {missing} is missing: download it beside the others."
        )
    headers = {name: read_header(path.with_name(name)) for name in names}
    return _joined(path.with_name(names[0]), headers, {}, ())


def _joined(
    path: Path, headers: Mapping[str, Header], shard_of: Mapping[str, str], stamps: tuple[FileStamp, ...]
) -> Checkpoint:
    """One checkpoint of several files; a tensor that more than one holds is taken from the one the index names."""
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for shard, header in headers.items():
        for name, entry in header.entries.items():
            if shard_of.get(name, shard) != shard:
                continue
            if name in entries:
                raise CheckpointError(
                    f"{path.name}: both {entries[name].path.name} and {shard} hold '{name}': the set is mixed, download "
                    "it again."
                )
            entries[name] = entry
        metadata.update(header.metadata)
    return Checkpoint(
        path,
        tuple(dict.fromkeys((path, *(header.stamp.path for header in headers.values())))),
        MappingProxyType(entries),
        MappingProxyType(metadata),
        (*stamps, *(header.stamp for header in headers.values())),
    )


def _content_samples(path: Path, size: int) -> Iterator[bytes]:
    """The first 64 KiB and 16 further samples of 4 KiB spread over the file."""
    with path.open("rb") as file:
        yield file.read(64 * 1024)
        for part in range(1, 17):
            file.seek(size * part // 17)
            yield file.read(4096)
