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
from ..host.weights.temporary_files import removal_put_off
from ..host.weights.vae import VAE_PRECISIONS, load_vae, vae_names
from ..ops.formats import AUTO, FORMAT_CHOICES, FORMATS, RECOMMENDED
from .common import CATEGORY, file_fingerprint, show_text

_FORMAT_TOOLTIP = " ".join(
    (
        "How the weights are stored. auto: the best for this GPU, this model and the memory there is. "
        "smallest: the bytes of 4 bits, spent layer by layer where they take the most error away. Recommended:",
        *(f"{name}, for {purpose}: {FORMATS[name].summary}." for name, purpose in RECOMMENDED.items()),
        "The rest: none: as the file has them.",
        *(f"{row.name}: {row.summary}." for row in FORMATS.values() if row.name not in RECOMMENDED),
        "What a file holds quantized already is taken as it is, or decoded where ComfyUI cannot multiply with it.",
    )
)


def format_inputs() -> list[io.Input]:
    """The inputs that every quantizing loader shares."""
    return [
        io.Combo.Input("format", options=list(FORMAT_CHOICES), default=AUTO, tooltip=_FORMAT_TOOLTIP),
        io.String.Input(
            "keep_rules",
            default="auto",
            multiline=True,
            placeholder="keep rules: auto, or one glob a line",
            tooltip=(
                "Which layers stay in 16 bits. auto: what is known to be sensitive in this model family. Or one glob a "
                "line on whole name segments: 'blocks.0.*' keeps, '!blocks.0.ffn' quantizes all the same, "
                "'img_mlp = int8' stores in another format, 'auto' stands for the family's own rules. First match wins."
            ),
            advanced=True,
        ),
        io.Boolean.Input(
            "dry_run",
            default=False,
            tooltip=(
                "Load nothing: only list, per layer, what would be kept or quantized and why, bytes before and after, "
                "what this GPU runs natively, through a fallback, or emulated, and what smallest, auto and none would take "
                "in GiB, time and error. Nodes behind it do not run."
            ),
            advanced=True,
        ),
        io.Boolean.Input(
            "keep_quantized_file",
            default=True,
            tooltip=(
                "Keep the quantized file in models/lowbit_cache, so that the next start only has to load it. It is made "
                "anew when the source changes. Off: it is removed with the last model that uses it."
            ),
            advanced=True,
        ),
    ]


def report_output() -> io.Output:
    """The text output that every loader has."""
    return io.String.Output(
        display_name="report", tooltip="What was kept and quantized, and why: connect a Preview as Text node."
    )


def loader_schema(*, inputs: list[io.Input], output: io.Output, **names: Any) -> io.Schema:
    """The schema of a quantizing loader: `names` as in `io.Schema`, and what all of them have."""
    return io.Schema(
        category=CATEGORY,
        inputs=inputs,
        outputs=[output, report_output()],
        hidden=[io.Hidden.unique_id],
        **names,
    )


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
        return loader_schema(
            node_id="LowbitLoadDiffusionModel",
            display_name="Load Diffusion Model (Lowbit)",
            description="Loads a diffusion model (Wan, Qwen-Image, ...) and stores its weights in 8 or 4 bits on the way.",
            search_aliases=["quantize", "fp8", "fp4", "int8", "nvfp4", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_names("diffusion_models"),
                    tooltip="A safetensors file in models/diffusion_models, the index of a sharded set, or a GGUF file (decoded once, and stored anew in the format below).",
                ),
                *format_inputs(),
            ],
            output=io.Model.Output(tooltip="The diffusion model."),
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **kwargs: Any) -> str:
        return file_fingerprint("diffusion_models", unet_name)

    @classmethod
    def execute(
        cls, unet_name: str, format: str, keep_rules: str, dry_run: bool, keep_quantized_file: bool
    ) -> io.NodeOutput:
        path = model_path("diffusion_models", unet_name)
        planned = plan_diffusion_model(path, Request(format, keep_rules, keep_quantized_file))
        check_diffusion_model(planned.checkpoint)
        return execute_plan(
            planned, dry_run, lambda: load_diffusion_model(str(prepared_file(planned))), cls.hidden.unique_id
        )


class LoadTextEncoder(io.ComfyNode):
    """Load a text encoder, quantizing it on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            node_id="LowbitLoadTextEncoder",
            display_name="Load Text Encoder (Lowbit)",
            description="Loads a text encoder (UMT5, Qwen2.5-VL, ...) and stores its weights in 8 or 4 bits on the way.",
            search_aliases=["clip loader", "quantize", "umt5", "qwen"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=model_names("text_encoders"),
                    tooltip="A safetensors file in models/text_encoders, the index of a sharded set, or a GGUF file (decoded once, and stored anew in the format below).",
                ),
                io.Combo.Input(
                    "type",
                    options=[member.name.lower() for member in comfy.sd.CLIPType],
                    default="wan",
                    tooltip="The model family it encodes for: wan (UMT5), qwen_image (Qwen2.5-VL), ...",
                ),
                *format_inputs(),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip=(
                        "default: the GPU while it encodes. cpu: always in main memory; slower to encode, but it takes no "
                        "GPU memory at all, only its embeddings do."
                    ),
                    advanced=True,
                ),
            ],
            output=io.Clip.Output(tooltip="The text encoder."),
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, **kwargs: Any) -> str:
        return file_fingerprint("text_encoders", clip_name)

    @classmethod
    def execute(
        cls,
        clip_name: str,
        type: str,
        format: str,
        keep_rules: str,
        dry_run: bool,
        keep_quantized_file: bool,
        device: str,
    ) -> io.NodeOutput:
        path = model_path("text_encoders", clip_name)
        planned = plan_text_encoder(path, Request(format, keep_rules, keep_quantized_file))
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
        return io.Schema(
            node_id="LowbitLoadVAE",
            display_name="Load VAE (Lowbit)",
            category=CATEGORY,
            description=(
                "Loads a VAE in a chosen precision. Its weights are convolutions of some 250 MB, which 8 bits would make "
                "slower and no smaller to speak of: precision is what saves memory here."
            ),
            search_aliases=["vae loader"],
            inputs=[
                io.Combo.Input(
                    "vae_name", options=vae_names(), tooltip="A file in models/vae, or one of core's built-ins."
                ),
                io.Combo.Input(
                    "precision",
                    options=list(VAE_PRECISIONS),
                    default="auto",
                    tooltip=(
                        "auto: what core picks for this GPU. bf16 and fp16 halve a decode's memory against fp32. There are "
                        "no 8-bit formats, keep rules or dry run here: a VAE is convolutions, which ComfyUI cannot quantize."
                    ),
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE.")],
        )

    @classmethod
    def execute(cls, vae_name: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(vae_name, precision))


class LoadModelPatch(io.ComfyNode):
    """Load an InfiniteTalk or MultiTalk patch, quantizing it on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            node_id="LowbitLoadModelPatch",
            display_name="Load Model Patch (Lowbit)",
            description="Loads an InfiniteTalk or MultiTalk patch with 8- or 4-bit weights; other patches load as in core.",
            search_aliases=["infinitetalk", "multitalk", "model patch loader"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=model_names("model_patches"),
                    tooltip="A safetensors file in models/model_patches.",
                ),
                *format_inputs(),
            ],
            output=io.ModelPatch.Output(tooltip="The model patch."),
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **kwargs: Any) -> str:
        return file_fingerprint("model_patches", name)

    @classmethod
    def execute(
        cls, name: str, format: str, keep_rules: str, dry_run: bool, keep_quantized_file: bool
    ) -> io.NodeOutput:
        path = model_path("model_patches", name)
        planned = plan_model_patch(path, Request(format, keep_rules, keep_quantized_file))
        return execute_plan(
            planned, dry_run, lambda: load_model_patch(str(prepared_file(planned))), cls.hidden.unique_id
        )


NODES = [LoadDiffusionModel, LoadTextEncoder, LoadVAE, LoadModelPatch]
