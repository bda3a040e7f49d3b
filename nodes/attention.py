"""The attention nodes: pick a backend per shape within an error budget, and report what ran."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..attention.backends import BUDGETS, backend_names
from ..attention.candidates import AUTO, Policy
from ..attention.schedule import Schedule, parse_blocks
from ..host.attention.installing import find_override, install_override
from ..host.weights.folders import cache_folder
from .common import node_schema, show_text

FALL_BACK, STOP = "fall back", "stop"
# What older versions of this node saved for what `auto` does now.
FORMER_AUTO = "measured"
NO_NODE = "This model has no Attention (Lowbit) node: put one between the loader and the sampler."


class Attention(io.ComfyNode):
    """Attention through the fastest backend that can take each call."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitAttention",
            search_aliases=["sage attention", "sageattention", "flash attention", "cudnn", "sdpa", "attention backend"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("backend", options=[AUTO, *backend_names()], default=AUTO),
                io.Combo.Input("error_budget", options=list(BUDGETS), default="balanced"),
                io.Combo.Input("if_unavailable", options=[FALL_BACK, STOP], default=FALL_BACK, advanced=True),
                io.Boolean.Input("pair_with_weights", default=True, advanced=True),
                io.Int.Input("exact_first_steps", default=0, min=0, max=1000, advanced=True),
                io.Int.Input("exact_last_steps", default=0, min=0, max=1000, advanced=True),
                io.Float.Input("exact_sigma_from", default=0.0, min=0.0, max=1000.0, step=0.01, advanced=True),
                io.Float.Input("exact_sigma_to", default=0.0, min=0.0, max=1000.0, step=0.01, advanced=True),
                io.String.Input("exact_blocks", default="", advanced=True),
            ],
            outputs=[io.Model.Output()],
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
        return node_schema(
            "LowbitAttentionReport",
            search_aliases=["attention backend", "profile"],
            inputs=[io.Model.Input("model"), io.MatchType.Input("after", template=template)],
            outputs=[
                io.MatchType.Output(template=template, display_name="after"),
                io.String.Output(display_name="report"),
            ],
            hidden=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: io.Model.Type, after: object) -> io.NodeOutput:
        override = find_override(model)
        report = {"error": NO_NODE} if override is None else override.report()
        text = NO_NODE if override is None else override.text()
        return io.NodeOutput(after, json.dumps(report, indent=1), ui=ui.PreviewText(text))


NODES = [Attention, AttentionReport]
