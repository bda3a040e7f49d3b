"""Drag-in nodes: schemas and a few lines each; the work is done by host, ops, attention and memory."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host.weights.folders import cache_folder
from ..host.weights.temporary import remove_abandoned
from . import attention, loaders, memory, quantized_model


class LowbitExtension(ComfyExtension):
    """Lists the pack's nodes to ComfyUI."""

    async def on_load(self) -> None:
        """A run that was killed leaves gigabytes, which nobody else would ever miss."""
        remove_abandoned(cache_folder())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loaders.NODES, *quantized_model.NODES, *attention.NODES, *memory.NODES]
