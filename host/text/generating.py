"""Makes a text with core's text encoder: core's forward for the prompt, our decoder for every token after it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.text_encoders.llama import BaseGenerate, Qwen25_7BVLI

from ...errors import CapabilityError
from ...kernels.runtime import current_gpu
from ...text.caches import FULL, CachePolicy
from ...text.decoder import Decoder
from ...text.loop import generate
from ...text.sampling import Sampler, Sampling, check_logits
from .families import Family, Prompt, find_family, prompt_logits
from .held_weights import HeldWeights, StreamedWeights, StreamedWeightsError
from .prefill import Gathered

logger = logging.getLogger("lowbit.text")

STOP_TOKENS = {Qwen25_7BVLI: (151643, 151645)}
"""Of the models that core has none for."""


@dataclass(frozen=True)
class TextGeneration:
    """How the text of a CLIP is made.

    Attributes:
        cuda_graph: replay one CUDA graph a token, where a GPU has all weights.
        cache: what is kept of the tokens before.
    """

    cuda_graph: bool = True
    cache: CachePolicy = field(default_factory=CachePolicy)


def read_arguments(owner: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of core's `BaseGenerate.generate`, by core's names and with its defaults."""
    bound = inspect.signature(BaseGenerate.generate).bind(owner, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def read_sampling(asked: dict[str, Any]) -> Sampling:
    """How tokens are drawn."""
    return Sampling(
        bool(asked["do_sample"]),
        asked["temperature"],
        asked["top_k"],
        asked["top_p"],
        asked["min_p"],
        asked["repetition_penalty"],
        asked["presence_penalty"] or 0.0,
        asked["seed"] or 0,
    )


def generate_text(owner: Any, settings: TextGeneration, *args: Any, **kwargs: Any) -> list[int]:
    """What core's `BaseGenerate.generate` does, with its arguments: token ids, the stop token among them.

    Args:
        owner: core's text encoder, a `BaseGenerate`.
        settings: how.

    Raises:
        CapabilityError: it is a Qwen2.5-VL without its output head, or cut off before its last layer.
        CheckpointError: it makes NaN of the prompt.
        FormatError: the repetition penalty is 0.
    """
    asked = read_arguments(owner, *args, **kwargs)
    check_head(owner)
    family = find_family(owner)
    reason = _unfit(family, asked)
    if family is None or reason is not None:
        logger.warning("Text generation runs through core's own loop: %s.", reason)
        return BaseGenerate.generate(owner, *args, **kwargs)
    embeds = asked["embeds"] if asked["embeds"].ndim == 3 else asked["embeds"].unsqueeze(0)
    with current_gpu(embeds.device):
        return _written(owner, family, asked, embeds, _fitting(settings, family, owner))


def _written(
    owner: Any, family: Family, asked: dict[str, Any], embeds: torch.Tensor, settings: TextGeneration
) -> list[int]:
    device, sampling = embeds.device, read_sampling(asked)
    dtype = asked["execution_dtype"] or (
        torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
    )
    prompt, logits = _run_prompt(owner, family, asked, embeds.to(dtype), settings)
    check_logits(logits)
    sampler = Sampler(sampling, logits.shape[-1], device, asked["initial_tokens"])
    first = sampler.draw(logits)
    bar = comfy.utils.ProgressBar(asked["max_length"])

    def seen(count: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(count)

    stops = stop_tokens(owner, asked["stop_tokens"])
    made = [int(first)]
    seen(1)
    if made[0] in stops or asked["max_length"] == 1:
        return made
    weights, model = _read_model(owner, family, device, dtype, prompt, settings)
    # Core's caches and the prompt's own tensors are the decoder's now, or nobody's.
    del prompt, logits
    try:
        decoder = Decoder(model, sampler, first, asked["max_length"])
        graph = settings.cuda_graph and isinstance(weights, HeldWeights)
        return generate(decoder, stops, graph=graph, seen=seen)
    finally:
        weights.release()


def check_head(owner: Any) -> None:
    """Refuse what cannot tell a next token: a Qwen2.5-VL without its output head, whose embeddings are not one, and a
    model that core cuts off for its inner states.

    Raises:
        CapabilityError: it is one of them.
    """
    if getattr(owner.model, "norm", owner) is None:
        raise CapabilityError(
            "This text encoder is cut off before its last layer, so it only encodes prompts: load a whole one to write text."
        )
    if isinstance(owner, Qwen25_7BVLI) and not hasattr(owner.model, "lm_head"):
        raise CapabilityError(
            "This Qwen2.5-VL has no output head, so it cannot write text: load a file that has 'lm_head.weight' with "
            "Load Text Encoder (Lowbit), which core's own loader leaves out."
        )


def stop_tokens(owner: Any, given: Sequence[int] | None) -> set[int]:
    """The tokens that end a text of this model."""
    if given is not None:
        return set(given)
    known = next((tokens for kind, tokens in STOP_TOKENS.items() if isinstance(owner, kind)), None)
    return set(owner.model.config.stop_tokens if known is None else known)


def _unfit(family: Family | None, asked: dict[str, Any]) -> str | None:
    if family is None:
        return "this model is of a family that the Text Generation node does not know"
    if asked["embeds"].ndim == 3 and asked["embeds"].shape[0] != 1:
        return "there is more than one prompt at a time"
    return None


def _fitting(settings: TextGeneration, family: Family, owner: Any) -> TextGeneration:
    """`settings`, with the full cache where the family cannot tell what attention gathers."""
    if settings.cache.kind == FULL or family.hands_over_attention:
        return settings
    logger.warning(
        "%s keeps the full key-value cache: its attention does not show which tokens are heavy hitters.",
        type(owner).__name__,
    )
    return TextGeneration(settings.cuda_graph, CachePolicy())


def _run_prompt(
    owner: Any, family: Family, asked: dict[str, Any], embeds: torch.Tensor, settings: TextGeneration
) -> tuple[Prompt, torch.Tensor]:
    """The prompt through core's forward; its caches, and (1, V) logits of what follows it."""
    count, device = embeds.shape[1], embeds.device
    keeps_all = settings.cache.kind == FULL
    room = count + asked["max_length"]
    caches = owner.init_kv_cache(1, room if keeps_all else count, device, embeds.dtype)
    options: dict[str, Any] = {}
    if asked.get("deepstack_embeds") is not None:
        options = {name: asked[name] for name in ("deepstack_embeds", "visual_pos_masks")}
    gathered = Gathered()
    watched = [] if keeps_all else owner.model.layers
    with gathered.watch(watched):
        x, _, caches = owner.model.forward(
            None,
            embeds=embeds,
            attention_mask=None,
            past_key_values=caches,
            input_ids=asked["initial_input_ids"],
            position_ids=asked["position_ids"],
            embeds_info=asked["embeds_info"],
            **options,
        )
    start = count if asked["position_ids"] is None else int(asked["position_ids"][:, -1].max()) + 1
    positions = torch.arange(start, start + asked["max_length"], device=device).unsqueeze(0)
    return Prompt(caches, count, room, positions, settings.cache, gathered.by_layer), prompt_logits(owner, x)


def _read_model(
    owner: Any, family: Family, device: torch.device, dtype: torch.dtype, prompt: Prompt, settings: TextGeneration
) -> tuple[HeldWeights | StreamedWeights, Any]:
    held = HeldWeights(device, dtype)
    try:
        return held, family.build(owner, held, prompt)
    except StreamedWeightsError:
        held.release()
    except BaseException:
        held.release()
        raise
    if settings.cuda_graph and device.type == "cuda":
        logger.info("Text is generated without a CUDA graph: the text encoder's weights are not all on the GPU.")
    streamed = StreamedWeights(device, dtype)
    return streamed, family.build(owner, streamed, prompt)
