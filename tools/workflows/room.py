"""How much a node grows beyond its sockets and widgets: Nodes 2.0 draws it taller, and a run leaves lines and pictures on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROOM: Mapping[str, int] = {
    # A footer with the pack's name and taller text areas in Nodes 2.0, and after a run a line or two of text.
    "LowbitLoadDiffusionModel": 130,
    "LowbitLoadModelPatch": 130,
    "LowbitLoadTextEncoder": 130,
    "LowbitReleaseComponent": 120,
    "LowbitQuantizeModel": 130,
    "LowbitSeveralGPUs": 130,
    # The same footer, and the live meter with every component in its legend.
    "LowbitMemoryManager": 230,
    # That, and the three lines that say what was done.
    "LowbitOptimize": 360,
    # The footer alone.
    "LowbitLoadVAE": 40,
    "LowbitMemoryReport": 50,
    "LowbitSaveQuantizedModel": 100,  # and the name of the saved file
    # A square video, as wide as the node; ComfyUI makes the node no taller before.
    "SaveVideo": 400,
    # Nodes 2.0 shows the brush's settings below the picture.
    "Painter": 210,
    # Taller rows in Nodes 2.0.
    "ComfySwitchNode": 30,
    "CFGNorm": 30,
}
"""Node class -> units of height kept free below it, as measured in the browser with ComfyUI 0.33."""

METER_WIDTH = 340
"""The width of a node with the live meter: web/js/memory_meter.js."""


def room_below(node: Mapping[str, Any]) -> int:
    """The height to keep free below a saved node."""
    return ROOM.get(node.get("type", ""), 0)
