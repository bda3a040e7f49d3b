"""Drag-in nodes: schemas and a few lines each; the work is done by host, ops, attention and memory."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

from comfy_api.latest import ComfyExtension, io

from ..host.attention import core_names as attention_names
from ..host.memory import core_names as memory_names
from ..host.several_gpus import core_names as several_gpus_names
from ..host.text import core_names as text_names
from ..host.weights import core_names as weights_names
from ..ops import kitchen_names
from ..versions import lacking, missing

log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Group:
    """Nodes that stand or fall together.

    Attributes:
        title: what a user calls them.
        module: of this folder, with a list NODES.
        names: tables of what they take from ComfyUI: NEEDED, and OPTIONAL with what is lost without it.
    """

    title: str
    module: str
    names: tuple[ModuleType, ...]


GROUPS = (
    Group("Optimize", "optimize", (weights_names, kitchen_names, attention_names, memory_names)),
    Group("the loaders", "loaders", (weights_names, kitchen_names)),
    Group("Quantize Model and Save Quantized Model", "quantized_model", (weights_names, kitchen_names)),
    Group("the attention nodes", "attention", (attention_names,)),
    Group("the memory nodes", "memory", (memory_names,)),
    Group("Text Generation", "text", (text_names,)),
    Group(
        "Several GPUs",
        "several_gpus",
        (several_gpus_names, weights_names, kitchen_names, attention_names, memory_names),
    ),
)


class LowbitExtension(ComfyExtension):
    """Lists the pack's nodes to ComfyUI."""

    async def on_load(self) -> None:
        """Remove what killed runs left half-written: gigabytes that nobody else would ever miss."""
        try:
            from ..host.weights.folders import cache_folder
            from ..host.weights.temporary import remove_abandoned

            remove_abandoned(cache_folder())
        except Exception as error:  # noqa: BLE001  # no reason to go without nodes
            log.warning("What killed runs left in Lowbit's cache was not looked for: %s", error)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        optional = {name: lost for group in GROUPS for names in group.names for name, lost in names.OPTIONAL.items()}
        for name in missing(optional):
            log.warning(lacking([name], optional[name]))
        return [node for group in GROUPS for node in nodes_of(group)]


def nodes_of(group: Group) -> list[type[io.ComfyNode]]:
    """The group's nodes that this ComfyUI can run; the log says which it cannot, and why."""
    gone = missing(dict.fromkeys(name for names in group.names for name in names.NEEDED))
    if gone:
        log.warning(lacking(gone, f"{group.title} will not be shown"))
        return []
    try:
        nodes = importlib.import_module(f".{group.module}", __name__).NODES
    except Exception as error:  # noqa: BLE001  # whatever another version of the interface raises
        log.warning(lacking([str(error)], f"{group.title} will not be shown"))
        return []
    return [node for node in nodes if _has_a_schema(node)]


def _has_a_schema(node: type[io.ComfyNode]) -> bool:
    """Whether ComfyUI can describe the node: one that it cannot would take all others with it."""
    try:
        node.GET_SCHEMA()
    except Exception as error:  # noqa: BLE001  # whatever another version of the interface raises
        log.warning(lacking([str(error)], f"the node {node.__name__} is left out"))
        return False
    return True
