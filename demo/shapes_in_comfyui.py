"""The trained text-to-video model in every format: how near its clips stay to bf16's, and whether they show what was asked."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file

from testing.graphs import Graph, dump, node
from testing.server import GraphFailedError, Server

from .contact_sheet import contact_sheet, side_by_side
from .progress import ProgressLine
from .recognition import recognise
from .report import Row
from .shapes import Scene
from .trained_files import FOLDER, PLACES, TRANSFORMER

MODEL = "Moving shapes (trained)"
REFERENCE = "none"
PROMPT = Path(__file__).parent / "prompts" / "shapes_t2v.json"
SHOWN = (
    Scene("red", "square", "left"),
    Scene("green", "triangle", "up"),
    Scene("blue", "circle", "right"),
    Scene("yellow", "square", "down"),
)


@dataclass(frozen=True)
class Quality:
    """One format's clips.

    Attributes:
        clips: what was made, (frames, height, width, 3) in [0, 1], one for each scene.
        psnr: of each clip against bf16's with the same seed, dB; empty for bf16 itself.
        recognised: how many clips show the colour, the shape and the direction of their prompt.
        disk_bytes: the transformer's file that was loaded.
        resident_bytes: what the loaded transformer's tensors hold; with a GPU, what ComfyUI counts as loaded there.
        seconds: sampling and decoding all of them, quantizing included.
        problem: why there are no clips, else empty.
    """

    clips: list[torch.Tensor]
    psnr: list[float]
    recognised: int
    seconds: float
    disk_bytes: int | None = None
    resident_bytes: int | None = None
    problem: str = ""


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


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of clips in [0, 1], dB."""
    return -10 * math.log10(max(float((clip.double() - reference.double()).square().mean()), 1e-12))


def measure(
    server: Server, cache: Path, formats: Sequence[str], scenes: Sequence[Scene] = SHOWN
) -> Iterator[tuple[str, Quality]]:
    """Makes the clips of `scenes` in bf16 and in every format.

    The trained files must be in place; `cache` is where the server keeps quantized files.
    """
    reference: list[torch.Tensor] = []
    for name in (REFERENCE, *formats):
        progress = ProgressLine(f"{MODEL}, {'bf16 (as stored)' if name == REFERENCE else name}")
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
        reference = reference or clips
        near = [] if name == REFERENCE else [psnr(*pair) for pair in zip(clips, reference, strict=True)]
        shown = sum(recognise(clip) == scene for clip, scene in zip(clips, scenes, strict=True))
        progress.finish(
            f"{f'{fmean(near):.1f} dB, ' if near else ''}{shown} of {len(scenes)} as asked, {seconds:.1f} s"
        )
        made = set(cache.glob("*.safetensors")) - before
        disk = (made.pop() if made else FOLDER / TRANSFORMER).stat().st_size
        facts = json.loads((server.base / "output" / f"{where}.json").read_text())
        resident = facts["loaded" if torch.cuda.is_available() else "bytes"]
        yield name, Quality(clips, near, shown, seconds, disk, resident)


def rows(server: Server, cache: Path, out: Path, formats: Sequence[str]) -> list[Row]:
    """The demo's rows; writes shapes.png, a contact sheet, and shapes.webp, one clip in every format, into `out`."""
    found = dict(measure(server, cache, formats))
    draw(out, found, SHOWN)
    return [_row(name, quality) for name, quality in found.items()]


def draw(out: Path, found: dict[str, Quality], scenes: Sequence[Scene]) -> None:
    """The contact sheet shapes.png and the animation shapes.webp of what `measure` found."""
    made = {"bf16" if name == REFERENCE else name: quality for name, quality in found.items() if quality.clips}
    notes = {
        name: f"{fmean(quality.psnr):.1f} dB" if quality.psnr else "the reference" for name, quality in made.items()
    }
    contact_sheet(
        out / "shapes.png",
        {name: quality.clips[: len(SHOWN)] for name, quality in made.items()},
        notes,
        [scene.prompt() for scene in scenes[: len(SHOWN)]],
    )
    side_by_side(out / "shapes.webp", {name: quality.clips[0] for name, quality in made.items()})


def _row(name: str, quality: Quality) -> Row:
    if quality.problem:
        return Row(MODEL, name, problem=quality.problem)
    return Row(
        MODEL,
        name,
        quality.disk_bytes,
        quality.resident_bytes,
        first_seconds=quality.seconds,
        psnr=fmean(quality.psnr) if quality.psnr else None,
        recognised=f"{quality.recognised} of {len(quality.clips)}",
    )
