"""The nodes on a loaded model: quantize it, and save it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host.weights.preparing import Request
from ..host.weights.quantizing import plan_model, quantize_model
from ..host.weights.saving import save_diffusion_model
from .common import node_schema
from .loaders import execute_plan, format_inputs


class QuantizeModel(io.ComfyNode):
    """Quantize a model that any loader made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitQuantizeModel",
            inputs=[io.Model.Input("model"), *format_inputs()],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
            search_aliases=["fp8", "fp4", "int8", "nvfp4"],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, dry_run: bool, **request: Any) -> io.NodeOutput:
        planned = plan_model(model, Request(**request))
        return execute_plan(planned, dry_run, lambda: quantize_model(model, planned), cls.hidden.unique_id)


class SaveQuantizedModel(io.ComfyNode):
    """Save a diffusion model with its weights as they are now."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitSaveQuantizedModel",
            search_aliases=["model save", "export"],
            inputs=[io.Model.Input("model"), io.String.Input("filename_prefix", default="diffusion_models/lowbit")],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: io.Model.Type, filename_prefix: str) -> io.NodeOutput:
        path = save_diffusion_model(model, filename_prefix)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"{path.name}, {path.stat().st_size / 2**20:,.1f} MiB"))


NODES = [QuantizeModel, SaveQuantizedModel]
