"""What the nodes share: their texts and category, a line of text on the node, and a file's fingerprint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..errors import CheckpointError
from ..host.server import prompt_server
from ..host.weights.folders import model_path
from ..ops.checkpoint import open_checkpoint

_TEXTS = Path(__file__).parent.parent / "locales" / "en" / "nodeDefs.json"


def node_schema(node_id: str, *, inputs: list[io.Input], outputs: list[io.Output], **options: Any) -> io.Schema:
    """`io.Schema` in this pack's category, with the title, description and tooltips that `locales/en` has for the node.

    The node is told its id, unless `hidden` says otherwise.
    """
    texts = _texts()[node_id]
    for given in inputs:
        given.tooltip = texts["inputs"][given.id]["tooltip"]
    for place, made in enumerate(outputs):
        made.tooltip = texts["outputs"][str(place)]["tooltip"]
    named = {name: texts[name] for name in ("display_name", "description")}
    if "hidden" not in options:
        options["hidden"] = [io.Hidden.unique_id]
    return io.Schema(node_id=node_id, category="lowbit", inputs=inputs, outputs=outputs, **named, **options)


@functools.cache
def _texts() -> dict[str, Any]:
    return json.loads(_TEXTS.read_text(encoding="utf-8"))


def show_text(node_id: str | None, text: str) -> None:
    """Write a line on the node in the browser; without a server there is nobody to read it."""
    server = prompt_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def file_fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, or a shard of its set, so that ComfyUI runs the loader again."""
    try:
        files = [file.stat() for file in open_checkpoint(model_path(folder, name)).files]
    except (CheckpointError, OSError) as error:
        return str(error)
    return " ".join(f"{status.st_size}-{status.st_mtime_ns}" for status in files)
