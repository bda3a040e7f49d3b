"""Nodes for tests: seeded inputs that would need a real model, and outputs written exactly."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import folder_paths
import torch
from safetensors.torch import save_file

# ComfyUI imports this folder through a link, as a package of its own; the file beside it is loaded by its path.
_spec = importlib.util.spec_from_file_location(
    "lowbit_testing_measure", Path(__file__).resolve().parents[1] / "measure.py"
)
measure = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(measure)


class AnyType(str):
    """A socket type that connects to everything."""

    def __ne__(self, other: object) -> bool:
        return False


ANY, WHOLE, TEXT = (AnyType("*"),), ("INT", {"min": 0, "max": 2**31}), ("STRING", {})

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def node(
    title: str, output: str | None, optional: dict[str, tuple] | None = None, /, **inputs: tuple
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a node of a function of its inputs, which returns its one output, or what an output node shows."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, **values: Any) -> Any:
            return {"ui": function(**values)} if output is None else (function(**values),)

        NODE_CLASS_MAPPINGS[title] = type(
            title,
            (),
            {
                "CATEGORY": "lowbit/test",
                "FUNCTION": "run",
                "RETURN_TYPES": () if output is None else (output,),
                "OUTPUT_NODE": output is None,
                "INPUT_TYPES": classmethod(lambda cls: {"required": inputs, "optional": optional or {}}),
                "run": run,
            },
        )
        return function

    return register


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@node("TinyConditioning", "CONDITIONING", tokens=WHOLE, width=WHOLE, seed=WHOLE)
def conditioning(tokens: int, width: int, seed: int) -> list[Any]:
    """Gaussian text conditioning of shape (1, tokens, width)."""
    return [[_randn(seed, 1, tokens, width), {"pooled_output": None}]]


@node("TinyClipVision", "CLIP_VISION_OUTPUT", seed=WHOLE)
def clip_vision(seed: int) -> comfy.clip_vision.Output:
    """Gaussian CLIP vision output: penultimate hidden states of shape (1, 257, 1280)."""
    output = comfy.clip_vision.Output()
    output["penultimate_hidden_states"] = _randn(seed, 1, 257, 1280)
    return output


@node("TinyAudio", "AUDIO_ENCODER_OUTPUT", frames=WHOLE, seed=WHOLE)
def audio(frames: int, seed: int) -> dict[str, Any]:
    """Gaussian wav2vec2 output: 13 layers of (1, frames at 50 Hz, 768)."""
    layers = [_randn(seed + index, 1, frames, 768) for index in range(13)]
    return {"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": frames * 320}


@node("TinyImage", "IMAGE", frames=WHOLE, height=WHOLE, width=WHOLE, seed=WHOLE)
def image(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth seeded test images of shape (frames, height, width, 3) in 0..1."""
    coarse = _randn(seed, frames, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").movedim(1, -1).sigmoid()


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {"tensor": value}
    if isinstance(value, dict) and "samples" in value:
        return {"samples": value["samples"]}
    if isinstance(value, list):
        return {f"conditioning.{index}": entry[0] for index, entry in enumerate(value)}
    raise TypeError(f"TinyDump cannot write a {type(value).__name__}")


def _output_file(name: str) -> Path:
    path = Path(folder_paths.get_output_directory()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@node("TinyDump", None, value=ANY, name=TEXT)
def dump(value: Any, name: str) -> dict[str, list[str]]:
    """Writes a LATENT, IMAGE or CONDITIONING into output/{name}.safetensors in the dtype it has."""
    path = _output_file(f"{name}.safetensors")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(value).items()}, path)
    return {"tensors": [str(path)]}


def _facts(module: torch.nn.Module) -> dict:
    layers = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(child, torch.nn.Linear) or type(child).__name__ == "Linear":
            layers[name] = {
                "forward": f"{child.forward.__module__}.{child.forward.__qualname__}",
                "weight": type(weight).__name__,
                "dtype": str(weight.dtype) if weight is not None else None,
                "format": getattr(child, "quant_format", None),
            }
    return {"bytes": measure.held_bytes(module), "layers": layers}


@node("TinyFacts", None, {"after": ANY}, value=ANY, name=TEXT)
def facts(value: Any, name: str, after: Any = None) -> dict[str, list[str]]:
    """Writes output/{name}.json about a MODEL, CLIP, VAE or MODEL_PATCH: bytes its tensors hold, forward and format of each Linear.

    `loaded` is what ComfyUI counts as loaded on its device: under dynamic VRAM these bytes are not the module's own.
    `after` orders it behind another node, so that it sees the model loaded.
    """
    path, patcher = _output_file(f"{name}.json"), getattr(value, "patcher", value)
    path.write_text(json.dumps(_facts(patcher.model) | {"loaded": patcher.loaded_size()}, indent=1))
    return {"facts": [str(path)]}


@node("TinyTwoCPUs", "MODEL", model=("MODEL",))
def two_cpus(model: Any) -> Any:
    """Passes a model on; from then on Several GPUs (Lowbit) knows the `gpus` "cpus", two processes, and the log tells of them."""
    divide, process, team = (
        next(module for key, module in sys.modules.items() if key.endswith(f"lowbit.{name}"))
        for name in ("nodes.several_gpus", "host.several_gpus.process", "host.several_gpus.team")
    )
    tests = Path(__file__).resolve().parents[2] / "tests"
    process._START = tests / "host" / "several_gpus" / "start_tiny_worker.py"
    os.environ.setdefault("LOWBIT_TEST_FAULT", str(tests / "none"))
    devices_of, send = divide.devices_of, team.Team.send
    if not hasattr(team.Team, "told"):
        team.Team.told = True
        divide.devices_of = lambda gpus, own: (own, own) if gpus == "cpus" else devices_of(gpus, own)
        team.Team.send = lambda *arguments: (logging.warning("a forward was divided"), send(*arguments))[1]
    return model
