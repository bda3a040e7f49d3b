"""ComfyUI's server: what goes from here to the browser while a graph runs."""

from __future__ import annotations

import sys
from typing import Any

_SENDS = ("send_sync", "send_progress_text")


def prompt_server() -> Any:
    """ComfyUI's server; None where none runs, as under a script, or where it cannot be sent what this pack sends."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return server if all(hasattr(server, name) for name in _SENDS) else None
