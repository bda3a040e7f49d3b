"""The memory nodes: keep a graph within its budget, release components on an edge, and report where memory went."""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..host.memory.manager import manage
from ..host.memory.release import release
from ..host.memory.session import session
from ..memory.components import AUDIO_ENCODER, DIFFUSION_MODEL, MODEL_PATCH, SCRATCH, TEXT_ENCODER, VAE
from ..memory.policies import AUTO, POLICIES, SEQUENTIAL_CFG, STEP_CLEARING, Settings
from .common import CATEGORY, show_text

GIB = 1 << 30


class MemoryManager(io.ComfyNode):
    """Keeps a graph within a memory budget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowbitMemoryManager",
            display_name="Memory Manager (Lowbit)",
            category=CATEGORY,
            description=(
                "Keeps sampling and decoding within a memory budget on top of ComfyUI's own memory management, measures "
                "every step, and answers an out-of-memory error by making room and doing the step again. Put it right "
                "before the sampler. Removed, or with the model loaded anew, everything is as before."
            ),
            search_aliases=["vram", "out of memory", "oom", "low vram", "block swap", "offload", "clear cache"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to sample with. Costs nothing by itself."),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=AUTO,
                    tooltip="How memory and time are traded. "
                    + " ".join(f"{row.name}: {row.summary}." for row in POLICIES.values()),
                ),
                io.Combo.Input(
                    "step_clearing",
                    options=list(STEP_CLEARING),
                    default=AUTO,
                    tooltip=(
                        "Whether memory that PyTorch holds without using it goes back to the GPU between steps. auto: only "
                        "when it passes a threshold and is needed; costs nothing otherwise. off: never. every N: after "
                        "each Nth step, whether it helps or not; each clearing waits for the GPU and makes the next step "
                        "ask the driver for memory anew."
                    ),
                    advanced=True,
                ),
                io.Int.Input(
                    "every_n_steps",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="The N of every N; without effect otherwise. The smaller, the slower the steps.",
                    advanced=True,
                ),
                io.Float.Input(
                    "vram_limit_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.25,
                    tooltip=(
                        "GiB of GPU memory that this graph may take, to share the card or to try a smaller one; the driver's "
                        "own half a GiB comes on top. It holds from where the model, clip or VAE of this node is used: "
                        "connect clip, so that the text encoder keeps to it too. 0: the whole card. Weights that do not "
                        "fit are streamed from main memory, which costs time."
                    ),
                ),
                io.Combo.Input(
                    "sequential_cfg",
                    options=list(SEQUENTIAL_CFG),
                    default=AUTO,
                    tooltip=(
                        "Whether the positive and the negative prompt run one after the other instead of together. on: "
                        "about half the working memory; weights that stream do so twice a step, and a small picture takes "
                        "longer. auto: where the batch does not fit, or where it saves more streaming than it costs. off: "
                        "as ComfyUI decides. Without effect at cfg 1."
                    ),
                    advanced=True,
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A text encoder to keep within the budget too. Costs nothing by itself.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "A VAE to decode within the budget too: on the GPU, whole if that fits and tiled if not. Tiles "
                        "take longer, at most about twice as long, and may differ slightly where they meet."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, managed. Costs under 0.5% of a step."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, managed; nothing if none came in."),
                io.Vae.Output(display_name="vae", tooltip="The VAE, managed; nothing if none came in."),
            ],
            hidden=[io.Hidden.unique_id],
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
    "text_encoder": (TEXT_ENCODER, True, "Loading it again costs a second or two, once a changed prompt is encoded."),
    "diffusion_model": (DIFFUSION_MODEL, False, "All of them. Loading one again costs seconds, at the next sampling."),
    "vae": (VAE, False, "Loading it again costs a fraction of a second."),
    "audio_encoder": (AUDIO_ENCODER, False, "Loading it again costs about a second, once the audio changes."),
    "model_patch": (MODEL_PATCH, False, "InfiniteTalk's patch, for one. It is loaded again with its diffusion model."),
    "scratch": (SCRATCH, False, "This pack's working buffers. The next quantized layer makes them anew: microseconds."),
}
"""Input of the release node -> the component, its default, and what a release costs."""


class ReleaseComponent(io.ComfyNode):
    """Moves components off the GPU exactly when the data passes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        return io.Schema(
            node_id="LowbitReleaseComponent",
            display_name="Release Component (Lowbit)",
            category=CATEGORY,
            description=(
                "Passes a value on and moves the chosen components off the GPU at that moment: the diffusion model on the "
                "latent's edge before the decode, the text encoder where every prompt is encoded already (on one prompt's "
                "edge the other may still have to run). They stay in main memory, pinned as they were, and come back fast."
            ),
            search_aliases=["unload model", "free memory", "clear vram", "purge vram", "offload"],
            inputs=[
                io.MatchType.Input(
                    "value", template=template, tooltip="Anything: what passes is not changed or copied."
                ),
                *(
                    io.Boolean.Input(name, default=default, tooltip=f"Release the {component}. {cost}")
                    for name, (component, default, cost) in RELEASE_INPUTS.items()
                ),
            ],
            outputs=[
                io.MatchType.Output(
                    template=template,
                    display_name="value",
                    tooltip="What came in, unchanged. What runs after it costs no memory for the released components.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, value: object, **chosen: bool) -> io.NodeOutput:
        names = [component for name, (component, _, _) in RELEASE_INPUTS.items() if chosen.get(name)]
        show_text(cls.hidden.unique_id, release(names).text)
        return io.NodeOutput(value)


class MemoryReport(io.ComfyNode):
    """Where memory went."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        return io.Schema(
            node_id="LowbitMemoryReport",
            display_name="Memory Report (Lowbit)",
            category=CATEGORY,
            description=(
                "Draws the GPU's memory by component over the whole run, with steps, peaks and the limit, and says the "
                "same as text and JSON: ready for a bug report. Needs a Memory Manager (Lowbit) in the graph for more "
                "than the present moment."
            ),
            search_aliases=["vram usage", "memory profiler", "leak", "peak memory"],
            inputs=[
                io.MatchType.Input(
                    "value",
                    template=template,
                    tooltip="Anything that is made last, such as the images: the report waits for it. Drawing takes about a tenth of a second.",
                )
            ],
            outputs=[
                io.MatchType.Output(
                    template=template, display_name="value", tooltip="What came in, unchanged; costs nothing."
                ),
                io.Image.Output(
                    display_name="chart",
                    tooltip="Memory by component over time, 1600 x 900; some 17 MB of main memory.",
                ),
                io.String.Output(display_name="text", tooltip="The report as text; costs nothing."),
                io.String.Output(display_name="json", tooltip="The report as JSON, with every sample; some kilobytes."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, value: object) -> io.NodeOutput:
        report = session().report()
        chart = torch.from_numpy(np.asarray(report.chart, dtype=np.float32) / 255.0)[None]
        shown = ui.PreviewImage(chart).as_dict() | ui.PreviewText(report.text).as_dict()
        return io.NodeOutput(value, chart, report.text, json.dumps(report.data), ui=shown)


NODES = [MemoryManager, ReleaseComponent, MemoryReport]
