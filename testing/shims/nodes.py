"""Nodes for tests: seeded inputs that would need a real model, and outputs written exactly."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

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

CATEGORY = "lowbit/test"


class AnyType(str):
    """A socket type that connects to everything."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TinyConditioning:
    """Gaussian text conditioning of shape (1, tokens, width)."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {key: ("INT", {"min": 0, "max": 2**31}) for key in ("tokens", "width", "seed")}}

    def make(self, tokens, width, seed):
        return ([[_randn(seed, 1, tokens, width), {"pooled_output": None}]],)


class TinyClipVision:
    """Gaussian CLIP vision output: penultimate hidden states of shape (1, 257, 1280)."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("CLIP_VISION_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"seed": ("INT", {})}}

    def make(self, seed):
        output = comfy.clip_vision.Output()
        output["penultimate_hidden_states"] = _randn(seed, 1, 257, 1280)
        return (output,)


class TinyAudio:
    """Gaussian wav2vec2 output: 13 layers of (1, frames at 50 Hz, 768)."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("AUDIO_ENCODER_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {key: ("INT", {"min": 0, "max": 2**31}) for key in ("frames", "seed")}}

    def make(self, frames, seed):
        layers = [_randn(seed + index, 1, frames, 768) for index in range(13)]
        return (
            {
                "encoded_audio": layers[-1],
                "encoded_audio_all_layers": layers,
                "audio_samples": frames * 320,
            },
        )


class TinyImage:
    """Smooth seeded test images of shape (frames, height, width, 3) in 0..1."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {key: ("INT", {"min": 0, "max": 2**31}) for key in ("frames", "height", "width", "seed")}}

    def make(self, frames, height, width, seed):
        coarse = _randn(seed, frames, 3, 4, 4)
        image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
        return (image.movedim(1, -1).sigmoid(),)


def _tensors(value) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {"tensor": value}
    if isinstance(value, dict) and "samples" in value:
        return {"samples": value["samples"]}
    if isinstance(value, list):
        return {f"conditioning.{index}": entry[0] for index, entry in enumerate(value)}
    raise TypeError(f"TinyDump cannot write a {type(value).__name__}")


class TinyDump:
    """Writes a LATENT, IMAGE or CONDITIONING into output/{name}.safetensors in the dtype it has."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = CATEGORY, "dump", (), True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "name": ("STRING", {})}}

    def dump(self, value, name):
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(value).items()}, path)
        return {"ui": {"tensors": [str(path)]}}


def _module(value) -> torch.nn.Module:
    """The torch module inside a MODEL, CLIP, VAE or MODEL_PATCH."""
    patcher = getattr(value, "patcher", value)
    return patcher.model


def _facts(module: torch.nn.Module) -> dict:
    layers = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(child, torch.nn.Linear) or type(child).__name__ == "Linear":
            layers[name] = {
                "class": f"{type(child).__module__}.{type(child).__qualname__}",
                "weight": type(weight).__name__,
                "dtype": str(weight.dtype) if weight is not None else None,
                "format": getattr(child, "quant_format", None),
            }
    return {"bytes": measure.held_bytes(module), "layers": layers}


def _loaded(value) -> int:
    """Bytes that ComfyUI counts as loaded on the model's device: under dynamic VRAM they are not the module's own."""
    return getattr(value, "patcher", value).loaded_size()


class TinyFacts:
    """Writes output/{name}.json about a MODEL, CLIP, VAE or MODEL_PATCH: bytes its tensors hold, class and format of each Linear.

    `after` orders it behind another node, so that it sees the model loaded.
    """

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = CATEGORY, "write", (), True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (ANY,), "name": ("STRING", {})}, "optional": {"after": (ANY,)}}

    def write(self, value, name, after=None):
        path = Path(folder_paths.get_output_directory()) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_facts(_module(value)) | {"loaded": _loaded(value)}, indent=1))
        return {"ui": {"facts": [str(path)]}}


class TinyTwoCPUs:
    """Passes a model on; from then on Several GPUs (Lowbit) knows the `gpus` "cpus", two processes, and the log tells of them."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "take", ("MODEL",)
    DIVIDED = "a forward was divided"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def take(self, model):
        node, process, team = (
            next(module for key, module in sys.modules.items() if key.endswith(f"lowbit.{name}"))
            for name in ("nodes.several_gpus", "host.several_gpus.process", "host.several_gpus.team")
        )
        tests = Path(__file__).resolve().parents[2] / "tests"
        process._START = tests / "host" / "several_gpus" / "start_tiny_worker.py"
        os.environ.setdefault("LOWBIT_TEST_FAULT", str(tests / "none"))
        devices_of, send = node.devices_of, team.Team.send
        if not hasattr(team.Team, "told"):
            team.Team.told = True
            node.devices_of = lambda gpus, own: (own, own) if gpus == "cpus" else devices_of(gpus, own)
            team.Team.send = lambda *arguments: (logging.warning(self.DIVIDED), send(*arguments))[1]
        return (model,)


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (TinyConditioning, TinyClipVision, TinyAudio, TinyImage, TinyDump, TinyFacts, TinyTwoCPUs)
}
