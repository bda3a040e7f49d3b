"""What the Comfy Registry and pip need: a version, an icon, and requirements that leave the user's torch alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from testing import comfyui

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACK = comfyui.CHECKOUT
OUTSIDE = ("benchmarks", "demo", "testing", "tests", "tools")
TORCH = re.compile(r"torch(vision|audio)?|triton.*|nvidia-.*|xformers|.*attn.*|sageattention", re.IGNORECASE)


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    return re.match(r"[A-Za-z0-9._-]+", requirement).group()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def requirements() -> list[str]:
    """What ComfyUI-Manager and comfy-cli install with the pack."""
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_installing_replaces_no_torch(requirements):
    """Neither a requirement nor anything that it asks for in turn."""
    waiting, seen = [name_of(line) for line in requirements], set()
    assert waiting
    while waiting:
        name = waiting.pop()
        assert not TORCH.fullmatch(name), f"{name} would be installed"
        if name not in seen:
            seen.add(name)
            asked = importlib.metadata.requires(name) or []
            waiting += [name_of(line) for line in asked if "extra ==" not in line]


def test_requirements_take_any_newer_version(requirements):
    """An upper limit or a pin would downgrade what ComfyUI or another pack needs."""
    assert not [line for line in requirements if re.search(r"==|<|~=", line)]


def test_comfyui_itself_brings_every_requirement(requirements, comfyui_path):
    brought = (comfyui_path / "requirements.txt").read_text(encoding="utf-8")
    for line in requirements:
        assert re.search(rf"^{re.escape(name_of(line))}\b", brought, re.MULTILINE | re.IGNORECASE), line


def test_the_package_asks_for_the_same_and_what_comfyui_has_besides(project, requirements):
    assert sorted(project["project"]["dependencies"]) == sorted([*requirements, "torch>=2.8", "packaging"])


_ALONE = """
import importlib.metadata, json, sys
from importlib.machinery import PathFinder

declared = set(json.loads(sys.argv[1]))
owners = importlib.metadata.packages_distributions()


class OnlyDeclared:
    @staticmethod
    def find_spec(name, path=None, target=None):
        found = {owner.lower().replace("_", "-") for owner in owners.get(name.partition(".")[0], ())}
        return None if found and not found & declared else PathFinder.find_spec(name, path, target)


declared.add("lowbit")
sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyDeclared
from lowbit.cli import main

sys.exit(main(sys.argv[2:]))
"""


def test_the_command_line_needs_nothing_that_is_not_declared(project, tmp_path):
    """In an environment that has only the package and what it, and that in turn, asks for."""
    waiting, declared = [name_of(line) for line in project["project"]["dependencies"]], set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in declared:
            declared.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                asked = importlib.metadata.requires(name) or []
                waiting += [name_of(line) for line in asked if "extra ==" not in line]
    source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({f"blocks.{block}.q.weight": torch.randn(64, 256).bfloat16() for block in range(2)}, source)
    for arguments in (["quantize", source, target, "--format", "int8"], ["inspect", target, "--against", source]):
        command = [sys.executable, "-c", _ALONE, json.dumps(sorted(declared)), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_registry_has_what_it_asks_for(project):
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["project"]["name"])
    assert project["tool"]["comfy"]["PublisherId"]
    assert project["tool"]["comfy"]["DisplayName"]
    assert project["tool"]["comfy"]["requires-comfyui"].startswith(">=")
    assert (PACK / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_the_changelog_begins_with_this_version(project):
    first = re.search(r"^## (\S+)", (PACK / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    assert first == project["project"]["version"]


def test_the_icon_is_what_the_registry_takes():
    """Square, and at most 400 pixels."""
    with Image.open(PACK / "assets" / "icon.png") as icon:
        assert icon.width == icon.height <= 400
    assert (PACK / "assets" / "icon.svg").read_text(encoding="utf-8").startswith("<svg ")


def test_every_folder_of_the_pack_is_in_the_package(project):
    folders = {path.parent.relative_to(PACK) for path in PACK.glob("[a-z]*/**/__init__.py")}
    names = {".".join(("lowbit", *folder.parts)) for folder in folders if folder.parts[0] not in OUTSIDE}
    assert names | {"lowbit"} == set(project["tool"]["setuptools"]["packages"])
