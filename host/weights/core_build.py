"""What core builds of a diffusion model's file: the names it gives its tensors, and what it uses each matrix for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.ops
import torch

from ...errors import CheckpointError
from ...ops.checkpoint import Checkpoint, TensorEntry
from ...ops.diffusion_names import converted_model, tables
from ...ops.formats import STORAGES, stored_shape
from ...ops.keep_rules import QUANTIZE
from ...ops.plan import QuantizationPlan, find_stored
from ...ops.stored_names import foreign_weight
from ...versions import find

logger = logging.getLogger("lowbit.host")

Tensors = dict[str, torch.Tensor]
Process = Callable[[Tensors], Tensors]
Look = Callable[[Tensors], Any]
"""What core finds in a state dict."""

_DETECT = "comfy.model_detection.model_config_from_unet"
DETECT_U_NET = "comfy.model_detection.model_config_from_diffusers_unet"
CONVERT = "comfy.model_detection.convert_diffusers_mmdit"
_U_NET_NAMES = "comfy.utils.unet_to_diffusers"

OPEN_CLIP = "transformer.resblocks.0.ln_1.weight"
"""A tensor of a CLIP model in its trainer's names, which core converts."""

_TAKEN_APART = "ComfyUI takes it apart, or names it anew, when it loads it"


def core_function(name: str) -> Any:
    """A function of core's; a missing one tells as little as one that needs numbers."""
    found = find(name)
    if found is None:
        raise NotImplementedError(name)
    return found


def on_meta(checkpoint: Checkpoint) -> Tensors:
    """The checkpoint's tensors without their numbers."""
    return {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in checkpoint.entries.items()
    }


def detected(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Any | None:
    """Core's configuration of the model, or None where it knows none under these names.

    Raises:
        NotImplementedError, RuntimeError: core looks at a tensor's numbers, which a header does not have.
    """
    return core_function(_DETECT)(tensors, "", metadata=dict(metadata))


def under_core_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names that core gives the tensors, each of which is made when it is read.

    Core renames, reorders and joins those of files with diffusers' names after reading them, and its own function does
    so here, one tensor at a time. Other files are left as they are.

    Raises:
        CheckpointError: layers are stored with scales, which core does not take along, or core does not tell.
    """
    refuse_foreign(checkpoint)
    tensors = on_meta(checkpoint)
    try:
        if detected(tensors, checkpoint.metadata) is not None:
            return checkpoint
        entries = _converted(checkpoint, tensors) or _renamed(checkpoint, tensors)
    except KeyError as error:
        raise incomplete(checkpoint, error) from None
    except (NotImplementedError, RuntimeError) as error:
        logger.debug("What core builds of %s cannot be told from its header: %s", checkpoint.path.name, error)
        model = converted_model(checkpoint.entries)
        if model is not None:
            raise CheckpointError(
                f"{checkpoint.path.name} has diffusers' names of {model}, and what ComfyUI makes of them cannot be told: "
                "use the file in ComfyUI's own names."
            ) from None
        return checkpoint
    if entries is None:
        return checkpoint
    scaled = next((name for name, layer in find_stored(checkpoint).layers.items() if not layer.unit_scale), None)
    if scaled is not None:
        raise CheckpointError(
            f"{checkpoint.path.name} holds '{scaled}' quantized under a name of diffusers', which ComfyUI changes without "
            "its scales: use the 16-bit file, or one in ComfyUI's own names."
        )
    return replace(checkpoint, entries=entries)


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Refuse a file with weights as another tool stores them.

    Raises:
        CheckpointError: it names one.
    """
    foreign = foreign_weight(checkpoint.entries)
    if foreign is not None:
        raise CheckpointError(f"{checkpoint.path.name}: {foreign}")


def incomplete(checkpoint: Checkpoint, error: KeyError) -> CheckpointError:
    """The sentence for a tensor that core looked for and did not find."""
    layer = str(error.args[0]).rpartition(".")[0]
    instead = next((name for name in checkpoint.entries if name.startswith(f"{layer}.") and ".bias" not in name), None)
    there = "" if instead is None else f" (but '{instead}' is)"
    return CheckpointError(
        f"{checkpoint.path.name} is incomplete: ComfyUI tells models apart by {error}, which is not there{there}; download "
        "it again, or use another file."
    )


def signature(config: Any | None) -> object:
    """What a configuration of core's says of a model: equal for two that build the same."""
    return None if config is None else (type(config), config.unet_config, config.sampling_settings)


class _Selected(dict[str, torch.Tensor]):
    """All of a file's tensors for core to look at, and some of them for it to take."""

    def __init__(self, every: Mapping[str, torch.Tensor], selected: Mapping[str, torch.Tensor]) -> None:
        super().__init__(every)
        self._selected = selected

    def get(self, key: str, default: Any = None) -> Any:
        return self._selected.get(key, default)


class _Recorder(torch.overrides.TorchFunctionMode):
    """Notes which of some tensors each tensor is made of, views and writes into them included."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._sources = {_memory(tensor): {name} for name, tensor in tensors.items()}
        # Or another tensor could get the place of one that is gone.
        self._held = list(tensors.values())
        self.written: set[int] = set()

    def sources(self, tensor: torch.Tensor) -> set[str]:
        return self._sources.get(_memory(tensor), set())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        writes = getattr(func, "__name__", "") in ("__setitem__", "copy_")
        target = args[0] if writes else result
        if isinstance(target, torch.Tensor):
            given = [value for value in _flat((*args, *(kwargs or {}).values())) if isinstance(value, torch.Tensor)]
            self._held.append(target)
            self._sources[_memory(target)] = self.sources(target).union(*(self.sources(value) for value in given))
            if writes:
                self.written.add(_memory(target))
        elif isinstance(result, (tuple, list)):
            self._note_parts(result, args)
        return result

    def _note_parts(self, parts: Iterable[Any], args: Any) -> None:
        """Of `chunk` and its like."""
        made_of = set().union(*(self.sources(value) for value in _flat(args) if isinstance(value, torch.Tensor)))
        for part in parts:
            if isinstance(part, torch.Tensor):
                self._held.append(part)
                self._sources[_memory(part)] = self.sources(part) | made_of


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _memory(tensor: torch.Tensor) -> int:
    """Tells the memory of one tensor and its views from any other's, where there is none too."""
    return tensor.untyped_storage()._cdata


def _converted(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, TensorEntry] | None:
    """The entries that core's conversion of transformers makes, or None where it has none for these names."""
    recorder = _Recorder(tensors)
    with recorder:
        made = core_function(CONVERT)(dict(tensors), "")
    if made is None or detected(made, {}) is None:
        return None
    entries = {}
    for name, tensor in made.items():
        sources = recorder.sources(tensor)
        whole = next((source for source in sources if tensors[source] is tensor), None)
        if whole is not None and _memory(tensor) not in recorder.written:
            entries[name] = replace(checkpoint.entries[whole], name=name)
        else:
            entries[name] = _joined(checkpoint, tensors, name, tensor, sources)
    return entries


def _joined(
    checkpoint: Checkpoint, tensors: Tensors, name: str, made: torch.Tensor, sources: Iterable[str]
) -> TensorEntry:
    names = tuple(sorted(sources))
    parts = tuple(checkpoint.entries[source] for source in names)
    nbytes = sum(part.nbytes for part in parts)
    join = partial(_convert, tensors, name, names)
    return TensorEntry(name, made.dtype, tuple(made.shape), parts[0].path, 0, nbytes, "", parts, join)


def _convert(every: Tensors, name: str, names: tuple[str, ...], parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of core's, made of those of the file by core's own conversion."""
    taken = _Selected(every, dict(zip(names, parts, strict=True)))
    return core_function(CONVERT)(taken, "")[name]


def _renamed(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, TensorEntry] | None:
    """The entries of a U-Net with diffusers' names, which core only names anew."""
    config = core_function(DETECT_U_NET)(tensors)
    if config is None:
        return None
    ours = core_function(_U_NET_NAMES)(config.unet_config)
    return {ours[name]: replace(entry, name=ours[name]) for name, entry in checkpoint.entries.items() if name in ours}


def pinned_layers(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Matrices of a diffusion model that core does more with than multiply, and what; None where its code tells nothing.

    The model is built without memory for its weights, and asked which of its modules are Linears.
    """
    tensors = on_meta(checkpoint)
    try:
        config = detected(tensors, checkpoint.metadata)
        if config is None:
            return None
        landed = _landed(tensors, config.process_unet_state_dict)
        modules = _modules(config, tensors)
    except Exception as error:
        # Any model's own code runs here, on tensors that it was not written for.
        logger.debug("The modules of %s cannot be told from core's code: %s", checkpoint.path.name, error)
        return None
    matrices = [*_matrices(tensors)]
    apart = {layer: _TAKEN_APART for layer in matrices if layer not in landed}
    other = no_linears(modules, landed.values())
    return apart | {layer: other[landed[layer]] for layer in matrices if landed.get(layer) in other}


def no_linears(modules: Mapping[str, torch.nn.Module], layers: Iterable[str]) -> dict[str, str]:
    """Those of `layers` that a model has as another module than a Linear, and what they are."""
    found = {layer: modules[layer] for layer in layers if layer in modules}
    return {
        layer: f"ComfyUI uses it as {type(module).__name__}, not as Linear"
        for layer, module in found.items()
        if not _is_linear(module)
    }


def pinned_text_layers(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrices of a text encoder that are no Linears by their names, or that core takes apart when it loads them."""
    tensors = on_meta(checkpoint)
    pinned = tables(_matrices(tensors))
    convert = find("comfy.utils.clip_text_transformers_convert")
    if OPEN_CLIP in tensors and convert is not None:
        landed = _landed(tensors, lambda given: convert(given, "", ""))
        pinned |= {layer: _TAKEN_APART for layer in _matrices(tensors) if layer not in landed}
    return pinned


def shape_pinned(checkpoint: Checkpoint, plan: QuantizationPlan, look: Look) -> dict[str, str]:
    """Layers that may not be packed as planned, since core reads another model's dimensions off their shapes then.

    Args:
        checkpoint: the source.
        plan: what is to become of it.
        look: what core finds in a state dict.
    """
    tensors = on_meta(checkpoint)
    packed = {}
    for layer in plan.layers.values():
        if layer.action == QUANTIZE and len(layer.shape) == 2:
            shape = stored_shape(STORAGES[layer.storage], *layer.shape)
            if shape != layer.shape:
                packed[f"{layer.name}.weight"] = torch.empty(shape, device="meta")
    if not packed:
        return {}
    seen = _Watched(tensors)
    wanted = _found(look, seen)
    if wanted is None or _found(look, {**tensors, **packed}) == wanted:
        return {}
    return {
        name.removesuffix(".weight"): "ComfyUI reads the model's dimensions off its shape"
        for name in packed.keys() & seen.read
        if _found(look, {**tensors, name: packed[name]}) != wanted
    }


class _Watched(dict[str, torch.Tensor]):
    """Tensors that note which of them were looked at."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _found(look: Look, tensors: Tensors) -> Any:
    try:
        return look(tensors)
    except Exception as error:
        logger.debug("Core cannot tell the model: %s", error)
        return None


def _landed(tensors: Tensors, process: Process) -> dict[str, str]:
    """The module that gets each layer's weight whole, its scales and its description with it, by the layer's name."""
    arrived = _whole(tensors, process(dict(tensors)), "weight")
    beside = {
        f"{layer}.{suffix}": torch.empty((), device="meta")
        for layer in arrived
        for suffix in ("weight_scale", "comfy_quant")
    }
    both = {**tensors, **beside}
    made = process(dict(both))
    for suffix in ("weight", "weight_scale", "comfy_quant"):
        found = _whole(both, made, suffix)
        arrived = {layer: name for layer, name in arrived.items() if found.get(layer) == name}
    return arrived


def _whole(given: Tensors, made: Tensors, suffix: str) -> dict[str, str]:
    names = {id(tensor): name for name, tensor in made.items()}
    found = {}
    for name, tensor in given.items():
        ours = names.get(id(tensor), "")
        if name.endswith(f".{suffix}") and ours.endswith(f".{suffix}"):
            found[name.removesuffix(f".{suffix}")] = ours.removesuffix(f".{suffix}")
    return found


def _matrices(tensors: Tensors) -> Iterable[str]:
    return (
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2
    )


def _modules(config: Any, tensors: Tensors) -> dict[str, torch.nn.Module]:
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    with Numberless():
        model = config.get_model(dict(tensors), "", device=torch.device("meta"))
    return dict(model.diffusion_model.named_modules())


class Numberless(torch.overrides.TorchFunctionMode):
    """Answers what a model asks of tensors without numbers while it is built: no module's kind depends on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


def _is_linear(module: torch.nn.Module) -> bool:
    """Core's quantizable Linear, or what is made of one: each has a class of its own in every table of operations."""
    return any(base.__name__ == "Linear" for base in type(module).__mro__)
