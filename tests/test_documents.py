"""docs/architecture.md names files that exist, and every file that a newcomer opens first; help gives no number out of thin air."""

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


UNMEASURED = re.compile(
    r"costs (?:a|about a|some)? ?(?:fraction of a )?seconds?\b|reload of some|tenth of a second|microseconds|half a GiB"
    r"|some \d+ MB|about half the|halve a|[几两约之]一?两?秒|微秒|半个 GiB|约占? ?\d+ MB|减半[。；]"
)
"""Costs in numbers, in both languages, that no file in benchmarks/results/ has."""
HELP = [*CHECKOUT.glob("locales/*/*.json"), *CHECKOUT.glob("web/docs/**/*.md")]


@pytest.mark.parametrize("path", HELP, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_tooltips_and_help_give_no_cost_that_was_not_measured(path):
    assert not UNMEASURED.findall(path.read_text(encoding="utf-8"))
