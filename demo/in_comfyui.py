"""The demo in a headless ComfyUI: bundled prompts through the HTTP API, each in every format."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from testing import tiny
from testing.server import Server, prepare_base

from . import shapes_in_comfyui
from .bundled_prompt import BundledPrompt
from .clips import Quality
from .progress import ProgressLine
from .report import Make, Row, latent_rows

MODELS = {
    "Wan t2v": ("wan_t2v", "diffusion_models/wan_t2v.safetensors"),
    "Qwen-Image": ("qwen_image", "diffusion_models/qwen_image.safetensors"),
}
FILES = [
    name for name in tiny.FILES if name.endswith(("/umt5.safetensors", "/qwen25_vl.safetensors", "wan_vae.safetensors"))
]


def run(comfyui_path: Path, out: Path, formats: Sequence[str]) -> Iterator[Quality | Row]:
    """Runs every bundled prompt in bfloat16 and in `formats`; the tiny models' pictures go to `out`.

    Yields each format's clips of the trained model, then the tiny models' rows, as they are made.
    """
    base = Path(tempfile.mkdtemp(prefix="lowbit-demo-"))
    cache = base / "cache"
    try:
        prepare_base(base)
        tiny.write_all(base / "models", [*FILES, *(file for _, file in MODELS.values())])
        shapes_in_comfyui.place_files(base / "models")
        print(f"Starting ComfyUI ({comfyui_path}) ...", flush=True)
        started = time.monotonic()
        with Server(
            base, comfyui_path, cpu=not torch.cuda.is_available(), environment={"LOWBIT_CACHE_DIR": str(cache)}
        ) as server:
            print(f"ComfyUI is up after {time.monotonic() - started:.0f} s.", flush=True)
            yield from shapes_in_comfyui.measure(server, cache, formats)
            for model, (name, file) in MODELS.items():
                prompt = BundledPrompt(server, cache, name, base / "models" / file, ["sample", 0])
                yield from latent_rows(model, formats, _maker(model, prompt, out))
    finally:
        if (base / "server.log").exists():
            shutil.copy(base / "server.log", out / "comfyui.log")
        shutil.rmtree(base, ignore_errors=True)


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
