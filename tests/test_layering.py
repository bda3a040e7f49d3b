"""Imports run one way: nodes -> host -> text, ops, attention, memory -> kernels; what stands outside only looks inward."""

from __future__ import annotations

import graphlib
import sys

import pytest

from . import source_imports as imports

LEAVES = {"errors", "versions"}
"""Files beside the folders, which everything may import and which import nothing of the pack."""

BELOW: dict[str, set[str]] = {
    "": {"nodes"},
    "__main__": {"cli"},
    "kernels": set(),
    "ops": {"kernels"},
    "attention": {"kernels"},
    "memory": {"kernels"},
    "text": {"ops", "kernels"},
    "host": {"ops", "attention", "memory", "text", "kernels"},
    "nodes": {"host", "ops", "attention", "memory", "text"},
    "cli": {"ops", "text"},
}
"""A folder, or a file beside the folders -> what it may import of the others."""

OUTSIDE: dict[str, set[str]] = {
    "testing": set(),
    "demo": {"testing"},
    "tools": {"testing", "demo"},
    "benchmarks": {"testing", "demo"},
}
"""What stands outside the pack -> what it may import of its like; all of the pack besides."""

COMFYUI = {
    "app", "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version",
    "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
ONLY_IN_HOST = {"comfy_aimdo"}
OTHER_PACKAGES: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "ops": {"torch", "safetensors", "einops", "comfy_kitchen", "gguf", "sentencepiece"},
    "attention": {"torch"},
    "memory": {"torch", "PIL", "psutil"},
    "text": {"torch", "transformers"},
}
"""The folders that run without ComfyUI -> the packages they import."""


@pytest.fixture(scope="module")
def known():
    return imports.modules()


@pytest.fixture(scope="module")
def arrows(known):
    return imports.inner_imports(known)


def test_no_modules_import_each_other(arrows):
    assert arrows
    graphlib.TopologicalSorter({module: targets - {module} for module, targets in arrows.items()}).prepare()


def test_every_folder_imports_only_what_lies_below_it(arrows):
    wrong = []
    for module, targets in arrows.items():
        for target in targets:
            here, there = (*module, "")[0], (*target, "")[0]
            if here == there or there in LEAVES:
                continue
            inward = here in OUTSIDE and there not in OUTSIDE
            if not inward and there not in (BELOW | OUTSIDE).get(here, ()):
                wrong.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    assert not wrong


def test_a_leaf_imports_nothing_of_the_pack(arrows):
    assert not {name: arrows[(name,)] for name in LEAVES if arrows.get((name,))}


def test_every_folder_with_code_has_its_place(known):
    """A new folder is given its place in the tables above."""
    assert {(*module, "")[0] for module in known} <= {*BELOW, *OUTSIDE, *LEAVES}


def test_the_pack_imports_itself_relatively(known):
    """ComfyUI imports it by its path, under a name that nobody knows beforehand."""
    inside = {module: path for module, path in known.items() if (*module, "")[0] not in OUTSIDE}
    wrong = [
        f"{path.name} imports {'.'.join(name)}"
        for module, path in inside.items()
        for relative, name in imports.imported(module, path)
        if not relative and name[0] in (imports.PACK, *OUTSIDE)
    ]
    assert not wrong


def test_comfyui_is_imported_by_nodes_and_host_alone(known):
    found = {}
    for module, path in known.items():
        folder = (*module, "")[0]
        outer = {name[0] for relative, name in imports.imported(module, path) if not relative}
        if folder in OTHER_PACKAGES:
            others = outer - set(sys.stdlib_module_names) - OTHER_PACKAGES[folder]
        else:
            others = outer & (COMFYUI | ONLY_IN_HOST) if folder in ("", "cli", *LEAVES) else set()
        if others:
            found[path.name] = others
    assert not found


def test_folders_of_host_stand_alone(arrows):
    """What takes one of them away, another ComfyUI for instance, leaves the others."""
    wrong = [
        f"{'.'.join(module)} imports {'.'.join(target)}"
        for module, targets in arrows.items()
        for target in targets
        if module[:1] == target[:1] == ("host",) and len(module) == len(target) == 3 and module[1] != target[1]
    ]
    assert not wrong
