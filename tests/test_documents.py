"""docs/architecture.md names files that exist, and every file that a newcomer opens first."""

from __future__ import annotations

import re

import pytest

from testing.comfyui import CHECKOUT

TEXT = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w./-]+/[\w.]*)`", TEXT)))


def test_files_are_named():
    assert len(NAMED) > 50


@pytest.mark.parametrize("name", NAMED)
def test_every_file_that_is_named_exists(name):
    assert (CHECKOUT / name).is_dir() if name.endswith("/") else (CHECKOUT / name).is_file()


@pytest.mark.parametrize("folder", ["host/attention", "host/memory", "host/text", "host/weights"])
def test_the_file_to_open_first_is_there_and_in_the_text(folder):
    said = (CHECKOUT / folder / "__init__.py").read_text(encoding="utf-8")
    first = re.search(r"start with (\w+\.py)", said).group(1)
    assert f"{folder}/{first}" in NAMED
