"""One name that ComfyUI renames takes at most its own group of nodes away, and the log says which ComfyUI is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testing import comfyui

from .. import source_imports as imports

pytestmark = pytest.mark.headless

PACKAGES = (
    "comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "folder_paths", "nodes", "server",
)  # fmt: skip
INTERFACE = "comfy_api."
"""ComfyUI's documented interface for nodes: what is missing there is noticed at the nodes that use it."""

INDISPENSABLE = (
    "comfy_api.latest.ComfyExtension",
    "comfy_api.latest.io",
    "comfy_api.latest.io.ComfyNode",
    "comfy_api.latest.io.Schema",
)
"""Without these there is no such thing as a node."""

LOOKED_UP = "comfy_kitchen.backends.cuda"
"""Asked for among the modules that are loaded, and no matter where it is not."""

TABLES = ("core_names", "kitchen_names")
FOLDERS = ("attention", "host", "kernels", "memory", "nodes", "ops", "text")


@pytest.fixture(scope="module")
def taken() -> dict[imports.Module, set[str]]:
    """Module of the pack -> the names it takes from ComfyUI and its packages."""
    return {
        module: imports.names_of(path, PACKAGES)
        for module, path in imports.modules().items()
        if module[:1] in [(name,) for name in FOLDERS] and module[-1] not in TABLES
    }


@pytest.fixture(scope="module")
def found(taken, tmp_path_factory) -> dict[str, Any]:
    """What was left of the pack without each of the names."""
    folder = tmp_path_factory.mktemp("names")
    wanted, out = folder / "wanted.json", folder / "found.json"
    of_ops = sorted(set.union(*(names for module, names in taken.items() if module[0] == "ops")))
    others = [name for name in sorted(set.union(*taken.values())) if not within(of_ops, name)]
    wanted.write_text(json.dumps({"others": others, "ops": sorted({*set.union(*taken.values())} - {*others})}))
    script = Path(__file__).with_name("without_names.py")
    command = [sys.executable, str(script), str(comfyui.CHECKOUT), str(wanted), str(out)]
    done = subprocess.run(command, cwd=comfyui.find(), env=os.environ, capture_output=True, text=True, timeout=500)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def within(names: list[str], name: str) -> bool:
    """Whether one of the names is `name`, or lies in it."""
    return any(other == name or other.startswith(f"{name}.") for other in names)


def test_with_every_name_there_is_every_node_and_no_warning(found):
    assert found["said"] == []
    assert sorted(found["all"]) == sorted(node for group in found["groups"] for node in group["nodes"])


def test_a_name_takes_only_the_groups_that_need_it(found):
    wrong = {}
    for name, outcome in found["without"].items():
        if not name.startswith(INTERFACE):
            lost = {node for group in found["groups"] if within(group["needed"], name) for node in group["nodes"]}
            if set(outcome["left"]) != set(found["all"]) - lost:
                wrong[name] = outcome
    assert not wrong
    assert len(found["without"]) > 100


def test_no_name_takes_every_group(found):
    nothing_left = {name for name, outcome in found["without"].items() if not outcome["left"]}
    assert nothing_left == set(INDISPENSABLE)


def test_what_is_missing_is_said_with_the_version_that_has_it(found):
    """Of every name: one that no table has would be noticed only when a graph runs."""
    silent = {
        name
        for name, outcome in found["without"].items()
        if not name.startswith((INTERFACE, LOOKED_UP))
        and not any(name in text and "was made for ComfyUI 0.33" in text for text in outcome["said"])
    }
    # Attention kernels that are not exact are none of our business; they are there because the exact ones are looked for.
    assert silent == {f"comfy.ldm.modules.attention.attention_{name}" for name in ("comfy_kitchen_int8", "sage")}


def test_what_the_interface_lacks_takes_only_the_nodes_that_use_it(found, taken):
    arrows = imports.inner_imports(imports.modules())
    wrong = []
    for name, outcome in found["without"].items():
        if not name.startswith(INTERFACE) or name in INDISPENSABLE:
            continue
        for group in found["groups"]:
            files = imports.reached(("nodes", group["module"]), arrows) & set(taken)
            uses = any(within(sorted(taken[file]), name) for file in files)
            if not uses and not set(group["nodes"]) <= set(outcome["left"]):
                wrong.append((name, group["module"]))
    assert not wrong


def test_no_table_names_what_is_not_used(found, taken):
    """By its last part, since some are looked up in a way that reading the source does not show."""
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for module, path in imports.modules().items()
        if module[:1] in [(name,) for name in FOLDERS] and module[-1] not in TABLES
    )
    names = {name for group in found["groups"] for name in (*group["needed"], *group["optional"])}
    words = {name.rpartition(".")[2].removeprefix("attention_") for name in names}
    assert not [word for word in words if word not in source]
