"""The trained text-to-video model in a ComfyUI, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from testing.server import Server

from .bundled_prompt import BundledPrompt
from .clips import MODEL, SHOWN, Quality, qualities
from .progress import ProgressLine
from .report import Row
from .shapes import Scene
from .trained_files import FOLDER, PLACES, TRANSFORMER


def place_files(models: Path) -> None:
    """Puts the trained files into a ComfyUI models folder."""
    for name, folder in PLACES.items():
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, models / folder / name)


def trained_prompt(server: Server, cache: Path) -> BundledPrompt:
    """The prompt of the trained model, whose files must be in place; `cache` is the server's for quantized files."""
    return BundledPrompt(server, cache, "shapes_t2v", FOLDER / TRANSFORMER, ["images", 0])


def measure(server: Server, cache: Path, formats: Sequence[str], scenes: Sequence[Scene] = SHOWN) -> Iterator[Quality]:
    """Makes the clips of `scenes` in bf16 and in every format."""
    prompt = trained_prompt(server, cache)

    def make(name: str, progress: ProgressLine) -> tuple[list[torch.Tensor], Row]:
        before, clips, seconds = prompt.quantized_files(), [], 0.0
        for seed, scene in enumerate(scenes):
            clip, result = prompt.run(name, seed, f"shapes/{name}/{seed}", progress, text=scene.prompt())
            clips.append(clip)
            seconds += result.seconds
        return clips, Row(MODEL, name, *prompt.sizes(before, f"shapes/{name}/0"), first_seconds=seconds)

    return qualities(formats, make, scenes)
