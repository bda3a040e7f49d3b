"""The one node: quantized weights, attention and the memory manager, by a preset."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.optimizing import PRESETS, optimize
from .common import node_schema


class Optimize(io.ComfyNode):
    """Everything this pack does to a model, in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitOptimize",
            search_aliases=[
                "quantize",
                "fp8",
                "fp4",
                "int8",
                "sage attention",
                "vram",
                "out of memory",
                "low vram",
                "speed",
            ],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("preset", options=list(PRESETS), default="balanced"),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        preset: str,
        clip: io.Clip.Type | None = None,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        done = optimize(model, clip, vae, PRESETS[preset], cls.hidden.unique_id)
        report = f"{done.text}\n{done.report}"
        return io.NodeOutput(done.model, done.clip, done.vae, report, ui=ui.PreviewText(done.text))


NODES = [Optimize]
