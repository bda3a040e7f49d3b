"""Makes the tokenizer that ComfyUI reads from a text encoder's file out of what llama.cpp keeps of it in a GGUF file.

Sources: sentencepiece's src/sentencepiece_model.proto, whose bytes are written here as protobuf's encoding says; Mistral's
tekken.json as ComfyUI's comfy/text_encoders/bpe_tokenizer.py reads it; GPT-2's table of bytes (`bytes_to_unicode`).
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

_UNIGRAM, _BPE = 1, 2
_MODELS: Mapping[str, int] = MappingProxyType({"t5": _UNIGRAM, "llama": _BPE})
"""What llama.cpp calls sentencepiece's kinds of models (`tokenizer.ggml.model`)."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Kinds of pieces, the same numbers in both."""

_VARINT, _BYTES, _FLOAT = 0, 2, 5
"""Protobuf's wire types."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file has of a tokenizer, `tokenizer.ggml.*`.

    Attributes:
        model: the kind of tokenizer.
        tokens: in the order of their numbers.
        scores: of each; empty where the kind has none.
        kinds: of each.
        named: numbers of tokens with a role (`bos`, `eos`, `unknown`, `padding`).
        space_prefix: a space is put in front of the text.
        single_spaces: several spaces become one.
        characters: the compiled map of characters to normal ones.
    """

    model: str
    tokens: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    named: Mapping[str, int]
    space_prefix: bool
    single_spaces: bool
    characters: bytes


def sentencepiece_bytes(vocabulary: Vocabulary) -> bytes:
    """The SentencePiece model (`ModelProto`) that the tokens were taken from.

    Raises:
        ValueError: it is another kind of tokenizer, or its lists are of several lengths.
    """
    if vocabulary.model not in _MODELS:
        raise ValueError(f"a tokenizer of the kind '{vocabulary.model}'")
    model = _MODELS[vocabulary.model]
    roles, unknown = set(vocabulary.named.values()), vocabulary.named.get("unknown")
    # llama.cpp calls all special tokens control pieces. Sentencepiece finds those that a text may name, as <start_of_turn>, and
    # wants one that is unknown.
    kinds = [
        _USER_DEFINED if model == _BPE and kind == _CONTROL and number not in roles else kind
        for number, kind in enumerate(vocabulary.kinds)
    ]
    if _UNKNOWN not in kinds and unknown is not None:
        kinds[unknown] = _UNKNOWN
    pieces = (
        _field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, kinds, strict=True)
    )
    trainer = _field(3, model) + _field(4, len(kinds)) + _field(35, int(_BYTE in kinds))
    for place, role in enumerate(("unknown", "bos", "eos", "padding")):
        if role in vocabulary.named:
            number = vocabulary.named[role]
            trainer += _field(40 + place, number) + _field(45 + place, vocabulary.tokens[number])
    normalizer = _field(3, int(vocabulary.space_prefix)) + _field(4, int(vocabulary.single_spaces))
    if vocabulary.characters:
        normalizer += _field(2, vocabulary.characters)
    return b"".join((*pieces, _field(2, trainer), _field(3, normalizer)))


def tekken_bytes(vocabulary: Vocabulary) -> bytes:
    """Mistral's `tekken.json`: special tokens, which come first, and those of bytes in their order.

    Raises:
        ValueError: tokens are written otherwise than in GPT-2's letters for bytes.
    """
    of_letter = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    first = next((number for number, kind in enumerate(vocabulary.kinds) if kind == _NORMAL), 0)
    try:
        content = [bytes(of_letter[letter] for letter in token) for token in vocabulary.tokens[first:]]
    except KeyError as error:
        raise ValueError(f"a tokenizer with the letter {error}, which stands for no byte") from None
    config = {"default_vocab_size": len(vocabulary.tokens), "default_num_special_tokens": first}
    ranked = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(content)]
    named = [{"rank": rank, "token_str": token} for rank, token in enumerate(vocabulary.tokens[:first])]
    return json.dumps({"config": config, "vocab": ranked, "special_tokens": named}).encode()


def _letters_of_bytes() -> list[str]:
    """A printable letter for each byte: its own, or one behind the first 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _field(number: int, value: float | str | bytes) -> bytes:
    """A field of a protobuf message; a natural number, a 32-bit float, or something with a length."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | _FLOAT) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
