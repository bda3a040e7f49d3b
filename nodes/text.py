"""The text generation node: how a CLIP that writes text decodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.text import route
from ..host.text.generating import TextGeneration
from ..text.caches import FULL, HEAVY_HITTERS, CachePolicy
from .common import CATEGORY

AUTO, OFF = "auto", "off"


class GenerateText(io.ComfyNode):
    """Text from a CLIP, decoded on the GPU without waiting for the processor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowbitTextGeneration",
            display_name="Text Generation (Lowbit)",
            category=CATEGORY,
            description=(
                "Generate Text, and every other node that lets this CLIP write, decodes on the GPU: one captured graph a "
                "token, straight from the quantized weights. What the CLIP encodes for sampling stays as it is."
            ),
            search_aliases=[
                "LLM",
                "prompt enhance",
                "rewrite prompt",
                "heavy hitters",
                "H2O",
                "KV cache",
                "CUDA graph",
            ],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "A text encoder that can write: Qwen3, Qwen3-VL, Qwen3.5, Gemma 2, 3 or 4, Ministral, and "
                        "Qwen2.5-VL from Load Text Encoder (Lowbit)."
                    ),
                ),
                io.Combo.Input(
                    "kv_cache",
                    options=[FULL, HEAVY_HITTERS],
                    default=FULL,
                    tooltip=(
                        "full: every token looks at all tokens before it. heavy_hitters: only at the newest ones and at "
                        "those that have gathered most attention, so that memory and time do not grow with the text."
                    ),
                ),
                io.Combo.Input(
                    "cuda_graph",
                    options=[AUTO, OFF],
                    default=AUTO,
                    tooltip="auto: a captured graph a token where the GPU holds all weights. off: kernel by kernel.",
                    advanced=True,
                ),
                io.Int.Input(
                    "window",
                    default=252,
                    min=1,
                    max=1 << 20,
                    tooltip="With heavy_hitters: this many of the newest tokens are kept.",
                    advanced=True,
                ),
                io.Int.Input(
                    "heavy_hitters",
                    default=252,
                    min=0,
                    max=1 << 20,
                    tooltip="With heavy_hitters: this many older tokens are kept, for every layer and key head.",
                    advanced=True,
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The same text encoder, for Generate Text and for encoding prompts.")],
        )

    @classmethod
    def execute(
        cls, clip: io.Clip.Type, kv_cache: str, cuda_graph: str, window: int, heavy_hitters: int
    ) -> io.NodeOutput:
        settings = TextGeneration(cuda_graph == AUTO, CachePolicy(kv_cache, window, heavy_hitters))
        return io.NodeOutput(route.install_settings(clip, settings))


NODES = [GenerateText]
