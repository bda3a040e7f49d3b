"""How each family of core's generating text encoders is read as a decoder: one row a class of transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.cache_heads import HeadNorms
from ...ops.linear_weight import FLOAT8_DTYPES
from ...text.caches import CachePolicy, LayerCache, RingCache
from ...text.decoder import Model
from ...text.embedding import embedded
from ...text.layers import FeedForward, Layer, LayerAttention, Rotation
from ...text.linears import Linear
from ...versions import find
from .delta_net import DeltaNet
from .held_weights import HeldWeights, StreamedWeights
from .prefill import take_cache

GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Core's name of an activation -> ours."""


@dataclass
class Prompt:
    """A prompt that core has run.

    Attributes:
        caches: core's, filled.
        count: its tokens.
        room: tokens that a full cache must hold.
        positions: (1, T) of the tokens to come.
        policy: what the caches keep.
        gathered: by layer, for heavy hitters.
    """

    caches: Sequence[Any]
    count: int
    room: int
    positions: torch.Tensor
    policy: CachePolicy
    gathered: dict[int, torch.Tensor]


Weights = HeldWeights | StreamedWeights
Builder = Callable[[Any, Weights, Prompt], Model]


@dataclass(frozen=True)
class Family:
    """One class of transformer.

    Attributes:
        transformer: core's class of `model.model`.
        build: reads it as a decoder.
        hands_over_attention: its layers are given the attention function, so that a prompt's scores can be seen.
    """

    transformer: type
    build: Builder
    hands_over_attention: bool


def _embedding(transformer: Any, weights: Weights) -> tuple[Callable[[torch.Tensor], torch.Tensor], Any]:
    """(token (1, 1) -> (1, K), the embedding's weight or None)."""
    module, dtype = transformer.embed_tokens, weights.dtype
    if isinstance(weights, StreamedWeights):
        # Core's own row is of the table's dtype, which is none to compute in where that is FP8.
        made = dtype if module.weight.dtype in FLOAT8_DTYPES else None
        return lambda token: module(token, out_dtype=made).to(dtype).view(1, -1), None
    table, _ = weights.weight(module)
    scale = _embedding_scale(module, transformer.config.hidden_size)
    return lambda token: (embedded(table, token.view(1), dtype) * scale).to(dtype), table


def _embedding_scale(module: Any, width: int) -> float:
    """Gemma multiplies its embeddings; core does it in a subclass that it makes in a function."""
    return width**0.5 if type(module).__name__ == "ScaledEmbedding" else 1.0


def _logits(owner: Any, weights: Weights, table: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """(1, K) -> (1, V): the output head, or the embeddings where they are one."""
    if hasattr(owner.model, "lm_head"):
        head = weights.linears(owner.model.lm_head)
        return lambda x: head(x)[0]
    if table is None:
        return lambda x: owner.logits(x.unsqueeze(0))[:, -1]
    return Linear(table)


def prompt_logits(owner: Any, x: torch.Tensor) -> torch.Tensor:
    """(1, V) of what follows the last of x (1, T, K); core's own overlooks a head whose weights are not cast."""
    if hasattr(owner.model, "lm_head"):
        return owner.model.lm_head(x[:, -1])
    return owner.logits(x)[:, -1]


def _norm(module: Any, weights: Weights) -> torch.Tensor:
    weight = module.weight
    return weights.tensor(weight + 1.0 if getattr(module, "add", False) else weight)


def _feed_forward(module: Any, weights: Weights, config: Any) -> FeedForward:
    activation = GATES[config.mlp_activation]
    down = weights.linears(module.down_proj)
    return FeedForward(weights.linears(module.gate_proj, module.up_proj), down, activation)


def _head_norms(attention: Any, weights: Weights, value: bool = False) -> HeadNorms:
    options: dict[str, Any] = {"value": value}
    for ours, name in (("query", "q_norm"), ("key", "k_norm")):
        module = getattr(attention, name, None)
        if module is not None:
            options |= {ours: _norm(module, weights), "eps": module.eps}
    return HeadNorms(**options)


def _rotations(tables: Any) -> list[Rotation]:
    """Core's (cosine, sine, -sine) of the tokens to come, for one or more kinds of layers."""
    groups = tables if isinstance(tables, list) else [tables]
    made = []
    for cosine, sine, _ in groups:
        half = sine.shape[-1]
        made.append(Rotation(cosine[0, 0, :, :half].float().contiguous(), sine[0, 0].float().contiguous()))
    return made


# --- Llama, Qwen2.5, Qwen3, Ministral, Gemma 2 and 3


def build_llama(owner: Any, weights: Weights, prompt: Prompt) -> Model:
    """Decoder of core's `Llama2_`."""
    transformer = owner.model
    config = transformer.config
    embed, table = _embedding(transformer, weights)
    rotations = _rotations(transformer.compute_freqs_cis(prompt.positions, weights.device))
    layers = []
    for index, layer in enumerate(transformer.layers):
        window = getattr(layer, "sliding_attention", None) or None
        gathered = prompt.gathered.get(index)
        cache = take_cache(prompt.caches[index], prompt.count, prompt.room, window, prompt.policy, gathered)
        rotation = rotations[1 if window is not None and len(rotations) > 1 else 0]
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        after = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        layers.append(
            Layer(
                _self_attention(layer.self_attn, weights, rotation, cache),
                _feed_forward(layer.mlp, weights, config),
                _norm(layer.input_layernorm, weights),
                _norm(after, weights),
                _norm(layer.post_attention_layernorm, weights) if gemma else None,
                _norm(layer.post_feedforward_layernorm, weights) if gemma else None,
            )
        )
    norm = None if transformer.norm is None else _norm(transformer.norm, weights)
    return Model(embed, layers, norm, _logits(owner, weights, table), config.rms_norm_eps)


def _self_attention(
    module: Any, weights: Weights, rotation: Rotation, cache: LayerCache, *, gated: bool = False
) -> LayerAttention:
    return LayerAttention(
        weights.linears(module.q_proj, module.k_proj, module.v_proj),
        weights.linears(module.o_proj),
        module.num_heads,
        module.head_dim,
        _head_norms(module, weights),
        rotation,
        module.head_dim**-0.5,
        cache,
        gated=gated,
    )


# --- Qwen3.5


def build_qwen35(owner: Any, weights: Weights, prompt: Prompt) -> Model:
    """Decoder of core's `Qwen35Transformer`: three layers of gated delta nets, then one of gated attention."""
    transformer = owner.model
    config = transformer.config
    embed, table = _embedding(transformer, weights)
    rotation = _rotations(transformer.compute_freqs_cis(prompt.positions, weights.device))[0]
    layers = []
    for index, layer in enumerate(transformer.layers):
        filled = prompt.caches[index]
        if layer.layer_type == "linear_attention":
            mixer: Any = DeltaNet.read(layer.linear_attn, weights, filled[0], filled[1])
        else:
            cache = take_cache(filled, prompt.count, prompt.room, None, prompt.policy, prompt.gathered.get(index))
            mixer = _self_attention(layer.self_attn, weights, rotation, cache, gated=True)
        layers.append(
            Layer(
                mixer,
                _feed_forward(layer.mlp, weights, config),
                _norm(layer.input_layernorm, weights),
                _norm(layer.post_attention_layernorm, weights),
            )
        )
    return Model(embed, layers, _norm(transformer.norm, weights), _logits(owner, weights, table), config.rms_norm_eps)


# --- Gemma 4


def build_gemma4(owner: Any, weights: Weights, prompt: Prompt) -> Model:
    """Decoder of core's `Gemma4Transformer`: rings and full caches that later layers share, inputs for every layer."""
    transformer = owner.model
    config = transformer.config
    embed, table = _embedding(transformer, weights)
    rotations = [
        _gemma4_rotation(group)
        for group in transformer.compute_freqs_cis(prompt.positions, weights.device, weights.dtype)
    ]
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    sources: dict[bool, LayerCache] = {}
    layers = []
    for index, layer in enumerate(transformer.layers):
        sliding = bool(layer.sliding_attention)
        shared = index >= first_shared
        if not shared:
            sources[sliding] = _gemma4_cache(prompt.caches[index], prompt.count)
        attention = _gemma4_attention(layer.self_attn, weights, rotations[sliding], sources[sliding], shared)
        layers.append(
            Layer(
                attention,
                _feed_forward(layer.mlp, weights, config),
                _norm(layer.input_layernorm, weights),
                _norm(layer.pre_feedforward_layernorm, weights),
                _norm(layer.post_attention_layernorm, weights),
                _norm(layer.post_feedforward_layernorm, weights),
                _gemma4_finish(layer, weights, config),
            )
        )
    logits = _gemma4_logits(owner, _logits(owner, weights, table), table is None)
    extra = _gemma4_inputs(transformer, weights) if transformer.hidden_size_per_layer_input else None
    return Model(embed, layers, _norm(transformer.norm, weights), logits, config.rms_norm_eps, extra)


def _gemma4_rotation(matrices: torch.Tensor) -> Rotation:
    return Rotation(matrices[0, 0, :, :, 0, 0].float().contiguous(), matrices[0, 0, :, :, 1, 0].float().contiguous())


def _gemma4_cache(filled: Any, count: int) -> LayerCache:
    kind = RingCache if isinstance(filled, find(_RING_CACHE)) else LayerCache
    return kind(filled.key[0], filled.value[0], count)


def _gemma4_attention(
    module: Any, weights: Weights, rotation: Rotation, cache: LayerCache, shared: bool
) -> LayerAttention:
    parts = [module.q_proj]
    if not shared:
        parts += [module.k_proj] + ([] if module.v_proj is None else [module.v_proj])
    return LayerAttention(
        weights.linears(*parts),
        weights.linears(module.o_proj),
        module.num_heads,
        module.head_dim,
        _head_norms(module, weights, value=True),
        rotation,
        1.0,
        cache,
        reads_only=shared,
    )


def _gemma4_finish(layer: Any, weights: Weights, config: Any) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    scalar = weights.tensor(layer.layer_scalar)
    if not layer.hidden_size_per_layer_input:
        return lambda x, _: x * scalar
    gate, projection = weights.linears(layer.per_layer_input_gate), weights.linears(layer.per_layer_projection)
    norm = _norm(layer.post_per_layer_input_norm, weights)

    def finish(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        branch = projection(F.gelu(gate(x)[0], approximate="tanh") * given)[0]
        return (x + F.rms_norm(branch, norm.shape, norm, config.rms_norm_eps)) * scalar

    return finish


def _gemma4_inputs(transformer: Any, weights: Weights) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """(token, embedding) -> (layers, 1, width): what every layer of Gemma 4 is given of the token itself."""
    config = transformer.config
    count, width = config.num_hidden_layers, config.hidden_size_per_layer_input
    projection = weights.linears(transformer.per_layer_model_projection)
    norm = _norm(transformer.per_layer_projection_norm, weights)
    module = transformer.embed_tokens_per_layer
    if isinstance(weights, StreamedWeights):

        def look_up(token: torch.Tensor) -> torch.Tensor:
            return module(token)

    else:
        table, _ = weights.weight(module)
        scale = _embedding_scale(module, width)

        def look_up(token: torch.Tensor) -> torch.Tensor:
            return embedded(table, token.view(-1), weights.dtype) * scale

    def inputs(token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made = (projection(x)[0] * config.hidden_size**-0.5).view(count, 1, width)
        made = F.rms_norm(made, norm.shape, norm, config.rms_norm_eps)
        return ((made + look_up(token).view(count, 1, width)) * 0.5**0.5).to(x.dtype)

    return inputs


def _gemma4_logits(owner: Any, logits: Callable[[torch.Tensor], torch.Tensor], finished: bool) -> Any:
    """Core's soft cap and suppressed tokens on top of the product; `finished`: core has made them."""
    config = owner.model.config
    if finished:
        return logits

    def capped(x: torch.Tensor) -> torch.Tensor:
        made = logits(x)
        if config.final_logit_softcapping:
            made = config.final_logit_softcapping * torch.tanh(made / config.final_logit_softcapping)
        if config.suppress_tokens:
            made = made.index_fill(-1, owner.model._suppress_tokens, torch.finfo(made.dtype).min)
        return made

    return capped


_RING_CACHE = "comfy.text_encoders.gemma4.RingKV"


def _families() -> Iterator[Family]:
    """Those whose classes this ComfyUI has."""
    for names, build, hands_over_attention in (
        (("comfy.text_encoders.llama.Llama2_",), build_llama, True),
        (("comfy.text_encoders.qwen35.Qwen35Transformer",), build_qwen35, True),
        (("comfy.text_encoders.gemma4.Gemma4Transformer", _RING_CACHE), build_gemma4, False),
    ):
        transformer, *others = map(find, names)
        if transformer is not None and None not in others:
            yield Family(transformer, build, hands_over_attention)


FAMILIES = tuple(_families())


def find_family(owner: Any) -> Family | None:
    """The row of a generating text encoder's transformer, or None."""
    return next((family for family in FAMILIES if type(owner.model) is family.transformer), None)
