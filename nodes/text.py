"""The text generation node: how a CLIP that writes text decodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.text import route
from ..host.text.generating import TextGeneration
from ..text.caches import FULL, HEAVY_HITTERS, CachePolicy
from .common import node_schema

AUTO, OFF = "auto", "off"


class GenerateText(io.ComfyNode):
    """Text from a CLIP, decoded on the GPU without waiting for the processor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitTextGeneration",
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
                io.Clip.Input("clip"),
                io.Combo.Input("kv_cache", options=[FULL, HEAVY_HITTERS], default=FULL),
                io.Combo.Input("cuda_graph", options=[AUTO, OFF], default=AUTO, advanced=True),
                io.Int.Input("window", default=252, min=1, max=1 << 20, advanced=True),
                io.Int.Input("heavy_hitters", default=252, min=0, max=1 << 20, advanced=True),
            ],
            outputs=[io.Clip.Output()],
            hidden=[],
        )

    @classmethod
    def execute(
        cls, clip: io.Clip.Type, kv_cache: str, cuda_graph: str, window: int, heavy_hitters: int
    ) -> io.NodeOutput:
        settings = TextGeneration(cuda_graph == AUTO, CachePolicy(kv_cache, window, heavy_hitters))
        return io.NodeOutput(route.install_settings(clip, settings))


NODES = [GenerateText]
