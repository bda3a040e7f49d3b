"""Drag-in nodes: schemas and a few lines each; the work is done by host, ops, attention and memory."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import attention, loaders, memory, optimize, quantized_model


class LowbitExtension(ComfyExtension):
    """Lists the pack's nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*optimize.NODES, *loaders.NODES, *quantized_model.NODES, *attention.NODES, *memory.NODES]
