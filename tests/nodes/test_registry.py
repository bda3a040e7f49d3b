"""What the Comfy Registry and pip need: a version, an icon, and requirements that leave the user's torch alone."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

import pytest
from PIL import Image

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


def test_comfyui_itself_brings_every_requirement(requirements):
    try:
        brought = (comfyui.find() / "requirements.txt").read_text(encoding="utf-8")
    except comfyui.ComfyUIMissingError as error:
        pytest.skip(f"need ComfyUI ({error})")
    for line in requirements:
        assert re.search(rf"^{re.escape(name_of(line))}\b", brought, re.MULTILINE | re.IGNORECASE), line


def test_the_package_asks_for_the_same_and_torch(project, requirements):
    assert sorted(project["project"]["dependencies"]) == sorted([*requirements, "torch>=2.8"])


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
