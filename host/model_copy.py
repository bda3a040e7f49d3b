"""A model as plain data, and the same model built of it in a worker: its file, LoRAs, attention, model patch and memory limit."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.ldm.modules.attention as core_attention
import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy.weight_adapter
from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch

from ..attention.candidates import Policy
from ..attention.schedule import Schedule
from ..attention.sequence_split import Exchange
from ..ops.checkpoint import open_checkpoint
from ..ops.header import FileStamp, file_stamp
from ..versions import find
from .attention.installing import install_override
from .attention.override import OVERRIDE, AttentionOverride, chosen_kernel
from .memory.limit import VramLimit
from .memory.session import session
from .several_gpus.forward import CoreForward
from .several_gpus.sending import NotSentError, full_name
from .several_gpus.split_families import family_of
from .weights.checked import known_finite
from .weights.folders import cache_folder
from .weights.loading import load_diffusion_model, load_model_patch
from .weights.quantizing import noted_file

LOADERS: Mapping[str, Callable[..., Any]] = {
    "lowbit": load_diffusion_model,
    "comfyui": comfy.sd.load_diffusion_model,
}
"""Name -> what loads a model from its file in any process."""

_ADAPTERS = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}
_PATCHED = "attn2_patch"
"""Where InfiniteTalk's model patch stands among a model's patches."""

_AFTER_RUN = (
    "comfy.model_management.reset_cast_buffers",
    "comfy.model_prefetch.cleanup_prefetch_queues",
    "comfy_aimdo.model_vbar.vbars_reset_watermark_limits",
)
"""What ComfyUI calls after every node where dynamic VRAM is on."""


def describe(patcher: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker needs to build the model, plain but for its tensors.

    Args:
        patcher: the model with its patches.
        options: the run's transformer options.

    Raises:
        NotSentError: names what cannot be sent.
    """
    _, edited = noted_file(patcher)
    if edited:
        raise NotSentError(f"{len(edited)} weights that another node has changed, '{edited[0]}' among them,")
    return {
        "model": file_of(patcher),
        "patches": {key: [_patch(key, patch) for patch in patches] for key, patches in patcher.patches.items()},
        "attention": _attention(options.get(OVERRIDE)),
        "model_patches": [_model_patch(name, patch) for name, patch in _listed(options.get("patches", {}))],
        "limit": session().limit.nbytes,
        "timings": str(cache_folder()),
    }


def version(patcher: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `describe` depends on: equal as long as nothing has changed."""
    origin = tuple(map(str, file_of(patcher)))
    patches = tuple(_Same(patch) for _, patch in _listed(options.get("patches", {})))
    override = options.get(OVERRIDE)
    attention = None if override is None else _Same(override)
    return (origin, patcher.patches_uuid, attention, patches, session().limit.nbytes)


def is_exact_now(options: Mapping[str, Any]) -> bool:
    """Whether this call's attention is exact, by the schedule or because a lossy backend failed the model."""
    override = options.get(OVERRIDE)
    if not isinstance(override, AttentionOverride):
        return False
    return override.exact_model_call or bool(override.dispatcher.planner.barred)


class Copies:
    """The models of one worker."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[FileStamp | None, Any]] = {}
        self._origins: dict[str, str] = {}
        self._copies: dict[str, Any] = {}
        # The model whose weights are where it computes, and how many processes it made room for.
        self._loaded: tuple[str | None, int] = None, 0
        self._limit = VramLimit(session().device)

    def load_file(self, model: str, file: Sequence[Any]) -> Any:
        """What the model's copies are made of."""
        origin = json.dumps([str(part) for part in file])
        loader, *arguments = file
        path = Path(arguments[0])
        # A file that was written anew is another one; what was read of one that is gone is still that model.
        stamp = file_stamp(path) if path.exists() else None
        if origin not in self._files or stamp not in (None, self._files[origin][0]):
            if LOADERS[loader] is load_diffusion_model:
                # ComfyUI's own process looks at the numbers, and computes nothing before.
                known_finite.add(open_checkpoint(arguments[0]).stamps)
            self._files[origin] = stamp, LOADERS[loader](*arguments)
        self._origins[model] = origin
        return self._files[origin][1]

    def take(self, model: str, description: Any) -> None:
        """Builds the copy of a model, of the one from the same file if there is one."""
        copy = self.load_file(model, description["model"]).clone()
        copy.patches = {key: [_unpacked(patch) for patch in patches] for key, patches in description["patches"].items()}
        copy.patches_uuid = uuid4()
        for path, scale in description["model_patches"]:
            copy.set_model_patch(MultiTalkCrossAttnPatch(load_model_patch(path), scale), _PATCHED)
        self._limit.apply(description["limit"])
        self._copies[model] = _with_attention(copy, description["attention"], Path(description["timings"]))
        self._loaded = None, 0

    def begin(self, model: str) -> None:
        """The next forward loads the model to the GPU, where another may have taken its place."""
        self._loaded = None, 0

    def end(self) -> None:
        """Lets go of what belongs to the run."""
        for copy in self._copies.values():
            copy.cleanup()
            if (override := _override(copy)) is not None:
                override.dispatcher.end_run()
        if comfy.memory_management.aimdo_enabled:
            for clean in filter(None, map(find, _AFTER_RUN)):
                clean()

    def forget(self, model: str) -> None:
        """The copy goes, and its file with the last model that is of it, or will be."""
        self._copies.pop(model, None)
        self._origins.pop(model, None)
        used = set(self._origins.values())
        self._files = {origin: base for origin, base in self._files.items() if origin in used}
        self._loaded = None, 0

    def splitting(self, model: str, group: Any, speeds: Sequence[float], exchange: Exchange) -> CoreForward:
        """How the model's forward is split."""
        network = self._copies[model].model.diffusion_model
        family = family_of(network)
        assert family is not None
        return CoreForward(network, family, group, speeds, exchange)

    def forward(self, model: str, call: Any, split: CoreForward | None) -> Any:
        """One call of the diffusion model, with the run's options from ComfyUI and the model's own from here."""
        copy = self._copies[model]
        override = _override(copy)
        processes = 1 if split is None else split.size
        if self._loaded[0] != model or processes < self._loaded[1]:
            self._load(model, copy, call["inputs"]["x"].shape, processes)
        if override is not None:
            override.exact_model_call = call["exact"]
            override.dispatcher.begin_model_call()
        own = copy.model_options["transformer_options"]
        options = call["options"] | {"wrappers": copy.wrappers, "prefetch_dynamic_vbars": copy.is_dynamic()}
        options |= {name: own[name] for name in (OVERRIDE, "patches") if name in own}
        network = copy.model.diffusion_model

        def run() -> Any:
            return network(**call["inputs"], transformer_options=options)

        return run() if split is None else split.run(run)

    def _load(self, model: str, copy: Any, shape: Sequence[int], processes: int) -> None:
        needed = copy.model.memory_required(list(shape)) / processes
        models = [copy, *copy.model_patches_models()]
        comfy.model_management.load_models_gpu(models, memory_required=needed, minimum_memory_required=needed)
        copy.pre_run()
        if (override := _override(copy)) is not None:
            override.dispatcher.begin_run()
        self._loaded = model, processes


class _Same:
    """Equal to what was made of the same object, while that lives."""

    def __init__(self, thing: Any):
        self._thing = weakref.ref(thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._thing() is self._thing() is not None

    def __hash__(self) -> int:
        return hash(self._thing)


def file_of(patcher: Any) -> list[Any]:
    """Its loader's name and the loader's arguments. Raises NotSentError for a model that none of `LOADERS` has loaded."""
    function, *rest = patcher.cached_patcher_init or (None, ())
    name = next((name for name, loader in LOADERS.items() if loader is function), None)
    if name is None or len(rest) != 1:
        raise NotSentError(
            "a model that neither Load Diffusion Model (Lowbit) nor Load Diffusion Model has loaded from a file"
        )
    return [name, *rest[0]]


def _patch(key: str, patch: Sequence[Any]) -> list[Any]:
    strength, value, strength_model, offset, function = patch
    if function is not None:
        raise NotSentError(f"the patch on {key}, which changes the weight by a function")
    kind = type(value).__name__
    if _ADAPTERS.get(kind) is type(value):
        return [strength, kind, tuple(value.weights), strength_model, offset]
    return [strength, None, value, strength_model, offset]


def _unpacked(patch: Sequence[Any]) -> tuple[Any, ...]:
    strength, kind, value, strength_model, offset = patch
    return strength, value if kind is None else _ADAPTERS[kind](set(), value), strength_model, offset, None


def _attention(override: Any) -> dict[str, Any] | None:
    if override is None:
        return None
    ours = isinstance(override, AttentionOverride)
    below = override.previous if ours else override
    described: dict[str, Any] = {"comfyui": None, "policy": None}
    if below is not None:
        kernel = chosen_kernel(below)
        registered = core_attention.REGISTERED_ATTENTION_FUNCTIONS
        described["comfyui"] = next((name for name, function in registered.items() if function is kernel), None)
        if described["comfyui"] is None:
            raise NotSentError(f"the attention of {full_name(below)}")
    if ours:
        schedule = override.schedule
        described["policy"] = asdict(override.dispatcher.policy)
        described["blocks"] = sorted(schedule.blocks)
    return described


def _with_attention(copy: Any, described: Mapping[str, Any] | None, timings: Path) -> Any:
    if described is None:
        return copy
    if described["comfyui"] is not None:
        copy.set_model_optimized_attention(core_attention.get_attention_function(described["comfyui"]))
    if described["policy"] is None:
        return copy
    schedule = Schedule(blocks=frozenset(described["blocks"]))
    return install_override(copy, Policy(**described["policy"]), schedule, False, timings)[0]


def _override(copy: Any) -> AttentionOverride | None:
    override = copy.model_options["transformer_options"].get(OVERRIDE)
    return override if isinstance(override, AttentionOverride) else None


def _listed(patches: Mapping[str, Sequence[Any]]) -> list[tuple[str, Any]]:
    return [(name, patch) for name, listed in patches.items() for patch in listed]


def _model_patch(name: str, patch: Any) -> list[Any]:
    if name != _PATCHED or type(patch) is not MultiTalkCrossAttnPatch:
        raise NotSentError(f"the patch {full_name(patch)}")
    function, arguments, *_ = patch.model_patch.cached_patcher_init or (None, ())
    if patch.ref_target_masks is not None or function is not load_model_patch:
        raise NotSentError("a model patch that Load Model Patch (Lowbit) has not loaded")
    return [*arguments, patch.audio_scale]
