"""The README's tables say what the results files say."""

from __future__ import annotations

import re

from benchmarks.readme import ROOT, TABLES, rendered


def test_tables_are_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert rendered(text) == text, "run python -m benchmarks.readme"


def test_every_table_has_its_place():
    text = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"<!-- table:(\w+) -->", text)) == sorted(TABLES)


def test_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (ROOT / target).exists(), target
