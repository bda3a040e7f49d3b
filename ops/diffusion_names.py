"""What ComfyUI calls the tensors of a diffusion model: the prefixes it takes off, and the names it changes on loading.

Source: ComfyUI's comfy/model_detection.py (`unet_prefix_from_state_dict`, `convert_diffusers_mmdit`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

DIFFUSION_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
"""Of a diffusion model in a file of several parts, or saved by its trainer."""

_OTHERWISE = "model."
_FEW = 5


def part_prefix(names: Iterable[str]) -> str:
    """The prefix of `DIFFUSION_PREFIXES` that core finds a diffusion model under, or none."""
    counts = dict.fromkeys(DIFFUSION_PREFIXES, 0)
    tops = set()
    for name in names:
        tops.add(name.partition(".")[0])
        found = next((prefix for prefix in DIFFUSION_PREFIXES if name.startswith(prefix)), None)
        if found is not None:
            counts[found] += 1
    most = max(DIFFUSION_PREFIXES, key=counts.__getitem__)
    # SAM 3's two halves have names of their own.
    return most if counts[most] > _FEW and not {"detector", "tracker"} <= tops else ""


def diffusion_names(names: Collection[str]) -> tuple[str, dict[str, str]]:
    """The prefix that core takes off a diffusion model's file, and the names it goes on with, the file's by core's.

    Only for a diffusion model: a text encoder's `model.` is part of its names.
    """
    prefix = part_prefix(names) or _OTHERWISE
    below = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    tops = {name.partition(".")[0] for name in names}
    if not below or {"detector", "tracker"} <= tops:
        return "", {name: name for name in names}
    return prefix, below


def described_weight(layer: str, names: Collection[str]) -> str | None:
    """The weight that a header's description of `layer` is of: with any prefix of core's put on or taken off."""
    stems = [layer]
    for prefix in (*DIFFUSION_PREFIXES, _OTHERWISE):
        stems.append(prefix + layer)
        if layer.startswith(prefix):
            stems.append(layer.removeprefix(prefix))
    return next((f"{stem}.weight" for stem in stems if f"{stem}.weight" in names), None)


_CONVERTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "AuraFlow": ("joint_transformer_blocks.0.attn.add_k_proj",),
        "PixArt": ("adaln_single.emb.timestep_embedder.linear_1", "pos_embed.proj", "transformer_blocks.0.attn1.to_q"),
        "Z-Image": ("noise_refiner.0.attention.norm_k",),
        "Flux": ("x_embedder", "transformer_blocks.0.attn.add_q_proj"),
        "Stable Diffusion 3": ("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"),
        "Stable Diffusion": ("down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv1"),
    }
)


def converted_model(names: Collection[str]) -> str | None:
    """The model whose diffusers names these are and that core renames and fuses on loading, or None.

    Other models' diffusers names mean nothing to core, and are left alone.
    """
    layers = {name.rpartition(".")[0] for name in names}
    prefixes = ("", *DIFFUSION_PREFIXES, _OTHERWISE)
    return next(
        (
            model
            for model, signature in _CONVERTED.items()
            if any(layers.issuperset(prefix + layer for layer in signature) for prefix in prefixes)
        ),
        None,
    )


_TABLES = (
    "*embedding",
    "*embeddings",
    "*embedding_table",
    "*_embed",
    "*_embs",
    "embed",
    "embed_*",
    "emb",
    "*_emb",
    "*mode_embedder",
    "style_embedder",
    "codebook",
    "*_token",
    "*_tokens",
    "reference_points",
    "trainable_cond_mask",
    "relative_attention_bias",
    "shared",
    "wte",
    "wpe",
)


def tables(layers: Iterable[str]) -> dict[str, str]:
    """Layers that are called what embedding and position tables are, and why those stay as they are.

    For want of the model's code. A Linear of such a name stays in 16 bits too.
    """
    reason = "an embedding by its name: its rows are looked up, not multiplied"
    found = (layer for layer in layers if any(fnmatch.fnmatchcase(layer.rpartition(".")[2], glob) for glob in _TABLES))
    return dict.fromkeys(found, reason)
