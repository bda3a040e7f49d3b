"""Builds a decoder from a checkpoint, one layer at a time, quantizing on the way where a format is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..kernels.cache_heads import HeadNorms
from ..ops.checkpoint import Checkpoint
from ..ops.formats import STORAGES, WeightFormat, storage_for, stored_fits
from ..ops.header import TensorEntry
from ..ops.plan import find_stored
from ..ops.quantize import assemble, quantize_weight, storage_name_of
from ..ops.read_layer import read_layer
from ..ops.stored import StoredLayer, StoredLayers
from .architecture import Architecture
from .caches import LayerCache
from .decoder import Model
from .embedding import embedded
from .layers import FeedForward, Layer, LayerAttention, Rotation
from .linears import HeldLinears, Linear

_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")


@dataclass(frozen=True)
class Reader:
    """Reads a checkpoint's tensors onto a device.

    Attributes:
        checkpoint: the files.
        architecture: what the model is built like.
        weight_format: that linears are stored in; None: as the file has them.
        device, dtype: where, and of the residual stream.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    weight_format: WeightFormat | None
    device: torch.device
    dtype: torch.dtype

    def model(self) -> Model:
        """The whole decoder; its caches and rotary tables are those of an empty text.

        Raises:
            CheckpointError: a tensor is missing.
        """
        stored = find_stored(self.checkpoint)
        shape = self.architecture
        prefix = self._prefix()
        if f"{prefix}layers.{shape.layers}.input_layernorm.weight" in self.checkpoint.entries:
            raise CheckpointError(
                f"{self.checkpoint.path.name} has more than the {shape.layers} layers of its configuration: that is "
                "another model's."
            )
        table = self._embeddings(f"{prefix}embed_tokens", stored)
        layers = [self._layer(f"{prefix}layers.{index}", index, stored) for index in range(shape.layers)]
        logits = HeldLinears([self._head(prefix, table, stored)])
        return Model(
            lambda token: (embedded(table, token.view(-1), self.dtype) * shape.embedding_scale).to(self.dtype),
            layers,
            self._norm(f"{prefix}norm", shape.width),
            lambda x: logits(x)[0],
            shape.eps,
            vocabulary=table.shape[0],
        )

    def _prefix(self) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in self.checkpoint.entries:
                return prefix
        raise CheckpointError(f"{self.checkpoint.path.name} has no embeddings of tokens: it is no language model.")

    def _embeddings(self, name: str, stored: StoredLayers) -> torch.Tensor:
        """(V, K), quantized where the file has them so."""
        shape = (self._entry(f"{name}.weight").shape[0], self.architecture.width)
        if name not in stored.layers:
            return self._tensor(f"{name}.weight", shape)
        return self._quantized(name, shape, stored.layers[name])

    def _head(self, prefix: str, table: torch.Tensor, stored: StoredLayers) -> Linear:
        """The output head; `table` where the model has none of its own.

        Raises:
            CheckpointError: it has one, and the file has not.
        """
        # Beside the language model, whatever it lies in.
        for name in ("lm_head", f"{prefix.removesuffix('model.')}lm_head", f"{prefix}lm_head"):
            entry = self.checkpoint.entries.get(f"{name}.weight")
            if entry is not None:
                return self._linear(name, entry.shape[0], self.architecture.width, stored)
        if not self.architecture.tied:
            raise CheckpointError(
                f"{self.checkpoint.path.name} has no output head ('lm_head.weight'), and its embeddings are none: it can "
                "encode prompts, but not write text."
            )
        return Linear(table)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        found = tuple(self._entry(name).shape)
        if found != shape:
            raise self._other_model(name, found, shape)
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def _quantized(self, name: str, shape: tuple[int, int], layer: StoredLayer) -> torch.Tensor:
        codes = self._entry(f"{name}.weight").shape
        if not stored_fits(STORAGES[storage_name_of(layer.config)], *shape, codes):
            raise self._other_model(f"{name}.weight", codes, shape)
        return read_layer(self.checkpoint, name, layer, shape, self.dtype).to(self.device)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.checkpoint.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.checkpoint.path.name} has no '{name}': it is not whole, or another model.")
        return entry

    def _other_model(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> CheckpointError:
        sizes = (" x ".join(map(str, shape)) for shape in (found, wanted))
        return CheckpointError(
            f"{self.checkpoint.path.name}: '{name}' is {next(sizes)} where the configuration says {next(sizes)}: one of "
            "them is another model's."
        )

    def _norm(self, name: str, width: int) -> torch.Tensor:
        weight = self._tensor(f"{name}.weight", (width,))
        return weight + 1.0 if self.architecture.adds_one else weight

    def _linear(self, name: str, rows: int, columns: int, stored: StoredLayers) -> Linear:
        bias = self._tensor(f"{name}.bias", (rows,)) if f"{name}.bias" in self.checkpoint.entries else None
        if name in stored.layers:
            weight = self._quantized(name, (rows, columns), stored.layers[name])
            scale = f"{name}.pre_quant_scale"
            before = self._tensor(scale, (columns,)) if scale in self.checkpoint.entries else None
            return Linear(weight, bias, before)
        weight = self._tensor(f"{name}.weight", (rows, columns))
        if self.weight_format is None:
            return Linear(weight, bias)
        storage = storage_for(self.weight_format, columns)
        if columns % STORAGES[storage].column_multiple:
            return Linear(weight, bias)
        unit = self.weight_format.unit_scale
        parts = quantize_weight(weight, storage, unit_scale=unit, name=name)
        return Linear(assemble(parts, storage, (rows, columns), self.dtype), bias)

    def _linears(self, rows: Mapping[str, int], columns: int, stored: StoredLayers) -> HeldLinears:
        return HeldLinears([self._linear(name, count, columns, stored) for name, count in rows.items()])

    def _layer(self, name: str, index: int, stored: StoredLayers) -> Layer:
        shape = self.architecture
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        gemma = f"{name}.pre_feedforward_layernorm.weight" in self.checkpoint.entries
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        inner = self._entry(f"{mlp}.gate_proj.weight").shape[0]
        empty = torch.empty(shape.kv_heads, 0, shape.head_dim, dtype=self.dtype, device=self.device)
        after = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        return Layer(
            LayerAttention(
                self._linears(
                    {f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys},
                    shape.width,
                    stored,
                ),
                self._linears({f"{attention}.o_proj": shape.width}, queries, stored),
                shape.heads,
                shape.head_dim,
                self._head_norms(attention),
                rotary_tables(shape, shape.window[index], 0, 0, self.device),
                shape.scale,
                LayerCache(empty, empty, 0),
            ),
            FeedForward(
                self._linears({f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, shape.width, stored),
                self._linears({f"{mlp}.down_proj": shape.width}, inner, stored),
                shape.activation,
            ),
            self._norm(f"{name}.input_layernorm", shape.width),
            self._norm(f"{name}.{after}", shape.width),
            self._norm(f"{name}.post_attention_layernorm", shape.width) if gemma else None,
            self._norm(f"{name}.post_feedforward_layernorm", shape.width) if gemma else None,
        )

    def _head_norms(self, name: str) -> HeadNorms:
        if f"{name}.q_norm.weight" not in self.checkpoint.entries:
            return HeadNorms()
        width = self.architecture.head_dim
        return HeadNorms(
            self._norm(f"{name}.q_norm", width), self._norm(f"{name}.k_norm", width), eps=self.architecture.eps
        )


def rotary_tables(shape: Architecture, window: int | None, start: int, count: int, device: torch.device) -> Rotation:
    """Rotary tables of `count` positions from `start` on, for a layer of (sliding) attention."""
    local = window is not None and shape.local_theta is not None
    theta = shape.local_theta if local and shape.local_theta is not None else shape.theta
    columns = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    inverse = 1.0 / (theta**columns)
    if not local:
        inverse = inverse / shape.rotary_factor
    angles = torch.arange(start, start + count, device=device).float()[:, None] * inverse
    return Rotation(angles.cos(), angles.sin())
