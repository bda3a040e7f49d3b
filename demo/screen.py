"""Opens a picture where a person sits in front of a screen, and nowhere else."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path


def has_screen() -> bool:
    """Whether this runs in a terminal on a screen."""
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ or "CI" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_picture(path: Path) -> bool:
    """Opens a picture in the program that the system has for it, without waiting; returns whether it could be."""
    return has_screen() and path.exists() and webbrowser.open(path.resolve().as_uri())
