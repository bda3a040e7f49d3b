"""The demo in a headless ComfyUI: bundled prompts through the HTTP API, each in every format."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from testing import tiny
from testing.graphs import Graph, dump, node
from testing.measure import relative_error
from testing.server import GraphFailedError, Server, prepare_base

from . import shapes_in_comfyui
from .clips import REFERENCE, Quality, title
from .progress import ProgressLine
from .report import Row

PROMPTS = Path(__file__).parent / "prompts"
MODELS = {
    "Wan t2v": ("wan_t2v", "diffusion_models/wan_t2v.safetensors"),
    "Qwen-Image": ("qwen_image", "diffusion_models/qwen_image.safetensors"),
}
FILES = [
    name for name in tiny.FILES if name.endswith(("/umt5.safetensors", "/qwen25_vl.safetensors", "wan_vae.safetensors"))
]


@dataclass(frozen=True)
class _Run:
    latent: torch.Tensor
    seconds: float
    pictures: list[Path]


def run(comfyui_path: Path, out: Path, formats: Sequence[str]) -> Iterator[tuple[str, Quality] | Row]:
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
            for model, (prompt, file) in MODELS.items():
                yield from _rows(server, model, prompt, base / "models" / file, cache, out, formats)
    finally:
        if (base / "server.log").exists():
            shutil.copy(base / "server.log", out / "comfyui.log")
        shutil.rmtree(base, ignore_errors=True)


def _rows(
    server: Server, model: str, prompt: str, source: Path, cache: Path, out: Path, formats: Sequence[str]
) -> Iterator[Row]:
    graph = json.loads((PROMPTS / f"{prompt}.json").read_text())
    reference = None
    for name in (REFERENCE, *formats):
        progress = ProgressLine(f"{model}, {title(name)}", _titles(graph))
        before = set(cache.glob("*.safetensors"))
        try:
            first = _sample(server, graph, f"{prompt}/{name}", name, 1, progress)
            again = _sample(server, graph, f"{prompt}/{name}-again", name, 2, progress)
        except GraphFailedError as error:
            progress.finish(f"failed: {error.exception_message}")
            yield Row(model, name, problem=error.exception_message.splitlines()[0])
            continue
        reference = first.latent if reference is None else reference
        made = set(cache.glob("*.safetensors")) - before
        error = None if name == REFERENCE else relative_error(first.latent, reference)
        for picture in first.pictures:
            path = server.base / "output" / picture
            shutil.copy(path, out / f"{prompt}.{name}{path.suffix}")
        facts = json.loads((server.base / "output" / prompt / f"{name}.json").read_text())
        disk = (made.pop() if made else source).stat().st_size
        progress.finish(f"{'reference' if error is None else f'error {error:.2e}'}, {first.seconds:.1f} s")
        resident = facts["loaded" if torch.cuda.is_available() else "bytes"]
        yield Row(model, name, disk, resident, error, first.seconds, again.seconds)


def _titles(graph: Graph) -> dict[str, str]:
    return {key: entry["class_type"] for key, entry in graph.items()}


def _sample(server: Server, prompt: Graph, name: str, format: str, seed: int, progress: ProgressLine) -> _Run:
    graph: dict[str, Any] = copy.deepcopy(dict(prompt))
    graph["model"]["inputs"]["format"] = format
    graph["sample"]["inputs"]["seed"] = seed
    graph["facts"] = node("TinyFacts", value=["model", 0], name=name, after=["sample", 0])
    result = server.run(dump(graph, name, latent=["sample", 0]), on_event=progress)
    latent = load_file(server.base / "output" / name / "latent.safetensors")["samples"]
    pictures = [
        Path(image["subfolder"], image["filename"])
        for key in graph
        for image in result.outputs.get(key, {}).get("images", [])
    ]
    return _Run(latent, result.seconds, pictures)
