"""Writes what ComfyUI knows of the pack's nodes into a JSON file: for a process of its own, in ComfyUI's folder."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any


def describe(pack: str) -> dict[str, Any]:
    """What ComfyUI has after it loaded the folder `pack` as it loads custom nodes.

    `nodes`: the pack's node ids with their entries of /object_info. `core`: the names that people see on core's nodes.
    """
    sys.path.insert(0, ".")
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    core = set(nodes.NODE_CLASS_MAPPINGS)
    if not asyncio.run(nodes.load_custom_node(pack)):
        raise SystemExit("ComfyUI did not load the pack")
    added = sorted(set(nodes.NODE_CLASS_MAPPINGS) - core)
    return {
        "nodes": {name: nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1() for name in added},
        "core": sorted(nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name) or name for name in core),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(describe(sys.argv[1])))
