"""Which models can be split, one row each: their blocks, the attention that sees all tokens, and what is as long as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...attention.split_forward import COARSE, PLACE, STREAM, TOKENS, Input, SplitFamily
from ...versions import find


@dataclass(frozen=True, kw_only=True)
class CoreFamily(SplitFamily):
    """One row of the table.

    Attributes:
        call: names of what the network's forward takes. One that is called with anything else runs on one GPU.
        by_frame: transformer options that have a row a frame -> their dimension of frames: what a patch in a block reads.
    """

    call: frozenset[str]
    by_frame: Mapping[str, int] = field(default_factory=dict)


_COMMON = frozenset({"x", "timestep", "timesteps", "context", "transformer_options"})

FAMILIES: Mapping[str, CoreFamily] = MappingProxyType(
    {
        row.network: row
        for row in (
            CoreFamily(
                "comfy.ldm.wan.model.WanModel",
                "blocks",
                "self_attn",
                {
                    "x": Input(STREAM, ("video",)),
                    "freqs": Input(TOKENS, ("video",)),
                    "e": Input(COARSE, ("video",)),
                },
                "head",
                "video",
                {"e": Input(COARSE, ("video",))},
                call=_COMMON | {"clip_fea", "time_dim_concat", "reference_latent", "context_latents", "denoise_mask"},
                by_frame={"audio_embeds": 1},
            ),
            CoreFamily(
                "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
                "transformer_blocks",
                "attn",
                {
                    "hidden_states": Input(STREAM, ("image",)),
                    "encoder_hidden_states": Input(STREAM, ("text",)),
                    "encoder_hidden_states_mask": Input(TOKENS, ("text",), -1),
                    "image_rotary_emb": Input(TOKENS, ("text", "image"), 2),
                    "timestep_zero_index": Input(PLACE, ("image",)),
                },
                "proj_out",
                "image",
                call=_COMMON | {"attention_mask", "ref_latents", "ref_latents_method", "additional_t_cond"},
            ),
        )
    }
)
"""Full name of the network's class -> its row."""


def family_of(network: Any) -> CoreFamily | None:
    """The row of a network; None where it cannot be split."""
    kind = type(network)
    row = FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
    return row if row is not None and find(row.network) is kind else None
