"""Gives an encoder that writes the pictures of Generate Text, and a chat's turns, where core's tokenizer leaves them out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.sd
from comfy.text_encoders.llama import Qwen25_7BVLI

logger = logging.getLogger("lowbit.text")

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_PICTURE_TOKEN = 151655
_TURN = "<|im_start|>"

_ENTERS_AS = {"image": "image", "video": "image", "audio": "audio"}
"""What Generate Text hands over besides the text -> the kind of token that core makes of it."""


def tokenize_for_writing(
    clip: comfy.sd.CLIP, tokenize: Callable[..., Any], text: str, return_word_ids: bool, options: Mapping[str, Any]
) -> Any:
    """What core's `CLIP.tokenize` returns, `options` its further arguments; what is left out of it is named in a warning."""
    if "skip_template" in options and _is_qwen25(clip):
        tokens = _tokenize_qwen25(clip, tokenize, text, return_word_ids, options)
    else:
        tokens = tokenize(clip, text, return_word_ids, **options)
    given = [name for name in _ENTERS_AS if options.get(name) is not None]
    if not given:
        return tokens
    # Core drops what its model has no tower for.
    sees = any(hasattr(module, "preprocess_embed") for module in clip.cond_stage_model.modules())
    made = set(_kinds(tokens)) if sees else set()
    for name in given:
        if _ENTERS_AS[name] not in made:
            logger.warning("Left out of the text: %s. This text encoder, or its prompt, has no place for it.", name)
    return tokens


def _tokenize_qwen25(
    clip: comfy.sd.CLIP, tokenize: Callable[..., Any], text: str, return_word_ids: bool, options: Mapping[str, Any]
) -> Any:
    """A turn of a chat, with pictures: core has templates and a place for pictures that are for encoding only."""
    image = options.get("image")
    pictures = [] if image is None else [picture[None, ..., :3] for picture in image]
    if options["skip_template"]:
        options = {**options, "llama_template": "{}"}
    elif not text.startswith(_TURN):
        # Core's tokenizers leave a text as it is that begins with a turn.
        text = (
            f"{_TURN}system\nYou are a helpful assistant.<|im_end|>\n"
            f"{_TURN}user\n{_PICTURE * len(pictures)}{text}<|im_end|>\n{_TURN}assistant\n"
        )
    tokens = tokenize(clip, text, return_word_ids, **options)
    left = iter(pictures)
    for line in next(iter(tokens.values())):
        for place, token in enumerate(line):
            picture = next(left, None) if isinstance(token[0], int) and token[0] == _PICTURE_TOKEN else None
            if picture is not None:
                line[place] = ({"type": "image", "data": picture, "original_type": "image"}, *token[1:])
    return tokens


def _is_qwen25(clip: comfy.sd.CLIP) -> bool:
    return any(isinstance(module, Qwen25_7BVLI) for module in clip.cond_stage_model.modules())


def _kinds(tokens: Any) -> Iterator[str]:
    """Of all tokens that are no words: image, audio."""
    if isinstance(tokens, Mapping):
        for lines in tokens.values():
            yield from _kinds(lines)
        return
    for line in tokens:
        for token in line:
            if isinstance(token[0], Mapping):
                yield token[0].get("original_type", token[0]["type"])
