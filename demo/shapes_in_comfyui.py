"""The trained text-to-video model in a ComfyUI, in every format."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from testing.graphs import Graph, dump, node
from testing.server import GraphFailedError, Server

from .clips import MODEL, REFERENCE, SHOWN, Quality, judge, title
from .progress import ProgressLine
from .shapes import Scene
from .trained_files import FOLDER, PLACES, TRANSFORMER

PROMPT = Path(__file__).parent / "prompts" / "shapes_t2v.json"


def place_files(models: Path) -> None:
    """Puts the trained files into a ComfyUI models folder."""
    for name, folder in PLACES.items():
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, models / folder / name)


def graph(scene: Scene, format: str, seed: int, name: str) -> Graph:
    """The bundled prompt for a scene; the clip goes to output/{name}/clip.safetensors, the model's size to {name}.json."""
    prompt = copy.deepcopy(json.loads(PROMPT.read_text()))
    prompt["model"]["inputs"]["format"] = format
    prompt["positive"]["inputs"]["text"] = scene.prompt()
    prompt["sample"]["inputs"]["seed"] = seed
    prompt["facts"] = node("TinyFacts", value=["model", 0], name=name, after=["sample", 0])
    return dump(prompt, name, clip=["images", 0])


def measure(
    server: Server, cache: Path, formats: Sequence[str], scenes: Sequence[Scene] = SHOWN
) -> Iterator[tuple[str, Quality]]:
    """Makes the clips of `scenes` in bf16 and in every format.

    The trained files must be in place; `cache` is where the server keeps quantized files.
    """
    reference: list[torch.Tensor] = []
    for name in (REFERENCE, *formats):
        progress = ProgressLine(f"{MODEL}, {title(name)}")
        before = set(cache.glob("*.safetensors"))
        clips, seconds = [], 0.0
        try:
            for seed, scene in enumerate(scenes):
                where = f"shapes/{name}/{seed}"
                seconds += server.run(graph(scene, name, seed, where), on_event=progress).seconds
                clips.append(load_file(server.base / "output" / where / "clip.safetensors")["tensor"])
        except GraphFailedError as error:
            progress.finish(f"failed: {error.exception_message}")
            yield name, Quality([], [], 0, seconds, problem=error.exception_message.splitlines()[0])
            continue
        made = set(cache.glob("*.safetensors")) - before
        disk = (made.pop() if made else FOLDER / TRANSFORMER).stat().st_size
        facts = json.loads((server.base / "output" / f"{where}.json").read_text())
        resident = facts["loaded" if torch.cuda.is_available() else "bytes"]
        quality = judge(clips, reference, scenes, seconds, disk, resident)
        reference = reference or clips
        progress.finish(quality.text)
        yield name, quality
