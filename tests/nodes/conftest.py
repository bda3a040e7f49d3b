"""What ComfyUI knows of the pack's nodes, read once a session from the real schemas."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testing import comfyui


@dataclass(frozen=True)
class NodeText:
    """The texts of one node, as its schema has them.

    Attributes:
        display_name: its title.
        description: its own tooltip.
        inputs: id to tooltip, in the schema's order.
        outputs: name and tooltip, in order. The name is None where the type stands for it.
        output_types: in the same order.
        options: id to the choices of a combo.
    """

    display_name: str
    description: str
    inputs: dict[str, str]
    outputs: tuple[tuple[str | None, str], ...]
    output_types: tuple[str, ...]
    options: dict[str, tuple[str, ...]]


def _texts(info: dict[str, Any]) -> NodeText:
    entries = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    return NodeText(
        display_name=info["display_name"],
        description=info["description"],
        inputs={name: (entry[1] if len(entry) > 1 else {}).get("tooltip") or "" for name, entry in entries.items()},
        outputs=tuple(
            (None if name == kind else name, tooltip or "")
            for name, kind, tooltip in zip(info["output_name"], info["output"], tooltips, strict=True)
        ),
        output_types=tuple(info["output"]),
        options={name: tuple(entry[1]["options"]) for name, entry in entries.items() if entry[0] == "COMBO"},
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the ComfyUI of `described`, in which a killed one has left a file half-written."""
    folder = tmp_path_factory.mktemp("cache")
    for suffix in ("lock", "partial"):
        (folder / f".lowbit-model-00000000.{suffix}").write_text("x")
    return folder


@pytest.fixture(scope="session")
def described(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    """What `describe_nodes` found in a ComfyUI that loaded the pack."""
    path = tmp_path_factory.mktemp("nodes") / "nodes.json"
    script = Path(__file__).with_name("describe_nodes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(comfyui.CHECKOUT), str(path)],
        cwd=comfyui.find(),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "LOWBIT_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def nodes(described: dict[str, Any]) -> dict[str, NodeText]:
    """Node id to its texts."""
    return {name: _texts(info) for name, info in described["nodes"].items()}


@pytest.fixture(scope="session")
def core_names(described: dict[str, Any]) -> set[str]:
    """The names that people see on core's nodes."""
    return set(described["core"])


HALF_WIDTH = re.compile(r"[\u4e00-\u9fff] ?[,;:!?()]|[,;:!?()] ?[\u4e00-\u9fff]")


@pytest.fixture(scope="session")
def half_width() -> Callable[[str], list[str]]:
    """Punctuation of Western width beside a Chinese character, which readers take for a slip."""
    return HALF_WIDTH.findall


@pytest.fixture(scope="session")
def locale() -> Callable[[str, str], dict[str, Any]]:
    """Reads one locale file: (language, file name)."""
    return lambda language, name: json.loads((comfyui.CHECKOUT / "locales" / language / name).read_text("utf-8"))
