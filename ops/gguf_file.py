"""Opens a GGUF file as a checkpoint: ComfyUI's names and shapes, each tensor decoded when it is read.

Source: the GGUF specification (ggml's docs/gguf.md), read by the `gguf` package; ComfyUI-GGUF's conventions for shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CapabilityError, CheckpointError
from .gguf_names import LANGUAGE_MODELS, TEXT_ARCHITECTURES, Joined, TextArchitecture, vision_tensors
from .header import DECODED, FileStamp, TensorEntry, file_stamp, opening

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"
PLAIN: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
    }
)
"""Types that are stored as torch holds them."""

_SHAPE = "comfy.gguf.orig_shape."
_TOKENIZED = frozenset({"t5", "t5encoder"})
_UNIGRAM_VOCABULARY = 256_384
"""UMT5's, whose tokenizer ComfyUI takes from the file; other T5 encoders have one of its own."""


def open_gguf(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], tuple[FileStamp, ...]]:
    """Tensors by ComfyUI's name, text entries, and the state of each file that was read.

    A text encoder's vision tower is read from the `mmproj` file beside it, where there is one.

    Raises:
        CapabilityError: the `gguf` package is not installed.
        CheckpointError: the file is missing, damaged, or of an architecture that is not known.
    """
    reader, stamp = _read(path)
    stored = {tensor.name: _entry(path, tensor, reader, stamp.size) for tensor in reader.tensors}
    name = _text(reader, "general.architecture")
    architecture = TEXT_ARCHITECTURES.get(name)
    if architecture is None:
        if name in LANGUAGE_MODELS:
            known = ", ".join(TEXT_ARCHITECTURES)
            raise CheckpointError(
                f"{path.name} is a language model of the architecture '{name}', whose tensors are not known here (only of "
                f"{known}): use its safetensors file."
            )
        return stored, {}, (stamp,)
    entries = dict(_text_encoder(stored, architecture, reader, name))
    stamps = [stamp]
    embedding = entries.get("shared.weight")
    if name in _TOKENIZED and embedding is not None and embedding.shape[0] == _UNIGRAM_VOCABULARY:
        entries["spiece_model"] = _tokenizer(path, reader)
    if name == "qwen2vl" and (beside := vision_file(path)) is not None:
        vision_reader, vision_stamp = _read(beside)
        parts = {
            tensor.name: _entry(beside, tensor, vision_reader, vision_stamp.size) for tensor in vision_reader.tensors
        }
        entries |= {ours: _joined(ours, made, parts) for ours, made in vision_tensors(frozenset(parts)).items()}
        stamps.append(vision_stamp)
    return entries, {}, tuple(stamps)


def vision_file(path: Path) -> Path | None:
    """The `mmproj` file of a text encoder: beside it, the one whose name shares most of its beginning."""
    others = [other for other in path.parent.glob(f"*{SUFFIX}") if "mmproj" in other.name.lower()]
    return max(others, key=lambda other: len(os.path.commonprefix((_bare(other), _bare(path)))), default=None)


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
            return gguf.GGUFReader(path), stamp
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
    dtype = PLAIN.get(kind)
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
            yield ours, _joined(ours, Joined((theirs,), partial(_changed, change)), stored)


def _changed(change: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    return change(parts[0])


def _joined(ours: str, made: Joined, parts: Mapping[str, TensorEntry]) -> TensorEntry:
    """An entry that is made of others when it is read."""
    entries = tuple(parts[name] for name in made.parts)
    shape = made.join([torch.empty(entry.shape, device="meta") for entry in entries]).shape
    nbytes = sum(entry.nbytes for entry in entries)
    return TensorEntry(ours, entries[0].dtype, tuple(shape), entries[0].path, 0, nbytes, "", entries, made.join)


def _tokenizer(path: Path, reader: GGUFReader) -> TensorEntry:
    """The SentencePiece model that the file's tokens were taken from, as the bytes that ComfyUI reads.

    Raises:
        CapabilityError: there is no sentencepiece.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise CapabilityError(
            f"{path.name} holds a tokenizer, which is made anew with 'sentencepiece' and 'protobuf': install both."
        ) from None
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    tokens = (_list(reader, f"tokenizer.ggml.{part}") for part in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*tokens, strict=True):
        model.pieces.add(piece=bytes(token).decode("utf-8"), score=float(score[0]), type=int(kind[0]))
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.byte_fallback = any(piece.type == piece.BYTE for piece in model.pieces)
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.eos_id = _number(reader, "tokenizer.ggml.eos_token_id")
    model.trainer_spec.pad_id = _number(reader, "tokenizer.ggml.padding_token_id")
    model.normalizer_spec.add_dummy_prefix = bool(_number(reader, "tokenizer.ggml.add_space_prefix"))
    model.normalizer_spec.remove_extra_whitespaces = bool(_number(reader, "tokenizer.ggml.remove_extra_whitespaces"))
    charsmap = reader.get_field("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None:
        model.normalizer_spec.precompiled_charsmap = bytes(
            int(charsmap.parts[index][0]) & 255 for index in charsmap.data
        )
    content = torch.frombuffer(bytearray(model.SerializeToString()), dtype=torch.uint8)
    return TensorEntry(
        "spiece_model", torch.uint8, tuple(content.shape), path, 0, content.numel(), "", (), lambda parts: content
    )


def _list(reader: GGUFReader, name: str) -> list[Any]:
    found = reader.get_field(name)
    return [] if found is None else [found.parts[index] for index in found.data]


def _text(reader: GGUFReader, name: str) -> str:
    return bytes(_list(reader, name)[0]).decode("utf-8", "replace") if _list(reader, name) else ""


def _number(reader: GGUFReader, name: str) -> int:
    found = _list(reader, name)
    return int(found[0][0]) if found else 0
