"""The demo in a headless ComfyUI: bundled prompts through the HTTP API, each in every format."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from testing import tiny

from .bundled_prompt import BundledPrompt
from .clips import Quality
from .progress import ProgressLine
from .report import Make, Row, latent_rows
from .shapes_in_comfyui import measure, server_with_files

MODELS = {
    "Wan t2v": ("wan_t2v", "diffusion_models/wan_t2v.safetensors"),
    "Qwen-Image": ("qwen_image", "diffusion_models/qwen_image.safetensors"),
}
FILES = [
    name for name in tiny.FILES if name.endswith(("/umt5.safetensors", "/qwen25_vl.safetensors", "wan_vae.safetensors"))
]


def run(comfyui_path: Path, out: Path, formats: Sequence[str]) -> Iterator[Quality | Row]:
    """Runs every bundled prompt in bfloat16 and in `formats`; the tiny models' pictures and the server's log go to `out`.

    Yields each format's clips of the trained model, then the tiny models' rows, as they are made.
    """
    print(f"Starting ComfyUI ({comfyui_path}) ...", flush=True)
    started = time.monotonic()
    with server_with_files(comfyui_path, cpu=not torch.cuda.is_available()) as prompt:
        print(f"ComfyUI is up after {time.monotonic() - started:.0f} s.", flush=True)
        models = prompt.server.base / "models"
        tiny.write_all(models, [*FILES, *(file for _, file in MODELS.values())])
        try:
            yield from measure(prompt, formats)
            for model, (name, file) in MODELS.items():
                other = replace(prompt, name=name, source=models / file, value=["sample", 0])
                yield from latent_rows(model, formats, _maker(model, other, out))
        finally:
            shutil.copy(prompt.server.log_path, out / "comfyui.log")


def _maker(model: str, prompt: BundledPrompt, out: Path) -> Make:
    def make(name: str, progress: ProgressLine) -> tuple[list[torch.Tensor], Row]:
        before, where = prompt.quantized_files(), f"{prompt.name}/{name}"
        latent, first = prompt.run(name, 1, where, progress)
        sizes = prompt.sizes(before, where)
        _, again = prompt.run(name, 2, f"{where}-again", progress)
        for picture in (image for output in first.outputs.values() for image in output.get("images", ())):
            path = prompt.server.base / "output" / picture["subfolder"] / picture["filename"]
            shutil.copy(path, out / f"{prompt.name}.{name}{path.suffix}")
        return [latent], Row(model, name, *sizes, first_seconds=first.seconds, again_seconds=again.seconds)

    return make
