"""Builds a decoder from a checkpoint, one layer at a time, quantizing on the way where a format is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import CheckpointError
from ..kernels.cache_heads import HeadNorms
from ..ops.checkpoint import Checkpoint
from ..ops.formats import STORAGES, WeightFormat, storage_for
from ..ops.plan import find_stored
from ..ops.quantize import assemble, quantize_weight
from ..ops.read_layer import read_layer
from ..ops.stored import StoredLayers
from .architecture import Architecture
from .caches import LayerCache
from .decoder import Model
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
        table = self._tensor(f"{prefix}embed_tokens.weight")
        layers = [self._layer(f"{prefix}layers.{index}", index, stored) for index in range(shape.layers)]
        head = next(
            (name for name in ("lm_head", f"{prefix}lm_head") if f"{name}.weight" in self.checkpoint.entries), None
        )
        logits = HeldLinears([Linear(table)] if head is None else [self._linear(head, shape.width, stored)])
        return Model(
            lambda token: (F.embedding(token.view(-1), table) * shape.embedding_scale).to(self.dtype),
            layers,
            self._norm(f"{prefix}norm"),
            lambda x: logits(x)[0],
            shape.eps,
        )

    def _prefix(self) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in self.checkpoint.entries:
                return prefix
        raise CheckpointError(f"{self.checkpoint.path.name} has no embeddings of tokens: it is no language model.")

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.checkpoint.entries:
            raise CheckpointError(f"{self.checkpoint.path.name} has no '{name}': it is not whole, or another model.")
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def _norm(self, name: str) -> torch.Tensor:
        weight = self._tensor(f"{name}.weight")
        return weight + 1.0 if self.architecture.adds_one else weight

    def _linear(self, name: str, columns: int, stored: StoredLayers) -> Linear:
        bias = self._tensor(f"{name}.bias") if f"{name}.bias" in self.checkpoint.entries else None
        if name in stored.layers:
            rows = bias.shape[0] if bias is not None else self.checkpoint.entries[f"{name}.weight"].shape[0]
            weight = read_layer(self.checkpoint, name, stored.layers[name], (rows, columns), self.dtype)
            return Linear(weight.to(self.device), bias)
        weight = self._tensor(f"{name}.weight")
        if self.weight_format is None:
            return Linear(weight, bias)
        storage = storage_for(self.weight_format, columns)
        if columns % STORAGES[storage].column_multiple:
            return Linear(weight, bias)
        unit = self.weight_format.unit_scale
        parts = quantize_weight(weight, storage, unit_scale=unit)
        return Linear(assemble(parts, storage, (weight.shape[0], columns), self.dtype), bias)

    def _linears(self, names: Sequence[str], columns: int, stored: StoredLayers) -> HeldLinears:
        return HeldLinears([self._linear(name, columns, stored) for name in names])

    def _layer(self, name: str, index: int, stored: StoredLayers) -> Layer:
        shape = self.architecture
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        gemma = f"{name}.pre_feedforward_layernorm.weight" in self.checkpoint.entries
        down = f"{mlp}.down_proj"
        entries = self.checkpoint.entries
        inner = entries[f"{mlp}.gate_proj.weight"].shape[0]
        empty = torch.empty(shape.kv_heads, 0, shape.head_dim, dtype=self.dtype, device=self.device)
        return Layer(
            LayerAttention(
                self._linears([f"{attention}.{part}_proj" for part in "qkv"], shape.width, stored),
                self._linears([f"{attention}.o_proj"], shape.heads * shape.head_dim, stored),
                shape.heads,
                shape.head_dim,
                self._head_norms(attention),
                rotary_tables(shape, shape.window[index], 0, 0, self.device),
                shape.scale,
                LayerCache(empty, empty, 0),
            ),
            FeedForward(
                self._linears([f"{mlp}.gate_proj", f"{mlp}.up_proj"], shape.width, stored),
                self._linears([down], inner, stored),
                shape.activation,
            ),
            self._norm(f"{name}.input_layernorm"),
            self._norm(f"{name}.pre_feedforward_layernorm" if gemma else f"{name}.post_attention_layernorm"),
            self._norm(f"{name}.post_attention_layernorm") if gemma else None,
            self._norm(f"{name}.post_feedforward_layernorm") if gemma else None,
        )

    def _head_norms(self, name: str) -> HeadNorms:
        if f"{name}.q_norm.weight" not in self.checkpoint.entries:
            return HeadNorms()
        return HeadNorms(self._norm(f"{name}.q_norm"), self._norm(f"{name}.k_norm"), eps=self.architecture.eps)


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
