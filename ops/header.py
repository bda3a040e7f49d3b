"""Reads and checks the header of one safetensors file, trusting nothing in it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

DECODED = torch.bfloat16
"""What a decoded tensor counts as where it is kept: its own error is larger than this one's."""

Join = Callable[[list[torch.Tensor]], torch.Tensor]
"""Makes one tensor of others."""

_LARGEST = 2**63
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies, and what it is.

    Attributes:
        name: what it is called.
        dtype: of its numbers.
        shape: of the tensor.
        path: the file.
        offset: of its first byte.
        nbytes: bytes in the file.
        encoding: GGUF's name of the block format that its numbers are coded in, empty where they are plain.
        parts: the tensors that it is made of, where it is not one of the file.
        join: makes it of them.
        scheme: how another tool stored it, in words, where that is decoded when it is read.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    encoding: str = ""
    parts: tuple[TensorEntry, ...] = ()
    join: Join | None = None
    scheme: str = ""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorEntry:
        """The entry of a tensor that lies in no file."""
        return cls(name, tensor.dtype, tuple(tensor.shape), Path(), 0, tensor.nbytes)

    @classmethod
    def joined(cls, name: str, parts: Sequence[TensorEntry], join: Join, share: int = 1) -> TensorEntry:
        """The entry of a tensor that `join` makes of others, of one in `share` of their numbers."""
        shape = join([torch.empty(part.shape, device="meta") for part in parts]).shape
        nbytes = sum(part.nbytes for part in parts) // share
        return cls(name, parts[0].dtype, tuple(shape), parts[0].path, 0, nbytes, "", tuple(parts), join)

    @property
    def plain_nbytes(self) -> int:
        """Bytes of its numbers in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def decoded_from(self) -> str:
        """`scheme` of it or of what it is made of."""
        return self.scheme or next((part.decoded_from for part in self.parts if part.decoded_from), "")


@dataclass(frozen=True)
class FileStamp:
    """Tells one state of a file from a later one: its size in bytes and the time of its last change."""

    path: Path
    size: int
    changed_ns: int


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, its text entries, and which state of the file they are from."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    stamp: FileStamp


def read_header(path: Path) -> Header:
    """Read the header of the safetensors file `path`.

    Raises:
        CheckpointError: the file is missing, empty, truncated, a pickle, or its header is not to be believed.
    """
    raw, stamp = _read(path)
    try:
        header = load_json(raw, object_pairs_hook=_no_repeated_keys)
    except ValueError as error:
        raise CheckpointError(f"{path.name} has no readable safetensors header ({error}): download it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has a safetensors header that is no table: download it again.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(_is_text(text) for pair in metadata.items() for text in pair):
        raise CheckpointError(f"{path.name} has metadata that is not text: download it again.")
    data_start = 8 + len(raw)
    entries = [_entry(path, name, info, data_start, stamp.size) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_no_overlap(path, entries, data_start, stamp.size)
    return Header({entry.name: entry for entry in entries}, metadata, stamp)


def file_stamp(path: Path, status: os.stat_result | None = None) -> FileStamp:
    """The state that `path` is in now."""
    status = status or path.stat()
    return FileStamp(path, status.st_size, status.st_mtime_ns)


def load_json(text: bytes | str, **options: Any) -> Any:
    """`json.loads` of UTF-8 text.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Says in one sentence what keeps the file from being opened or read.

    Raises:
        CheckpointError: it is missing, a folder, or not to be read.
    """
    name = path.name or path
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{name} does not exist: check the file's name.") from None
    except IsADirectoryError:
        raise CheckpointError(f"{name} is a folder: name a file in it.") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror or error}): check its permissions.") from None


def _read(path: Path) -> tuple[bytes, FileStamp]:
    """The header's bytes, and the state of the file that they are from."""
    with opening(path), path.open("rb") as file:
        stamp = file_stamp(path, os.fstat(file.fileno()))
        size = stamp.size
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
            raise CheckpointError(f"{path.name} has a header of {length} bytes, over the format's limit: not trusted.")
        return file.read(length), stamp


def _refuse_pickle(path: Path, prefix: bytes, whole: bool) -> None:
    # The same bytes may begin an honest header length; as one, a pickle's are far beyond the file's end.
    if path.suffix.lower() in _PICKLE_SUFFIXES or (not whole and prefix.startswith(_PICKLE_MAGIC)):
        raise CheckpointError(
            f"{path.name} is a pickle checkpoint, which can run code when opened: convert it to safetensors first."
        )


def _entry(path: Path, name: str, info: Any, data_start: int, size: int) -> TensorEntry:
    try:
        if not _is_text(name):
            raise ValueError("its name is no text")
        dtype = DTYPES[info["dtype"]]
        shape = tuple(info["shape"])
        start, end = info["data_offsets"]
        if not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, start, end)):
            raise ValueError("a shape or an offset is no natural number, or is beyond counting")
        if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= _LARGEST:
            raise ValueError("its shape is beyond counting")
    except KeyError as error:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' has an unknown or missing {error}: update Lowbit."
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: tensor {name!a} is described wrongly ({error}): download it again."
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


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can write: JSON can escape half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
