"""Opens a picture where a person sits in front of a screen, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def opener() -> list[str] | None:
    """The command that opens a file in its own program; None without a terminal or a screen."""
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ or "CI" in os.environ:
        return None
    if sys.platform == "darwin":
        return ["open"]
    if sys.platform == "win32":
        return ["cmd", "/c", "start", ""]
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return ["xdg-open"] if has_screen and shutil.which("xdg-open") else None


def open_picture(path: Path) -> bool:
    """Opens a picture without waiting for its program; returns whether it was tried."""
    command = opener()
    if command is None or not path.exists():
        return False
    try:
        quiet = subprocess.DEVNULL
        subprocess.Popen([*command, str(path)], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError as error:
        print(f"{path} could not be opened ({error}).", file=sys.stderr)
    return True
