"""The memory nodes: keep a graph within its budget, release components on an edge, and report where memory went."""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..host.memory.manager import manage
from ..host.memory.release import release
from ..host.memory.session import session
from ..memory.components import AUDIO_ENCODER, DIFFUSION_MODEL, GIB, MODEL_PATCH, SCRATCH, TEXT_ENCODER, VAE
from ..memory.policies import AUTO, POLICIES, SEQUENTIAL_CFG, STEP_CLEARING, Settings
from .common import node_schema, show_text


class MemoryManager(io.ComfyNode):
    """Keeps a graph within a memory budget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitMemoryManager",
            search_aliases=["vram", "out of memory", "oom", "low vram", "block swap", "offload", "clear cache"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("policy", options=list(POLICIES), default=AUTO),
                io.Combo.Input("step_clearing", options=list(STEP_CLEARING), default=AUTO, advanced=True),
                io.Int.Input("every_n_steps", default=1, min=1, max=1000, advanced=True),
                io.Float.Input("vram_limit_gib", default=0.0, min=0.0, max=1024.0, step=0.25),
                io.Combo.Input("sequential_cfg", options=list(SEQUENTIAL_CFG), default=AUTO, advanced=True),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        policy: str,
        step_clearing: str,
        every_n_steps: int,
        vram_limit_gib: float,
        sequential_cfg: str,
        clip: io.Clip.Type | None = None,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        limit = int(vram_limit_gib * GIB) or None
        settings = Settings(policy, step_clearing, every_n_steps, limit, sequential_cfg)
        return io.NodeOutput(*manage(model, clip, vae, settings, cls.hidden.unique_id))


RELEASE_INPUTS = {
    "text_encoder": (TEXT_ENCODER, True),
    "diffusion_model": (DIFFUSION_MODEL, False),
    "vae": (VAE, False),
    "audio_encoder": (AUDIO_ENCODER, False),
    "model_patch": (MODEL_PATCH, False),
    "scratch": (SCRATCH, False),
}
"""Input of the release node -> the component and its default."""


class ReleaseComponent(io.ComfyNode):
    """Moves components off the GPU exactly when the data passes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        return node_schema(
            "LowbitReleaseComponent",
            search_aliases=["unload model", "free memory", "clear vram", "purge vram", "offload"],
            inputs=[
                io.MatchType.Input("value", template=template),
                *(io.Boolean.Input(name, default=default) for name, (_, default) in RELEASE_INPUTS.items()),
            ],
            outputs=[io.MatchType.Output(template=template, display_name="value")],
        )

    @classmethod
    def execute(cls, value: object, **chosen: bool) -> io.NodeOutput:
        names = [component for name, (component, _) in RELEASE_INPUTS.items() if chosen.get(name)]
        show_text(cls.hidden.unique_id, release(names).text)
        return io.NodeOutput(value)


class MemoryReport(io.ComfyNode):
    """Where memory went."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        return node_schema(
            "LowbitMemoryReport",
            search_aliases=["vram usage", "memory profiler", "leak", "peak memory"],
            inputs=[io.MatchType.Input("value", template=template)],
            outputs=[
                io.MatchType.Output(template=template, display_name="value"),
                io.Image.Output(display_name="chart"),
                io.String.Output(display_name="text"),
                io.String.Output(display_name="json"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, value: object) -> io.NodeOutput:
        report = session().report()
        chart = torch.from_numpy(np.asarray(report.chart, dtype=np.float32) / 255.0)[None]
        shown = ui.PreviewImage(chart).as_dict() | ui.PreviewText(report.text).as_dict()
        return io.NodeOutput(value, chart, report.text, json.dumps(report.data), ui=shown)


NODES = [MemoryManager, ReleaseComponent, MemoryReport]
