"""What nunchaku calls the layers of a model, which it fuses and renames, and what ComfyUI calls them.

Sources: nunchaku's nunchaku/models/transformers (transformer_flux_v2.py, transformer_qwenimage.py, transformer_zimage.py),
ComfyUI's comfy/utils.py (`flux_to_diffusers`, `z_image_to_diffusers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch

from ..errors import CheckpointError
from .header import Join, TensorEntry

_BLOCK = re.compile(r"^(?P<stack>\w+)\.(?P<number>\d+)\.(?P<layer>.+)\.(?P<suffix>\w+)$")


@dataclass(frozen=True)
class Made:
    """A layer of ComfyUI's, made of nunchaku's.

    Attributes:
        ours: its name.
        theirs: those of the layers it is made of.
        join: makes a tensor of theirs; None: it is the same.
        join_bias: makes the bias, where that is another way.
        share: it is one in so many of their numbers.
        weight: what its weight is called.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join | None = None
    join_bias: Join | None = None
    share: int = 1
    weight: str = "weight"


@dataclass(frozen=True)
class Stack:
    """Numbered blocks of one kind: what ComfyUI calls them, their layers, and nunchaku's names by those of older files."""

    ours: str
    layers: tuple[Made, ...]
    older: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NunchakuModel:
    """A model that nunchaku runs. What has no row here has the same name in ComfyUI.

    Attributes:
        signature: a layer that it alone has.
        stacks: by nunchaku's name.
        whole: layers outside them.
    """

    signature: str
    stacks: Mapping[str, Stack]
    whole: tuple[Made, ...] = ()


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0)


def _part(number: int, count: int, parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].chunk(count)[number]


def _swapped(parts: list[torch.Tensor]) -> torch.Tensor:
    """Scale and shift in the other order."""
    return torch.cat(parts[0].chunk(2)[::-1])


def _in_turn(count: int, parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows that come in turn, one of each of `count` outputs, as one output after the other."""
    return torch.cat([parts[0][number::count] for number in range(count)])


def _in_turn_less_one(count: int, parts: list[torch.Tensor]) -> torch.Tensor:
    """The same of a bias, without the 1 that was added to each scale of (shift, scale, gate)."""
    outputs = _in_turn(count, parts).float().chunk(count)
    return torch.cat([output - 1 if number % 3 == 1 else output for number, output in enumerate(outputs)])


def _modulation(ours: str, theirs: str, count: int) -> Made:
    return Made(ours, (theirs,), partial(_in_turn, count), partial(_in_turn_less_one, count))


def _same(ours: str, theirs: str, weight: str = "weight") -> Made:
    return Made(ours, (theirs,), weight=weight)


def _parts_of(theirs: str, *ours: str) -> tuple[Made, ...]:
    count = len(ours)
    return tuple(Made(name, (theirs,), partial(_part, number, count), share=count) for number, name in enumerate(ours))


def _flux_stream(ours: str, qkv: str, out: str, feed_forward: str, norm: str, added: str) -> tuple[Made, ...]:
    return (
        _same(f"{ours}_attn.qkv", f"attn.{qkv}"),
        _same(f"{ours}_attn.proj", f"attn.{out}"),
        _same(f"{ours}_attn.norm.query_norm", f"attn.norm_{added}q", "scale"),
        _same(f"{ours}_attn.norm.key_norm", f"attn.norm_{added}k", "scale"),
        _same(f"{ours}_mlp.0", f"{feed_forward}.net.0.proj"),
        _same(f"{ours}_mlp.2", f"{feed_forward}.net.2"),
        _modulation(f"{ours}_mod.lin", f"{norm}.linear", 6),
    )


_FLUX_DOUBLE = Stack(
    "double_blocks",
    _flux_stream("img", "to_qkv", "to_out.0", "ff", "norm1", "")
    + _flux_stream("txt", "add_qkv_proj", "to_add_out", "ff_context", "norm1_context", "added_"),
    {
        "qkv_proj": "attn.to_qkv",
        "qkv_proj_context": "attn.add_qkv_proj",
        "out_proj": "attn.to_out.0",
        "out_proj_context": "attn.to_add_out",
        "mlp_fc1": "ff.net.0.proj",
        "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj",
        "mlp_context_fc2": "ff_context.net.2",
        **{f"norm_{part}": f"attn.norm_{part}" for part in ("q", "k", "added_q", "added_k")},
    },
)
_FLUX_SINGLE = Stack(
    "single_blocks",
    (
        Made("linear1", ("attn.to_qkv", "mlp_fc1"), torch.cat),
        Made("linear2", ("attn.to_out", "mlp_fc2"), partial(torch.cat, dim=1), _sum),
        _modulation("modulation.lin", "norm.linear", 3),
        _same("norm.query_norm", "attn.norm_q", "scale"),
        _same("norm.key_norm", "attn.norm_k", "scale"),
    ),
    {
        "qkv_proj": "attn.to_qkv",
        "out_proj": "attn.to_out",
        "norm_q": "attn.norm_q",
        "norm_k": "attn.norm_k",
    },
)
_FLUX = NunchakuModel(
    "single_transformer_blocks.0.norm.linear",
    {"transformer_blocks": _FLUX_DOUBLE, "single_transformer_blocks": _FLUX_SINGLE},
    (
        _same("img_in", "x_embedder"),
        _same("txt_in", "context_embedder"),
        _same("final_layer.linear", "proj_out"),
        Made("final_layer.adaLN_modulation.1", ("norm_out.linear",), _swapped),
        *(
            _same(f"{ours}_in.{layer}", f"time_text_embed.{theirs}_embedder.linear_{number}")
            for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for number, layer in ((1, "in_layer"), (2, "out_layer"))
        ),
    ),
)
_QWEN_IMAGE = NunchakuModel(
    "transformer_blocks.0.img_mod.1",
    {
        "transformer_blocks": Stack(
            "transformer_blocks",
            (
                *_parts_of("attn.to_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                *_parts_of("attn.add_qkv_proj", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                _modulation("img_mod.1", "img_mod.1", 6),
                _modulation("txt_mod.1", "txt_mod.1", 6),
            ),
        )
    },
)
_Z_IMAGE_BLOCK = (
    _same("attention.qkv", "attention.to_qkv"),
    # Of refiners that were left in 16 bits.
    Made("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v"), torch.cat),
    _same("attention.out", "attention.to_out.0"),
    _same("attention.q_norm", "attention.norm_q"),
    _same("attention.k_norm", "attention.norm_k"),
    *_parts_of("feed_forward.net.0.proj", "feed_forward.w3", "feed_forward.w1"),
    _same("feed_forward.w2", "feed_forward.net.2"),
)
_Z_IMAGE = NunchakuModel(
    "layers.0.feed_forward.net.0.proj",
    {name: Stack(name, _Z_IMAGE_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    (
        _same("x_embedder", "all_x_embedder.2-1"),
        _same("final_layer.linear", "all_final_layer.2-1.linear"),
        _same("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
)

MODELS: Mapping[str, NunchakuModel] = MappingProxyType({"Flux": _FLUX, "Qwen-Image": _QWEN_IMAGE, "Z-Image": _Z_IMAGE})
"""By what people call them."""


def under_comfyui_names(entries: Mapping[str, TensorEntry], packed: str) -> dict[str, TensorEntry]:
    """The tensors of a file of nunchaku's as ComfyUI has them, each made when it is read.

    Args:
        entries: with plain weights, by nunchaku's name.
        packed: a layer that nunchaku packed, for the error.

    Raises:
        CheckpointError: the model is none of `MODELS`, or has only a part of what a layer is made of.
    """
    model = next((model for model in MODELS.values() if f"{model.signature}.weight" in entries), None)
    if model is None:
        raise CheckpointError(
            f"it holds '{packed}' as nunchaku packs it, in a model whose layers are not known here (only those of "
            f"{', '.join(MODELS)}): use the 16-bit file."
        )
    entries = {_newer(name, model): entry for name, entry in entries.items()}
    result: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for made in _layers(model, entries):
        for suffix, join in (("weight", made.join), ("bias", made.join_bias or made.join)):
            sources = [f"{layer}.{suffix}" for layer in made.theirs]
            missing = [source for source in sources if source not in entries]
            if len(missing) == len(sources):
                continue
            if missing:
                raise CheckpointError(f"'{missing[0]}' is missing: the file is incomplete, download it again.")
            used.update(sources)
            name = f"{made.ours}.{made.weight if suffix == 'weight' else suffix}"
            parts = [entries[source] for source in sources]
            result[name] = replace(parts[0], name=name)
            if join is not None:
                result[name] = TensorEntry.joined(name, parts, join, made.share)
    return {name: entry for name, entry in entries.items() if name not in used} | result


def _newer(name: str, model: NunchakuModel) -> str:
    """The name in newer files of nunchaku's."""
    found = _BLOCK.match(name)
    older = model.stacks[found["stack"]].older if found is not None and found["stack"] in model.stacks else {}
    if found is None or found["layer"] not in older:
        return name
    return f"{found['stack']}.{found['number']}.{older[found['layer']]}.{found['suffix']}"


def _layers(model: NunchakuModel, names: Mapping[str, TensorEntry]) -> Iterator[Made]:
    """The rows of a model, with whole names."""
    yield from model.whole
    blocks = {(found["stack"], found["number"]) for name in names if (found := _BLOCK.match(name)) is not None}
    for theirs, number in sorted(blocks):
        stack = model.stacks.get(theirs)
        if stack is None:
            continue
        for made in stack.layers:
            whole = tuple(f"{theirs}.{number}.{layer}" for layer in made.theirs)
            yield replace(made, ours=f"{stack.ours}.{number}.{made.ours}", theirs=whole)
