"""Puts one 16-bit weight, decoded when it is read, in the place of what another tool stores for a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from .foreign_scalings import find_scheme
from .header import DECODED, TensorEntry
from .layer_tensors import Decoded, Found, LayerTensors, Read
from .nunchaku_names import under_comfyui_names
from .stored_names import UNKNOWN_SCALINGS, described_layers

_WEIGHT = ".weight"


def decoded_layers(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], read: Read
) -> Mapping[str, TensorEntry]:
    """`entries` with the layers of other tools as plain weights; what the file describes in ComfyUI's way is left alone.

    Args:
        entries: of a safetensors file, by name.
        metadata: its text entries.
        read: gives a tensor's value.

    Raises:
        CheckpointError: a layer's tensors do not belong together, or its model's layers have names that are not known.
    """
    layers: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        layer, suffix = _split(name)
        layers.setdefault(layer, {})[suffix] = entry
    made: dict[str, TensorEntry] = {}
    taken: dict[str, str] = {}
    described = described_layers(metadata, entries)
    if described is None:
        # Any layer may be one of those.
        return entries
    renamed = ""
    schemes: dict[str, tuple[Found, frozenset[str]]] = {}
    for layer, tensors in layers.items():
        if len(tensors) == 1 or "comfy_quant" in tensors or layer in described:
            continue
        scheme = find_scheme(LayerTensors(layer, tensors, read))
        if scheme is not None and not any(_stands_for_more(suffix) for suffix in tensors.keys() - scheme[1]):
            schemes[layer] = scheme
    certain = {found.what for found, _ in schemes.values() if not found.either_axis}
    for layer, (found, suffixes) in schemes.items():
        if found.what not in certain:
            continue
        made |= _entries(layer, layers[layer], found)
        taken |= {f"{layer}.{suffix}": layer for suffix in suffixes & layers[layer].keys()}
        renamed = layer if found.renamed else renamed
    if not made:
        return entries
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        if name not in taken and name not in made:
            result[name] = entry
        for ours in (f"{taken[name]}.weight", f"{taken[name]}.bias") if name in taken else (name,):
            if ours in made:
                result[ours] = made[ours]
    return under_comfyui_names(result, renamed) if renamed else result


def foreign_sentences(entries: Iterable[TensorEntry]) -> list[str]:
    """What becomes of layers that another tool stored, a sentence for each of its ways, or of GGUF's block formats."""
    ways = (_decoded_from(entry) for entry in entries if entry.name.endswith(_WEIGHT))
    counts = Counter(way for way in ways if way)
    return [
        f"{count} layer{'s are' if count > 1 else ' is'} {what}, which ComfyUI cannot multiply with: "
        f"{'they are' if count > 1 else 'it is'} decoded and stored anew."
        for what, count in counts.items()
    ]


def _decoded_from(entry: TensorEntry) -> str:
    coded = (f"{part.encoding} of GGUF" for part in (entry, *entry.parts) if part.encoding)
    return entry.decoded_from or next(coded, "")


def _stands_for_more(suffix: str) -> bool:
    """Whether a tensor beside those of a scheme says that the layer is another, or is another weight of it."""
    return suffix == "weight" or f".{suffix}" in UNKNOWN_SCALINGS


def _split(name: str) -> tuple[str, str]:
    """The layer, and what is behind it: bitsandbytes names what belongs to a weight below the weight's own name."""
    layer, below, rest = name.rpartition(f"{_WEIGHT}.")
    if below:
        return layer, f"weight.{rest}"
    layer, _, suffix = name.rpartition(".")
    return layer, suffix


def _entries(layer: str, tensors: Mapping[str, TensorEntry], found: Found) -> dict[str, TensorEntry]:
    made = {f"{layer}.weight": _entry(f"{layer}.weight", tensors, found.weight, found.what)}
    if found.bias is not None:
        # Its bytes alone: those of the weight, where it is made of them too, are counted there.
        bias = _entry(f"{layer}.bias", tensors, found.bias, found.what, tensors["bias"])
        made[bias.name] = bias
    return made


def _entry(
    name: str, tensors: Mapping[str, TensorEntry], decoded: Decoded, what: str, alone: TensorEntry | None = None
) -> TensorEntry:
    parts = tuple(tensors[suffix] for suffix in decoded.parts.values())
    nbytes = sum(part.nbytes for part in parts) if alone is None else alone.nbytes
    join = partial(_join, decoded)
    return TensorEntry(name, DECODED, decoded.shape, parts[0].path, 0, nbytes, "", parts, join, what)


def _join(decoded: Decoded, parts: list[torch.Tensor]) -> torch.Tensor:
    return decoded.decode(**dict(zip(decoded.parts, parts, strict=True)))
