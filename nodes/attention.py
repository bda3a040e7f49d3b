"""The attention nodes: pick a backend per shape within an error budget, and report what ran."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..attention.backends import BACKENDS, BUDGETS, backend_names
from ..attention.candidates import AUTO, Policy
from ..attention.schedule import Schedule, parse_blocks
from ..host.attention.installing import find_override, install_override
from ..host.weights.folders import cache_folder
from .common import CATEGORY, show_text

_NOT_RUN = ", ".join(backend.name for backend in BACKENDS if not backend.tested_on)
FALL_BACK, STOP = "fall back", "stop"
# What older versions of this node saved for what `auto` does now.
FORMER_AUTO = "measured"
NO_NODE = "This model has no Attention (Lowbit) node: put one between the loader and the sampler."


class Attention(io.ComfyNode):
    """Attention through the fastest backend that can take each call."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowbitAttention",
            display_name="Attention (Lowbit)",
            category=CATEGORY,
            description=(
                "Runs each attention call on the fastest backend that takes its shape within the error budget. The first "
                "calls of every shape and some of every step are checked; a backend that makes NaN, errs too much or fails "
                "is replaced and the call done again."
            ),
            search_aliases=["sage attention", "sageattention", "flash attention", "cudnn", "sdpa", "attention backend"],
            inputs=[
                io.Model.Input("model", tooltip="A diffusion model: Wan, Qwen-Image, InfiniteTalk or any other."),
                io.Combo.Input(
                    "backend",
                    options=[AUTO, *backend_names()],
                    default=AUTO,
                    tooltip=(
                        "auto: times the candidates and ComfyUI's own attention on this graph when a shape first appears, "
                        "takes the fastest and remembers the times on disk. A name: that one wherever it can run. "
                        f"Not run by us: {_NOT_RUN}."
                    ),
                ),
                io.Combo.Input(
                    "error_budget",
                    options=list(BUDGETS),
                    default="balanced",
                    tooltip=(
                        "How far a result may be from exact attention: exact, like PyTorch's own; balanced, at most 2%; "
                        "fast, at most 5%. A backend asked for by name is not held to it."
                    ),
                ),
                io.Combo.Input(
                    "if_unavailable",
                    options=[FALL_BACK, STOP],
                    default=FALL_BACK,
                    tooltip="What to do when a backend asked for by name cannot run on this machine or model.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "pair_with_weights",
                    default=True,
                    tooltip=(
                        "With auto: FP4 weights admit sageattn_3_fp4 and FP8 or INT8 weights the 8-bit backends where the "
                        "GPU has them and they are the fastest, and a balanced budget counts as fast."
                    ),
                    advanced=True,
                ),
                io.Int.Input(
                    "exact_first_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="This many steps at the start are exact.",
                    advanced=True,
                ),
                io.Int.Input(
                    "exact_last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="This many steps at the end are exact.",
                    advanced=True,
                ),
                io.Float.Input(
                    "exact_sigma_from",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Exact from this sigma down to exact_sigma_to. Off while it is not above it.",
                    advanced=True,
                ),
                io.Float.Input(
                    "exact_sigma_to",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="The lower end of the exact range of sigmas.",
                    advanced=True,
                ),
                io.String.Input(
                    "exact_blocks",
                    default="",
                    tooltip="Blocks of the model that are always exact, such as: 0-2, 39. Empty for none.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, with its attention on the chosen backends.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, backend: str) -> bool | str:
        """Also takes what a workflow of an older version says."""
        known = backend in (AUTO, FORMER_AUTO, *backend_names())
        return known or f"backend: there is no {backend}; choose one of {', '.join((AUTO, *backend_names()))}."

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        backend: str,
        error_budget: str,
        if_unavailable: str,
        pair_with_weights: bool,
        exact_first_steps: int,
        exact_last_steps: int,
        exact_sigma_from: float,
        exact_sigma_to: float,
        exact_blocks: str,
    ) -> io.NodeOutput:
        policy = Policy(AUTO if backend == FORMER_AUTO else backend, error_budget, stop=if_unavailable == STOP)
        schedule = Schedule(
            exact_first_steps, exact_last_steps, exact_sigma_from, exact_sigma_to, parse_blocks(exact_blocks)
        )
        patched, remark = install_override(model, policy, schedule, pair_with_weights, cache_folder())
        if remark is not None:
            show_text(cls.hidden.unique_id, remark)
        return io.NodeOutput(patched)


class AttentionReport(io.ComfyNode):
    """Which backend took which attention calls."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("after")
        return io.Schema(
            node_id="LowbitAttentionReport",
            display_name="Attention Report (Lowbit)",
            category=CATEGORY,
            description=(
                "Says which attention backend took how many calls of which shapes, how long they took where that was "
                "measured, and what was struck off and why."
            ),
            search_aliases=["attention backend", "profile"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Attention (Lowbit), or a later patch of it."),
                io.MatchType.Input(
                    "after",
                    template=template,
                    tooltip="Anything that is made after sampling, such as the latent: the report waits for it.",
                ),
            ],
            outputs=[
                io.MatchType.Output(template=template, display_name="after", tooltip="What came in, unchanged."),
                io.String.Output(display_name="report", tooltip="The report as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: io.Model.Type, after: object) -> io.NodeOutput:
        override = find_override(model)
        report = {"error": NO_NODE} if override is None else override.report()
        text = NO_NODE if override is None else override.text()
        return io.NodeOutput(after, json.dumps(report, indent=1), ui=ui.PreviewText(text))


NODES = [Attention, AttentionReport]
