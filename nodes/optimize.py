"""The one node: quantized weights, attention and the memory manager, by a preset."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.optimizing import PRESETS, optimize
from .common import CATEGORY


class Optimize(io.ComfyNode):
    """Everything this pack does to a model, in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowbitOptimize",
            display_name="Optimize (Lowbit)",
            category=CATEGORY,
            description=(
                "Makes a diffusion model smaller and faster: stores its weights in 8 or 4 bits, gives it the fastest "
                "attention that is accurate enough, and keeps the graph within the GPU's memory. Put it behind any loader; "
                "LoRAs may come before or after it. A model that is quantized already keeps its weights."
            ),
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
                io.Model.Input("model", tooltip="A diffusion model from any loader: Wan, Qwen-Image or any other."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="balanced",
                    tooltip="What counts most. " + " ".join(f"{row.name}: {row.summary}." for row in PRESETS.values()),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A text encoder to keep within the GPU's memory too. Its weights stay as they are.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="A VAE to decode within the GPU's memory too: whole if that fits and tiled if not.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, quantized and managed."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, managed; nothing if none came in."),
                io.Vae.Output(display_name="vae", tooltip="The VAE, managed; nothing if none came in."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was done, and every layer with what became of it: connect a Preview as Text node.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
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
