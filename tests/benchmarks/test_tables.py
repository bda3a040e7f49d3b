"""The tables of README and docs say what the results files say, and their links lead somewhere."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import cells, tables
from benchmarks.shown import RESULTS, SHOWN
from benchmarks.tables import LONG, PAGES, ROOT, TABLES

GIB = 2**30
ROW = {
    "case": "qwen_image",
    "contender": "memory manager, bf16 files",
    "vram_cap": 24 * GIB,
    "completed": True,
    "error": None,
    "usage": {"vram": 23 * GIB, "anonymous": GIB, "unreclaimable": 41 * GIB},
    "seconds_per_step": 1.234,
    "step_seconds": [1.3, 1.1, 1.234],
    "load_seconds": 31.23,
    "total_seconds": 66.6,
}


def test_every_table_is_what_the_results_say():
    stale = [path.name for path, text in tables.files().items() if path.read_text() != text]
    assert not stale, "run python -m benchmarks.tables"


def test_every_table_has_its_place():
    found = [name for page in PAGES for name in re.findall(r"<!-- table:(\w+) -->", (ROOT / page).read_text())]
    assert set(found) == set(TABLES)


def test_every_result_is_shown_or_drawn_and_has_its_goals():
    shown = {item.file for item in SHOWN.values()}
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert isinstance(record.get("goals"), list), path.name
        assert path.name in shown or not record.get("goals"), f"nobody sees the goals of {path.name}"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("name", SHOWN)
def test_what_was_not_measured_says_so(monkeypatch, tmp_path, name):
    monkeypatch.setattr("benchmarks.shown.RESULTS", tmp_path)
    assert "Not measured yet" in TABLES[name]()


def test_the_memory_table_says_what_was_measured(monkeypatch, tmp_path):
    failed = ROW | {"contender": "stock ComfyUI", "completed": False, "error": "Failed: a | b", "step_seconds": None}
    record = {"gpu": "NVIDIA H200", "rows": [ROW, failed | {"seconds_per_step": None}], "goals": []}
    (tmp_path / "memory.json").write_text(json.dumps(record))
    monkeypatch.setattr("benchmarks.shown.RESULTS", tmp_path)
    text = SHOWN["memory"].text()
    assert (
        "| 24.0 GiB | memory manager, bf16 files | completed | 23.0 GiB | 41.0 GiB | 1.234 | 1.1 | 31.23 | 66.6 |"
        in text
    )
    assert "| stock ComfyUI | **failed**: Failed: a / b |" in text
    assert "memory.md" in TABLES["memory"]()
    assert "memory" in LONG


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0, "0"),
        (1177.2, "1,177"),
        (17.534, "17.53"),
        (0.5440101, "0.544"),
        (-0.1088, "-0.109"),
        (32760, "32,760"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert cells.number(value) == text
