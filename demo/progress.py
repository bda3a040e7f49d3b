"""One progress line in the terminal, fed by ComfyUI's websocket events or step by step."""

from __future__ import annotations

import sys
from typing import Any

_WIDTH = 24


class ProgressLine:
    """Rewrites one line on a terminal; prints only the finished line elsewhere."""

    def __init__(self, label: str):
        """label: what runs."""
        self._label = label
        self._live = sys.stdout.isatty()

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one websocket event."""
        data = event.get("data") or {}
        if event["type"] == "executing" and data.get("node"):
            self._show(data["node"], 0.0)
        elif event["type"] == "progress" and data.get("max"):
            self._show(data.get("node") or "", data["value"] / data["max"])

    def step(self, name: str, done: int, total: int) -> None:
        """Shows work that is done here, without ComfyUI."""
        self._show(name, done / max(total, 1))

    def _show(self, name: str, part: float) -> None:
        if self._live:
            bar = "#" * round(part * _WIDTH)
            print(f"\r\033[K{self._label:48} [{bar:{_WIDTH}}] {name}", end="", flush=True)

    def finish(self, text: str) -> None:
        """Ends the line with a result."""
        print(f"{chr(13) + chr(27) + '[K' if self._live else ''}{self._label:48} {text}", flush=True)
