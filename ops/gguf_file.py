"""Opens a GGUF file as a checkpoint: ComfyUI's names and shapes, each tensor decoded when it is read.

Source: the GGUF specification (ggml's docs/gguf.md), read by the `gguf` package; ComfyUI-GGUF's conventions for shapes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CapabilityError, CheckpointError
from .gguf_names import EMBEDDING, TEXT_ARCHITECTURES, VISION_ARCHITECTURE, TextArchitecture, scaled, vision_tensors
from .gguf_tokenizers import Vocabulary, sentencepiece_bytes, tekken_bytes
from .header import DECODED, DTYPES, FileStamp, TensorEntry, file_stamp, opening

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"

_SHAPE = "comfy.gguf.orig_shape."
_TOKENIZER = "tokenizer.ggml."
_UNIGRAM = frozenset({"t5", "t5encoder"})
_SENTENCEPIECE = _UNIGRAM | {"gemma2", "gemma3"}
_UNIGRAM_VOCABULARY = 256_384
"""UMT5's, whose tokenizer ComfyUI takes from the file; other T5 encoders have one of its own."""


Opened = tuple[Mapping[str, TensorEntry], Mapping[str, str], tuple[FileStamp, ...]]


def open_gguf(path: Path) -> Opened:
    """Tensors by ComfyUI's name, text entries, and the state of each file that was read.

    A text encoder's vision tower is read from the `mmproj` file beside it, where there is one.

    Raises:
        CapabilityError: the `gguf` package is not installed.
        CheckpointError: the file is missing, damaged, or of an architecture that is not known.
    """
    with opening(path):
        return _opened(tuple(file_stamp(file) for file in (path, *_vision_files(path))))


@functools.lru_cache(maxsize=4)
def _opened(states: tuple[FileStamp, ...]) -> Opened:
    """`open_gguf` of the first of these files: the package takes seconds for a large vocabulary."""
    path = states[0].path
    reader, stamp = _read(path)
    stored = scaled({tensor.name: _entry(path, tensor, reader, stamp.size) for tensor in reader.tensors})
    name = _text(reader, "general.architecture")
    architecture = TEXT_ARCHITECTURES.get(name)
    if architecture is None:
        if name == VISION_ARCHITECTURE:
            raise CheckpointError(
                f"{path.name} is the vision tower of a text encoder, which is read along with it: choose the text encoder's own "
                "file, and leave this one beside it."
            )
        if EMBEDDING in stored:
            known = ", ".join(TEXT_ARCHITECTURES)
            raise CheckpointError(
                f"{path.name} is a language model of the architecture '{name}', whose tensors are not known here (only of "
                f"{known}): use its safetensors file."
            )
        return MappingProxyType(stored), MappingProxyType({}), (stamp,)
    entries = dict(_text_encoder(stored, architecture, reader, name))
    if stored and not entries:
        raise CheckpointError(
            f"{path.name} calls itself a text encoder ('{name}'), but has none of the names that llama.cpp gives its tensors: "
            "use its safetensors file."
        )
    stamps = [stamp]
    embedding = entries.get("shared.weight")
    tokenizer = _tokenizer(path, reader, name, 0 if embedding is None else embedding.shape[0])
    if tokenizer is not None:
        entries[tokenizer.name] = tokenizer
    if name == "qwen2vl":
        tower, beside = _vision_tower(path, entries.get("model.embed_tokens.weight"))
        entries |= tower
        stamps += beside
    return MappingProxyType(entries), MappingProxyType({}), tuple(stamps)


def _vision_tower(path: Path, embedding: TensorEntry | None) -> tuple[dict[str, TensorEntry], list[FileStamp]]:
    """The tensors of the `mmproj` file beside a text encoder, and its state; of several that whose name is most like its.

    One that makes embeddings of another width than the encoder's is another model's.
    """
    for other in sorted(_vision_files(path), key=lambda other: -len(os.path.commonprefix((_bare(other), _bare(path))))):
        reader, stamp = _read(other)
        parts = scaled({tensor.name: _entry(other, tensor, reader, stamp.size) for tensor in reader.tensors})
        made = vision_tensors(parts)
        last = parts.get("mm.2.weight")
        if made and (embedding is None or last is None or last.shape[0] == embedding.shape[1]):
            return made, [stamp]
    return {}, []


def _vision_files(path: Path) -> list[Path]:
    return [other for other in path.parent.glob(f"*{SUFFIX}") if "mmproj" in other.name.lower()]


def _bare(path: Path) -> str:
    return path.stem.lower().replace("mmproj", "").strip("-_.")


def _read(path: Path) -> tuple[GGUFReader, FileStamp]:
    try:
        import gguf
    except ImportError:
        raise CapabilityError(
            f"{path.name} is a GGUF file, which the package 'gguf' reads: install it with 'pip install gguf' into ComfyUI's "
            "Python."
        ) from None
    try:
        with opening(path):
            stamp = file_stamp(path)
            reader = gguf.GGUFReader(path)
        parts = _number(reader, "split.count")
        if parts > 1:
            raise CheckpointError(
                f"{path.name} is one of {parts} files of a model: join them with llama.cpp's 'llama-gguf-split --merge', or use "
                "the model in one file."
            )
        return reader, stamp
    except CheckpointError:
        raise
    except Exception as error:
        # A header that lies makes the package fail in any way that Python has, with sentences about its own arrays.
        raise CheckpointError(f"{path.name} is no GGUF file that can be read: download it again.") from error


def _entry(path: Path, tensor: ReaderTensor, reader: GGUFReader, size: int) -> TensorEntry:
    kind = tensor.tensor_type.name
    offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if offset + nbytes > size:
        raise CheckpointError(
            f"{path.name} is truncated: tensor '{tensor.name}' ends at byte {offset + nbytes} of {size}."
        )
    shape = _shape(reader, tensor)
    if torch.Size(shape).numel() != int(tensor.n_elements):
        raise CheckpointError(f"{path.name}: tensor '{tensor.name}' has another shape than numbers: download it again.")
    # Types that torch holds have the names that safetensors gives them.
    dtype = DTYPES.get(kind)
    return TensorEntry(tensor.name, dtype or DECODED, shape, path, offset, nbytes, "" if dtype else kind)


def _shape(reader: GGUFReader, tensor: ReaderTensor) -> tuple[int, ...]:
    """As torch has it: the file's is reversed, and holds four dimensions at most."""
    noted = reader.get_field(_SHAPE + tensor.name)
    lengths = tensor.shape[::-1] if noted is None else [noted.parts[index][0] for index in noted.data]
    return tuple(int(length) for length in lengths)


def _text_encoder(
    stored: Mapping[str, TensorEntry], architecture: TextArchitecture, reader: GGUFReader, name: str
) -> Iterator[tuple[str, TensorEntry]]:
    heads = _number(reader, f"{name}.attention.head_count")
    key_heads = _number(reader, f"{name}.attention.head_count_kv") or heads
    for theirs, entry in stored.items():
        ours = architecture.name(theirs)
        if ours is None:
            continue
        change = architecture.change(ours, heads, key_heads)
        if change is None:
            yield ours, replace(entry, name=ours)
        else:
            yield ours, TensorEntry.joined(ours, [entry], change)


def _tokenizer(path: Path, reader: GGUFReader, name: str, vocabulary_size: int) -> TensorEntry | None:
    """The tokenizer that ComfyUI reads from the file of this architecture, made anew, or None where it has one of its own.

    Raises:
        CheckpointError: the file's is of another kind.
    """
    if name in _UNIGRAM and vocabulary_size != _UNIGRAM_VOCABULARY:
        return None
    if name in _SENTENCEPIECE:
        tensor, make = "spiece_model", sentencepiece_bytes
    elif _text(reader, f"{_TOKENIZER}pre") == "tekken":
        tensor, make = "tekken_model", tekken_bytes
    else:
        return None
    vocabulary = _vocabulary(reader)
    if not vocabulary.tokens:
        return None
    try:
        content = torch.frombuffer(bytearray(make(vocabulary)), dtype=torch.uint8)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} has {error}, of which ComfyUI's cannot be made: use its safetensors file."
        ) from None
    return replace(TensorEntry.of(tensor, content), path=path, join=lambda parts: content)


def _vocabulary(reader: GGUFReader) -> Vocabulary:
    roles = ("bos", "eos", "unknown", "padding")
    return Vocabulary(
        _text(reader, f"{_TOKENIZER}model"),
        [bytes(token).decode("utf-8", "replace") for token in _list(reader, f"{_TOKENIZER}tokens")],
        [float(score[0]) for score in _list(reader, f"{_TOKENIZER}scores")],
        [int(kind[0]) for kind in _list(reader, f"{_TOKENIZER}token_type")],
        {role: _number(reader, f"{_TOKENIZER}{role}_token_id") for role in roles if _has(reader, f"{role}_token_id")},
        bool(_number(reader, f"{_TOKENIZER}add_space_prefix")),
        bool(_number(reader, f"{_TOKENIZER}remove_extra_whitespaces")),
        bytes(int(part[0]) & 255 for part in _list(reader, f"{_TOKENIZER}precompiled_charsmap")),
    )


def _has(reader: GGUFReader, name: str) -> bool:
    return reader.get_field(f"{_TOKENIZER}{name}") is not None


def _list(reader: GGUFReader, name: str) -> list[Any]:
    found = reader.get_field(name)
    return [] if found is None else [found.parts[index] for index in found.data]


def _text(reader: GGUFReader, name: str) -> str:
    return bytes(_list(reader, name)[0]).decode("utf-8", "replace") if _list(reader, name) else ""


def _number(reader: GGUFReader, name: str) -> int:
    found = _list(reader, name)
    return int(found[0][0]) if found else 0
