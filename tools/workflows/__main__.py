"""Makes the bundled workflows anew from the official templates and the nodes of a running ComfyUI: `python -m tools.workflows`.

Writes workflows/*.json and their thumbnails (or those named) and says where a graph is untidy. With --check it writes nothing and returns 1
when a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing import comfyui
from testing.server import Server, prepare_base
from . import edit, thumbnail, tidy
from .bundle import WORKFLOWS
from .compose import saved_graph
from .widgets import ObjectInfo

FOLDER = comfyui.CHECKOUT / "workflows"


def text(name: str, info: ObjectInfo) -> str:
    """The file of a bundled workflow. Raises KeyError on an unknown name."""
    saved = saved_graph(WORKFLOWS[name].design(info), info)
    saved["extra"]["lowbit"] = edit.versions(WORKFLOWS[name].template)
    return json.dumps(saved, indent=1, ensure_ascii=False) + "\n"


def object_info() -> ObjectInfo:
    """The nodes of a ComfyUI with this pack, started for the purpose."""
    with (
        tempfile.TemporaryDirectory(prefix="lowbit-") as folder,
        Server(prepare_base(Path(folder)), comfyui.find()) as server,
    ):
        return server.get_json("/object_info")


def untidy(saved: Mapping[str, Any]) -> list[str]:
    """What a person would find hard to read, level by level; inside subgraphs links may cross, as there every switch is set by one."""
    found: list[str] = []
    for level, graph in tidy.levels(saved):
        where = level or "root"
        found += [f"{where}: nodes {one} and {other} overlap" for one, other in tidy.overlaps(graph)]
        found += [f"{where}: link {link} runs behind node {node}" for link, node in tidy.links_behind_nodes(graph)]
        if not level:
            found += [f"{where}: links {one} and {other} cross" for one, other in tidy.crossings(graph)]
    return found


def main() -> int:
    """Writes or checks the files; returns 1 when a check fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.workflows", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *WORKFLOWS], help="which (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    chosen = parser.parse_args()
    info, failed = object_info(), 0
    FOLDER.mkdir(exist_ok=True)
    for name in chosen.names or WORKFLOWS:
        path, new = FOLDER / f"{name}.json", text(name, info)
        for line in untidy(json.loads(new)):
            print(f"{name}: {line}")
        if chosen.check:
            same = path.exists() and path.read_text(encoding="utf-8") == new
            failed |= not same
            print(f"{name}: {'as it should be' if same else 'differs: run python -m tools.workflows'}")
        else:
            path.write_text(new, encoding="utf-8")
            workflow = WORKFLOWS[name]
            thumbnail.write(path.with_suffix(".jpg"), json.loads(new), workflow.title, workflow.subtitle)
            print(f"{path.name}: written")
    return failed


if __name__ == "__main__":
    sys.exit(main())
