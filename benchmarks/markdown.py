"""Tables, folds and percentages as the README shows them."""

from __future__ import annotations

from typing import Any


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def percent(error: float | None) -> str:
    """A relative error in percent, two digits."""
    return "" if error is None else f"{100 * error:.2g} %"


def fold(title: str, text: str) -> str:
    """A block that opens on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
