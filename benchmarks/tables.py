"""Writes the tables of README and docs, between their markers, and the long ones beside their results.

python -m benchmarks.tables [--check]
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cells import percent, table
from benchmarks.shown import RESULTS, SHOWN, goals, where
from lowbit.attention.backends import BACKENDS, ERROR_LIMITS
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.linear_describe import describe_linear

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))

GENERATIONS = {
    "Turing 7.5": (7, 5),
    "Ampere 8.0": (8, 0),
    "Ampere 8.6": (8, 6),
    "Ada 8.9": (8, 9),
    "Hopper 9.0": (9, 0),
    "Blackwell 10.0": (10, 0),
    "Blackwell 12.0": (12, 0),
    "CPU": None,
}

LONG = ("linear", "peers", "attention", "memory", "families")
"""Too long for a page: they stand beside their results, the goals in the page."""


def support() -> str:
    """How every format is multiplied on each generation."""
    rows = [
        (
            f"`{name}`",
            *(
                describe_linear(STORAGES[row.storage].layout, fast=row.fast, cc=cc).support
                for cc in GENERATIONS.values()
            ),
        )
        for name, row in FORMATS.items()
    ]
    return table(("format", *GENERATIONS), rows)


def backends() -> str:
    """The attention backends' own words on where they run, the error they are allowed, and where we ran them."""
    rows = [
        (
            f"`{backend.name}`",
            backend.title,
            f"compute capability {backend.needed_capability}" if backend.capabilities else "any",
            bound(ERROR_LIMITS[backend.error_class]),
            ", ".join(backend.tested_on) or "not run by us",
        )
        for backend in BACKENDS
    ]
    return table(("attention backend", "", "needs", "allowed error", "run by us on"), rows)


def bound(limit: float) -> str:
    """An error class in words."""
    return "not bounded" if math.isinf(limit) else f"at most {percent(limit)}"


def format_names() -> str:
    """Every format and what it is."""
    rows = [(f"`{name}`", STORAGES[row.storage].core_format, row.summary) for name, row in FORMATS.items()]
    return table(("format", "stored as", ""), rows)


def long_table(name: str) -> str:
    """A link to the table beside its results, and the goals."""
    shown = SHOWN[name]
    record = shown.record
    if record is None:
        return f"Not measured yet: no `{shown.file}`."
    link = f"{where(record)}: [every row](../benchmarks/results/{beside_results(name).name})."
    return "\n\n".join([link, *([goals(record)] if record.get("goals") else [])])


def beside_results(name: str) -> Path:
    """Where a long table stands."""
    return RESULTS / Path(SHOWN[name].file).with_suffix(".md").name


TABLES: dict[str, Callable[[], str]] = {
    **{name: shown.text for name, shown in SHOWN.items() if name not in LONG},
    **{name: (lambda name=name: long_table(name)) for name in LONG},
    "support": support,
    "backends": backends,
    "format_names": format_names,
}


def rendered(text: str) -> str:
    """`text` with every marked table made anew. Raises KeyError for a marker that no table has."""
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def files() -> dict[Path, str]:
    """Every file with a table, as it should be."""
    pages = {ROOT / page: rendered((ROOT / page).read_text()) for page in PAGES}
    titles = {beside_results(name): f"# {SHOWN[name].file}\n\n{SHOWN[name].text()}\n" for name in LONG}
    return pages | {path: text for path, text in titles.items() if path.with_suffix(".json").exists()}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is not what the results say")
    check = parser.parse_args().check
    stale = {path: text for path, text in files().items() if not path.exists() or path.read_text() != text}
    if check:
        print("\n".join(map(str, stale)))
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
