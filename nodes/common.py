"""What the nodes share: their category, a line of text on the node, and a file's fingerprint."""

from __future__ import annotations

from ..errors import CheckpointError
from ..host.server import prompt_server
from ..host.weights.folders import model_path
from ..ops.checkpoint import open_checkpoint

CATEGORY = "lowbit"


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
