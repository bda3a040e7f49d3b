"""The trained text-to-video model in a ComfyUI, in every format."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from testing.server import Server, prepare_base

from .bundled_prompt import BundledPrompt
from .clips import FOLDER, MODEL, SHOWN, TEXT_ENCODER, TRANSFORMER, VAE, Quality, qualities
from .progress import ProgressLine
from .report import Row
from .shapes import Scene


def place_files(models: Path) -> None:
    """Puts the trained files into a ComfyUI models folder."""
    for name, folder in ((TRANSFORMER, "diffusion_models"), (TEXT_ENCODER, "text_encoders"), (VAE, "vae")):
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, models / folder / name)


@contextlib.contextmanager
def server_with_files(comfyui_path: Path, cpu: bool) -> Iterator[BundledPrompt]:
    """The trained model's prompt on a ComfyUI of its own, its files in place."""
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder:
        base = prepare_base(Path(folder))
        place_files(base / "models")
        cache = base / "cache"
        with Server(base, comfyui_path, cpu=cpu, environment={"LOWBIT_CACHE_DIR": str(cache)}) as server:
            yield BundledPrompt(server, cache, "shapes_t2v", FOLDER / TRANSFORMER, ["images", 0])


def measure(prompt: BundledPrompt, formats: Sequence[str], scenes: Sequence[Scene] = SHOWN) -> Iterator[Quality]:
    """Makes the clips of `scenes` in bf16 and in every format."""

    def make(name: str, progress: ProgressLine) -> tuple[list[torch.Tensor], Row]:
        before, clips, seconds = prompt.quantized_files(), [], 0.0
        for seed, scene in enumerate(scenes):
            clip, result = prompt.run(name, seed, f"shapes/{name}/{seed}", progress, text=scene.prompt())
            clips.append(clip)
            seconds += result.seconds
        return clips, Row(MODEL, name, *prompt.sizes(before, f"shapes/{name}/0"), first_seconds=seconds)

    return qualities(formats, make, scenes)
