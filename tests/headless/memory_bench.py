"""Helpers of the memory tests: managed graphs, and a server that runs them with faults."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from testing import graphs
from testing.server import Result, Server

FAULTS = Path(__file__).parent / "memory_faults"
FAKE_NAME = "fake device (host memory)"
RELEASE = ("text_encoder", "diffusion_model", "vae", "audio_encoder", "model_patch", "scratch")
UMT5 = graphs.conditioning_from_text(graphs.load_text_encoder("umt5.safetensors", "wan"))
ROOMY = 4096.0
"""MiB of a fake GPU that everything fits on."""

NEAR = 1e-4
"""Prompts that run one at a time round differently from those in a batch."""


@dataclass
class Outcome:
    """One prompt's end: its tensors, its report as data and text, and the state after it."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]
    text: str
    state: dict[str, Any]
    result: Result

    @property
    def notes(self) -> str:
        """All remarks."""
        return " ".join(self.report["notes"])


class MemoryBench:
    """A running server with the pack and the faults."""

    def __init__(self, server: Server):
        self.server = server
        self._names = itertools.count()

    def run(
        self, graph: graphs.Graph, timeout: float | None = None, on_event: Any = None, count_objects: bool = False
    ) -> Outcome:
        """Runs it; the report is empty for a graph without one."""
        prompt_graph, name = self.prepared(graph, count_objects)
        return self.outcome(self.server.run(prompt_graph, timeout, on_event), name)

    def prepared(self, graph: graphs.Graph, count_objects: bool = False) -> tuple[graphs.Graph, str]:
        """The graph with dumps of its latent, images and state, and the name they will have."""
        name = f"{self.server.log_path.stem}-memory-{next(self._names)}"
        values = {"latent": ["sample", 0]} | ({"image": ["images", 0]} if "images" in graph else {})
        last = ["report", 0] if "report" in graph else ["sample", 0]
        graph = graphs.dump(graph, name, **values)
        state = graphs.node("TestMemoryState", value=last, name=f"{name}-state", count=count_objects)
        return graph | {"state": state}, name

    def outcome(self, result: Result, name: str) -> Outcome:
        """Reads a finished prompt's files."""
        folder = self.server.base / "output"
        tensors = {path.stem: next(iter(load_file(path).values())) for path in (folder / name).glob("*.safetensors")}
        report = json.loads(result.outputs["json"]["text"][0]) if "json" in result.outputs else {}
        text = result.outputs["report"]["text"][0] if "report" in result.outputs else ""
        return Outcome(tensors, report, text, json.loads((folder / f"{name}-state.json").read_text()), result)


def weights(outcome: Outcome, component: str) -> int:
    """The most that a component had on the device."""
    return max(sample["components"].get(component, 0) for sample in outcome.report["samples"])


def wan(seed: int = 1, steps: int = 2, conditioning: graphs.Graph | None = None, decode: bool = True, **options: Any):
    """Wan text-to-video, decoded."""
    graph = graphs.wan_t2v(
        graphs.load_diffusion_model("wan_t2v.safetensors"),
        conditioning or graphs.conditioning_random(width=256),
        seed=seed,
        steps=steps,
        **options,
    )
    return graph | (graphs.decode() if decode else {})


def qwen(seed: int = 1):
    """Qwen-Image, decoded."""
    model = graphs.load_diffusion_model("qwen_image.safetensors")
    return graphs.qwen_image(model, graphs.conditioning_random(width=64), seed=seed) | graphs.decode()


def infinitetalk(seed: int = 1):
    """InfiniteTalk, decoded."""
    graph = graphs.infinitetalk(
        graphs.load_diffusion_model("wan_i2v_infinitetalk.safetensors"),
        graphs.load_model_patch("infinitetalk.safetensors"),
        graphs.conditioning_random(width=256),
        seed=seed,
    )
    return graph | {"images": graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])}


GRAPHS = {"wan": wan, "qwen": qwen, "infinitetalk": infinitetalk}


def managed(
    graph: graphs.Graph,
    *,
    gpu_mib: float = 0.0,
    idle_mib: float = 0.0,
    fault: dict[str, Any] | None = None,
    source: str = "model",
    **settings: Any,
) -> graphs.Graph:
    """The graph with a memory manager on its model, text encoder and VAE, and a report at its end.

    gpu_mib: of the fake GPU; 0 for the real device. fault: inputs of TestOutOfMemory in front of the manager.
    """
    out = {"device": graphs.node("TestDevice", value=[source, 0], mib=gpu_mib, idle_mib=idle_mib)}
    model = ["device", 0]
    if fault is not None:
        defaults = {"at": "nowhere", "call": 1, "times": 1, "name": "fault"}
        out["fault"] = graphs.node("TestOutOfMemory", model=model, **(defaults | fault))
        model = ["fault", 0]
    optional = {name: [name, 0] for name in ("clip", "vae") if name in graph}
    # A graph that encodes an image before its model is patched cannot have that VAE behind the manager.
    optional = {name: link for name, link in optional.items() if source == "model" or name == "clip"}
    for output, name in enumerate((source, "clip", "vae")):
        if output == 0 or name in optional:
            graph = graphs.relinked(graph, [name, 0], ["manager", output])
    manager = graphs.node("LowbitMemoryManager", model=model, **optional, **(graphs.MEMORY_MANAGER | settings))
    out |= graph | {"manager": manager}
    return reported(out)


def reported(graph: graphs.Graph) -> graphs.Graph:
    """The graph with a memory report after its last node, and its JSON shown."""
    last = ["images", 0] if "images" in graph else ["sample", 0]
    return graph | {
        "report": graphs.node("LowbitMemoryReport", value=last),
        "json": graphs.node("PreviewAny", source=["report", 3]),
    }


def released(graph: graphs.Graph, link: graphs.Link, name: str = "release", **components: bool) -> graphs.Graph:
    """The graph with a release node on everything that uses `link`."""
    choice = dict.fromkeys(RELEASE, False) | components
    return graphs.between(graph, link, name, graphs.node("LowbitReleaseComponent", value=link, **choice))
