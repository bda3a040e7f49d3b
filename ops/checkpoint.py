"""Reads safetensors files, one or a sharded set, one tensor at a time and without trusting their header."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "C64": torch.complex64,
    }
)
"""safetensors dtype names (https://huggingface.co/docs/safetensors) and what torch calls them."""

HEADER_LIMIT = 100 * 1024 * 1024
"""Largest header that the safetensors format allows, in bytes."""

INDEX_SUFFIX = ".safetensors.index.json"

_SHARD = re.compile(r"^(?P<stem>.+)-\d{5}-of-\d{5}\.(safetensors|sft)$")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `path`, and what they are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A validated safetensors file or sharded set: its tensors in file order, and its metadata."""

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in host memory of its own (not a view of the file)."""
        return read_tensor(self.entries[name])

    def identity(self) -> str:
        """Hex digest that changes when any file's name, size, time, header or sampled content does."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            for sample in _content_samples(file, status.st_size):
                digest.update(sample)
        return digest.hexdigest()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check the header(s) of `path`.

    Args:
        path: a `.safetensors` or `.sft` file, one shard of a set, or a set's `*.safetensors.index.json`.

    Raises:
        CheckpointError: the file is missing, empty, truncated, a pickle, or its header is not to be believed.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_sharded(path)
    shard = _SHARD.match(path.name)
    if shard is not None:
        index = path.with_name(shard["stem"] + INDEX_SUFFIX)
        if index.exists():
            return _open_sharded(index)
    entries, metadata = _read_header(path)
    return Checkpoint(path, (path,), MappingProxyType(entries), MappingProxyType(metadata))


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into host memory of its own.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        filled = 0
        while filled < entry.nbytes:
            count = file.readinto(view[filled:])
            if not count:
                raise CheckpointError(
                    f"{entry.path.name} ended inside tensor '{entry.name}': copy or download it again."
                )
            filled += count
    return buffer.view(entry.dtype).view(entry.shape)


def _open_sharded(index: Path) -> Checkpoint:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        shard_of = document["weight_map"]
        names = sorted(set(shard_of.values()))
    except FileNotFoundError:
        raise CheckpointError(f"{index.name} does not exist: check the file's name.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} is not a safetensors index ({error}): download it again.") from None
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index.name} names the shard '{name}' outside its own folder: do not trust it.")
        shard = index.with_name(name)
        if not shard.exists():
            raise CheckpointError(
                f"{index.name} needs the shard {name}, which is missing: download it beside the others."
            )
        shard_entries, shard_metadata = _read_header(shard)
        entries.update(shard_entries)
        metadata.update(shard_metadata)
    missing = next((name for name in shard_of if name not in entries), None)
    if missing is not None:
        raise CheckpointError(f"{index.name} lists '{missing}', which no shard holds: the set is incomplete or mixed.")
    files = (index, *(index.with_name(name) for name in names))
    return Checkpoint(index, files, MappingProxyType(entries), MappingProxyType(metadata))


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            whole = size >= 8 and length <= size - 8
            _refuse_pickle(path, prefix, whole)
            if not whole:
                raise CheckpointError(
                    f"{path.name} is not a whole safetensors file ({size} bytes, its header claims {length}): "
                    "copy or download it again."
                )
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path.name} has a header of {length} bytes, over the format's limit: not trusted."
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} does not exist: check the file's name.") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror}): check its permissions.") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeated_keys)
    except ValueError as error:
        raise CheckpointError(f"{path.name} has no readable safetensors header ({error}): download it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has a safetensors header that is no table: download it again.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name} has metadata that is not text: download it again.")
    data_start = 8 + length
    entries = [_entry(path, name, info, data_start, size) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_no_overlap(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}, metadata


def _refuse_pickle(path: Path, prefix: bytes, whole: bool) -> None:
    # The same bytes may begin an honest header length; as one, a pickle's are far beyond the file's end.
    if path.suffix.lower() in _PICKLE_SUFFIXES or (not whole and prefix.startswith(_PICKLE_MAGIC)):
        raise CheckpointError(
            f"{path.name} is a pickle checkpoint, which can run code when opened: convert it to safetensors first."
        )


def _entry(path: Path, name: str, info: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype = DTYPES[info["dtype"]]
        shape = tuple(info["shape"])
        start, end = info["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a shape or an offset is no natural number")
    except KeyError as error:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' has an unknown or missing {error}: update Lowbit."
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' is described wrongly ({error}): download it again."
        ) from None
    nbytes = math.prod(shape) * dtype.itemsize
    if end - start != nbytes:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' claims {end - start} bytes, but its shape and dtype need {nbytes}: "
            "the header lies, download the file again."
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{path.name} is truncated: tensor '{name}' ends at byte {data_start + end} of {size}, download it again."
        )
    return TensorEntry(name, dtype, shape, path, data_start + start, nbytes)


def _check_no_overlap(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    expected = data_start
    for entry in entries:
        if entry.nbytes and entry.offset != expected:
            raise CheckpointError(
                f"{path.name}: tensor '{entry.name}' overlaps another or leaves a gap: the header lies."
            )
        expected = max(expected, entry.offset + entry.nbytes)
    if expected != size:
        raise CheckpointError(f"{path.name} has {size - expected} bytes that no tensor claims: download it again.")


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _content_samples(path: Path, size: int) -> Iterator[bytes]:
    """The first 64 KiB and 16 further samples of 4 KiB spread over the file."""
    with path.open("rb") as file:
        yield file.read(64 * 1024)
        for part in range(1, 17):
            file.seek(size * part // 17)
            yield file.read(4096)
