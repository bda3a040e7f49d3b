"""Which ComfyUI this pack was made for, and which names of ComfyUI, comfy-kitchen and comfy-aimdo are not there."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MADE_FOR = "0.33"
"""The oldest ComfyUI that has every name the pack takes from it."""

_NAMED_IN_A_SENTENCE = 3


def dotted(table: Mapping[str, str]) -> tuple[str, ...]:
    """Full names from a module's name and what is taken from it, separated by spaces; the module itself for nothing."""
    return tuple(f"{module}.{name}" for module, names in table.items() for name in names.split())


def find(name: str, otherwise: Any = None) -> Any:
    """The thing of a full name, such as `comfy.ops.run_every_op`; `otherwise` where it is missing."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return otherwise


def missing(names: Iterable[str]) -> list[str]:
    """Those of the full names that are not there."""
    gone = object()
    return [name for name in names if find(name, gone) is gone]


def lacking(gone: Sequence[str], consequence: str) -> str:
    """For the log: what is lost, for want of what, and which ComfyUI has it.

    Args:
        gone: full names, or an error's text.
        consequence: what the user has to do without.
    """
    shown = ", ".join(gone[:_NAMED_IN_A_SENTENCE])
    shown += f" and {len(gone) - _NAMED_IN_A_SENTENCE} more" if len(gone) > _NAMED_IN_A_SENTENCE else ""
    return f"Lowbit: {consequence}, for want of {shown}. {advice()}"


def advice() -> str:
    """What is installed, what the pack was made for, and which of the two to change."""
    here = comfyui_version()
    packages = [f"{name} {found}" for name in ("comfy-kitchen", "comfy-aimdo") if (found := package_version(name))]
    beside = f" with {' and '.join(packages)}" if packages else ""
    change = (
        "update ComfyUI"
        if _numbers(here) < _numbers(MADE_FOR)
        else "update this pack, or install what ComfyUI's requirements.txt names"
    )
    return f"Lowbit was made for ComfyUI {MADE_FOR}, and this is {here}{beside}: {change}."


def comfyui_version() -> str:
    """ComfyUI's own version."""
    return str(find("comfyui_version.__version__", "an unknown version"))


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 33) of 0.33.1, by which releases are compared; all zeros where there are no numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
