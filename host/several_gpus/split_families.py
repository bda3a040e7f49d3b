"""Which models can be split, one row each: their blocks, the attention that sees all tokens, and what is as long as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...versions import find

STREAM, TOKENS, COARSE, PLACE = "stream", "tokens", "coarse", "place"


@dataclass(frozen=True)
class Input:
    """An input of a module that is cut.

    Attributes:
        kind: STREAM for hidden states, cut before the first block and joined after the last; TOKENS for what goes with
            them, cut for every block; COARSE for what has a row for so many tokens, or one for all; PLACE for a number
            that counts tokens.
        streams: the streams that lie in it one after the other.
        dim: the dimension that is cut.
    """

    kind: str
    streams: tuple[str, ...]
    dim: int = 1


@dataclass(frozen=True)
class SplitFamily:
    """One row of the table.

    Attributes:
        network: full name of ComfyUI's class. Only this class itself: a subclass has a forward of its own.
        blocks: its attribute with the blocks that run one after the other.
        attention: in a block, the module whose attention sees all tokens. Any other attention stays local.
        inputs: of a block, by the names of its forward's parameters.
        output: the module after the blocks whose result is joined again.
        output_inputs: as `inputs`.
        main: the stream that `output` makes the result of.
        by_frame: transformer options that have a row a frame -> their dimension of frames: what a patch in a block reads.
        call: names of what the network's forward takes. One that is called with anything else runs on one GPU.
    """

    network: str
    blocks: str
    attention: str
    inputs: Mapping[str, Input]
    output: str
    main: str
    call: frozenset[str]
    output_inputs: Mapping[str, Input] = field(default_factory=dict)
    by_frame: Mapping[str, int] = field(default_factory=dict)


_COMMON = frozenset({"x", "timestep", "timesteps", "context", "transformer_options"})

FAMILIES: Mapping[str, SplitFamily] = MappingProxyType(
    {
        row.network: row
        for row in (
            SplitFamily(
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
                _COMMON | {"clip_fea", "time_dim_concat", "reference_latent", "context_latents", "denoise_mask"},
                {"e": Input(COARSE, ("video",))},
                {"audio_embeds": 1},
            ),
            SplitFamily(
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
                _COMMON | {"attention_mask", "ref_latents", "ref_latents_method", "additional_t_cond"},
            ),
        )
    }
)
"""Full name of the network's class -> its row."""


def family_of(network: Any) -> SplitFamily | None:
    """The row of a network; None where it cannot be split."""
    kind = type(network)
    row = FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
    return row if row is not None and find(row.network) is kind else None
