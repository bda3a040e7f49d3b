"""Puts our decoding behind a CLIP: what asks it for text gets our loop, what encodes prompts notices nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import comfy.sd
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders import qwen_vl
from comfy.text_encoders.llama import BaseGenerate, Qwen25_7BVLI

from ...errors import CapabilityError
from .generating import TextGeneration, generate_text
from .tokenizing import tokenize_for_writing

_KEY = "lowbit_text_generation"
_ROUTED = "_lowbit_routes_text"


def install_settings(clip: comfy.sd.CLIP | None, settings: TextGeneration) -> comfy.sd.CLIP:
    """A clone of `clip` whose text is made by this pack, through whatever node calls its `generate`.

    Raises:
        CapabilityError: there is no CLIP, as behind a checkpoint without a text encoder.
    """
    if clip is None:
        raise CapabilityError(
            "There is no CLIP to write with: the checkpoint in front has no text encoder, so load one with Load Text Encoder "
            "(Lowbit)."
        )
    _route()
    clone = clip.clone()
    clone.patcher.model_options[_KEY] = settings
    return clone


def find_settings(clip: comfy.sd.CLIP) -> TextGeneration | None:
    """What `install` put on it, or None."""
    return clip.patcher.model_options.get(_KEY)


def _route() -> None:
    """Have core's `CLIP.generate` and `CLIP.tokenize` look for our settings, once a process.

    They travel with the patcher's options, as a LoRA loader behind our node clones the CLIP into a fresh object.
    """
    generate, tokenize = comfy.sd.CLIP.generate, comfy.sd.CLIP.tokenize
    if getattr(generate, _ROUTED, False):
        return

    @functools.wraps(generate)
    def generate_routed(self: comfy.sd.CLIP, *args: Any, **kwargs: Any) -> list[int]:
        settings = find_settings(self)
        if settings is None:
            return generate(self, *args, **kwargs)
        with decoding_here(self.cond_stage_model, settings):
            return generate(self, *args, **kwargs)

    @functools.wraps(tokenize)
    def tokenize_routed(self: comfy.sd.CLIP, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        if find_settings(self) is None:
            return tokenize(self, text, return_word_ids, **kwargs)
        return tokenize_for_writing(self, tokenize, text, return_word_ids, kwargs)

    setattr(generate_routed, _ROUTED, True)
    comfy.sd.CLIP.generate, comfy.sd.CLIP.tokenize = generate_routed, tokenize_routed


@contextlib.contextmanager
def decoding_here(model: torch.nn.Module, settings: TextGeneration) -> Iterator[None]:
    """For as long as this lasts, the generating text encoders in `model` decode through this pack.

    Raises:
        CapabilityError: there is none.
    """
    routed: list[Any] = []
    for module in model.modules():
        if isinstance(module, BaseGenerate):
            module.generate = functools.partial(generate_text, module, settings)
        elif isinstance(module, SDClipModel) and isinstance(module.transformer, Qwen25_7BVLI):
            module.generate = functools.partial(_generate_from_images, module)
        else:
            continue
        routed.append(module)
    if not routed:
        raise CapabilityError(
            f"{type(model).__name__.rstrip('_')} only encodes prompts, so it cannot write text: load a text encoder that "
            "can, such as a Qwen3, Gemma 3 or Qwen2.5-VL."
        )
    try:
        yield
    finally:
        for module in routed:
            del module.generate


def _generate_from_images(module: Any, tokens: Any, **sampling: Any) -> list[int]:
    """Core's `SDClipModel.generate` for Qwen2.5-VL, with the positions of images that core gives its encoding only."""
    if isinstance(tokens, dict):
        tokens = next(iter(tokens.values()))
    prompts = [_without_filling([token[0] for token in line], module.special_tokens["pad"]) for line in tokens]
    embeds, _, _, infos = module.process_tokens(prompts, module.execution_device)
    positions = qwen_vl.qwen2vl_mrope_position_ids(infos, embeds.shape[1], embeds.device)
    return module.transformer.generate(embeds, **sampling, position_ids=positions)


def _without_filling(prompt: list[Any], filled: int) -> list[Any]:
    """LongCat-Image's tokenizer fills a prompt up, behind which nothing could go on."""
    length = len(prompt)
    while length and isinstance(prompt[length - 1], int) and prompt[length - 1] == filled:
        length -= 1
    return prompt[:length]
