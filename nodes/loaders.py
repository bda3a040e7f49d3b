"""The loader nodes: diffusion model, text encoder, VAE and model patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sd
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..host.weights.architecture import check_diffusion_model, check_text_encoder
from ..host.weights.folders import model_names, model_path
from ..host.weights.loading import load_diffusion_model, load_model_patch, load_text_encoder
from ..host.weights.main_memory import check_load
from ..host.weights.preparing import (
    Planned,
    Request,
    check_disk,
    plan_diffusion_model,
    plan_model_patch,
    plan_text_encoder,
    prepared_file,
)
from ..host.weights.temporary import removal_put_off
from ..host.weights.vae import VAE_PRECISIONS, load_vae, vae_names
from ..ops.formats import AUTO, FORMAT_CHOICES
from .common import file_fingerprint, node_schema, show_text


def format_inputs() -> list[io.Input]:
    """The inputs that every quantizing loader shares."""
    rules = "keep rules: auto, or one glob a line"
    return [
        io.Combo.Input("format", options=list(FORMAT_CHOICES), default=AUTO),
        io.String.Input("keep_rules", default="auto", multiline=True, placeholder=rules, advanced=True),
        io.Boolean.Input("dry_run", default=False, advanced=True),
        io.Boolean.Input("keep_quantized_file", default=True, advanced=True),
    ]


def execute_plan(planned: Planned, dry_run: bool, load: Callable[[], Any], node_id: str | None) -> io.NodeOutput:
    """Show the plan, and `load` unless this is a dry run."""
    show_text(node_id, planned.summary)
    if dry_run:
        return io.NodeOutput(ExecutionBlocker(None), planned.dry_run())
    with removal_put_off():
        check_disk(planned)
        check_load(planned)
        return io.NodeOutput(load(), planned.report)


class LoadDiffusionModel(io.ComfyNode):
    """Load a diffusion model, quantizing it on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitLoadDiffusionModel",
            inputs=[io.Combo.Input("unet_name", options=model_names("diffusion_models")), *format_inputs()],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
            search_aliases=["quantize", "fp8", "fp4", "int8", "nvfp4", "unet loader"],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **kwargs: Any) -> str:
        return file_fingerprint("diffusion_models", unet_name)

    @classmethod
    def execute(cls, unet_name: str, dry_run: bool, **request: Any) -> io.NodeOutput:
        planned = plan_diffusion_model(model_path("diffusion_models", unet_name), Request(**request))
        check_diffusion_model(planned.checkpoint)
        return execute_plan(
            planned, dry_run, lambda: load_diffusion_model(str(prepared_file(planned))), cls.hidden.unique_id
        )


class LoadTextEncoder(io.ComfyNode):
    """Load a text encoder, quantizing it on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        types = [member.name.lower() for member in comfy.sd.CLIPType]
        return node_schema(
            "LowbitLoadTextEncoder",
            inputs=[
                io.Combo.Input("clip_name", options=model_names("text_encoders")),
                io.Combo.Input("type", options=types, default="wan"),
                *format_inputs(),
                io.Combo.Input("device", options=["default", "cpu"], default="default", advanced=True),
            ],
            outputs=[io.Clip.Output(), io.String.Output(display_name="report")],
            search_aliases=["clip loader", "quantize", "umt5", "qwen"],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, **kwargs: Any) -> str:
        return file_fingerprint("text_encoders", clip_name)

    @classmethod
    def execute(cls, clip_name: str, type: str, device: str, dry_run: bool, **request: Any) -> io.NodeOutput:
        planned = plan_text_encoder(model_path("text_encoders", clip_name), Request(**request))
        check_text_encoder(planned.checkpoint)
        clip_type = comfy.sd.CLIPType[type.upper()]
        return execute_plan(
            planned,
            dry_run,
            lambda: load_text_encoder([str(prepared_file(planned))], clip_type, device),
            cls.hidden.unique_id,
        )


class LoadVAE(io.ComfyNode):
    """Load a VAE in a chosen precision."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitLoadVAE",
            inputs=[
                io.Combo.Input("vae_name", options=vae_names()),
                io.Combo.Input("precision", options=list(VAE_PRECISIONS), default="auto"),
            ],
            outputs=[io.Vae.Output()],
            hidden=[],
            search_aliases=["vae loader"],
        )

    @classmethod
    def execute(cls, vae_name: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(vae_name, precision))


class LoadModelPatch(io.ComfyNode):
    """Load an InfiniteTalk or MultiTalk patch, quantizing it on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitLoadModelPatch",
            inputs=[io.Combo.Input("name", options=model_names("model_patches")), *format_inputs()],
            outputs=[io.ModelPatch.Output(), io.String.Output(display_name="report")],
            search_aliases=["infinitetalk", "multitalk", "model patch loader"],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **kwargs: Any) -> str:
        return file_fingerprint("model_patches", name)

    @classmethod
    def execute(cls, name: str, dry_run: bool, **request: Any) -> io.NodeOutput:
        planned = plan_model_patch(model_path("model_patches", name), Request(**request))
        return execute_plan(
            planned, dry_run, lambda: load_model_patch(str(prepared_file(planned))), cls.hidden.unique_id
        )


NODES = [LoadDiffusionModel, LoadTextEncoder, LoadVAE, LoadModelPatch]
