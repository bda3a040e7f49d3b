"""Finds a ComfyUI on this machine, or installs the pinned one with comfy-cli into a cache folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PINNED_VERSION = "0.33.0"
CHECKOUT = Path(__file__).resolve().parent.parent


class ComfyUIMissingError(RuntimeError):
    """No ComfyUI was found and none could be installed; the message says where we looked."""


def _is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_management.py").is_file()


def candidates() -> list[Path]:
    """The folders looked at, in order: $COMFYUI_PATH alone when it is set."""
    if chosen := os.environ.get("COMFYUI_PATH"):
        return [Path(chosen).expanduser()]
    found = []
    if CHECKOUT.parent.name == "custom_nodes":
        found.append(CHECKOUT.parent.parent)
    return [*found, Path.home() / "ComfyUI", Path.home() / "comfy" / "ComfyUI", install_folder()]


def version(folder: Path) -> str:
    """The version that a ComfyUI folder says it is."""
    text = (folder / "comfyui_version.py").read_text() if (folder / "comfyui_version.py").exists() else ""
    found = re.search(r'__version__ = "([^"]+)"', text)
    return found.group(1) if found else "of unknown version"


def install_folder() -> Path:
    """Where `install` puts the pinned ComfyUI."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lowbit" / f"ComfyUI-{PINNED_VERSION}"


def find() -> Path:
    """The first candidate that is a ComfyUI. Raises ComfyUIMissingError with the list of places otherwise."""
    places = candidates()
    for folder in places:
        if _is_comfyui(folder):
            return folder.resolve()
    raise ComfyUIMissingError("no ComfyUI in " + ", ".join(str(place) for place in places))


def install(timeout: float = 300) -> Path:
    """Installs ComfyUI's sources, version PINNED_VERSION, with comfy-cli (run by uv); returns the folder.

    Its Python requirements are left to `./run`, which puts them into its own environment.
    Raises ComfyUIMissingError when comfy-cli cannot be run or cannot reach the git host.
    """
    folder = install_folder()
    uv = [*shlex.split(os.environ.get("UV", "uv")), "tool", "run", "--from", "comfy-cli", "comfy"]
    options = ["--skip-manager", "--skip-torch-or-directml", "--skip-requirement", "--cpu", "--version", PINNED_VERSION]
    command = [*uv, "--skip-prompt", "--no-enable-telemetry", "--workspace", str(folder), "install", *options]
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    failed = f"comfy-cli could not install ComfyUI {PINNED_VERSION}"
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0"},
            timeout=timeout,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ComfyUIMissingError(f"{failed}: {error}") from error
    if done.returncode or not _is_comfyui(folder):
        shutil.rmtree(folder, ignore_errors=True)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        fatal = [line for line in lines if line.startswith(("fatal:", "error:"))]
        raise ComfyUIMissingError(f"{failed}: {(fatal or lines)[-1]}")
    return folder


def find_or_install() -> Path:
    """`find`, then `install` unless $COMFYUI_PATH names a folder. Raises ComfyUIMissingError."""
    try:
        return find()
    except ComfyUIMissingError:
        if os.environ.get("COMFYUI_PATH"):
            raise
        return install()


if __name__ == "__main__":
    try:
        print(find_or_install() if "--install" in sys.argv else find())
    except ComfyUIMissingError as missing:
        sys.exit(str(missing))
