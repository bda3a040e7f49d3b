"""The demo's table: one row per model and format, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lowbit.errors import LowbitError
from lowbit.ops.formats import AS_STORED
from testing.measure import environment, relative_error

from .progress import ProgressLine

BF16 = "bf16"
"""What to call the reference, a file as it is."""


def title(name: str) -> str:
    """What to call a format."""
    return BF16 if name == AS_STORED else name


@dataclass(frozen=True)
class Row:
    """One model in one format.

    Attributes:
        model: its title.
        format: a format's name; `none` is the reference, as the file has it.
        disk_bytes: the file that was loaded.
        resident_bytes: what the loaded model's tensors hold; with a GPU, what ComfyUI counts as loaded there.
        error: relative Frobenius error of the latent against the reference with the same seed; None for itself.
        first_seconds: quantizing, loading and sampling; of the trained model, all its clips and their decoding.
        again_seconds: sampling once more, another seed, everything loaded.
        psnr: of the trained model's clips against bf16's, dB, mean.
        recognised: how many of the trained model's clips show what was asked.
        problem: why there are no numbers, else empty.
    """

    model: str
    format: str
    disk_bytes: int | None = None
    resident_bytes: int | None = None
    error: float | None = None
    first_seconds: float | None = None
    again_seconds: float | None = None
    psnr: float | None = None
    recognised: str = ""
    problem: str = ""


Make = Callable[[str, ProgressLine], tuple[Sequence[torch.Tensor], Row]]
"""Makes clips or a latent in the format of a name; the row has the sizes and times. Raises LowbitError."""


def in_each_format(
    model: str, formats: Sequence[str], make: Make
) -> Iterator[tuple[Sequence[torch.Tensor], Row, ProgressLine]]:
    """What is made in bf16 and in every format, and the line to end with what came of it; where one fails, a row that says so."""
    for name in (AS_STORED, *formats):
        progress = ProgressLine(f"{model}, {title(name)}")
        try:
            yield *make(name, progress), progress
        except LowbitError as error:
            progress.finish(f"failed: {error}")
            yield (), Row(model, name, problem=str(error).splitlines()[0]), progress


def latent_rows(model: str, formats: Sequence[str], make: Make) -> Iterator[Row]:
    """A tiny model's rows, of the latents that `make` makes."""
    reference = None
    for latents, row, progress in in_each_format(model, formats, make):
        for latent in latents:
            error = None if reference is None else relative_error(latent, reference)
            reference = latent if reference is None else reference
            row = replace(row, error=error)
            progress.finish(f"{'reference' if error is None else f'error {error:.2e}'}, {row.first_seconds:.1f} s")
        yield row


def _shown(value: float | None, text: str) -> str:
    return "" if value is None else format(value, text)


def _error(row: Row) -> str:
    reference = row.error is None and row.psnr is None
    return row.problem or ("reference" if reference else _shown(row.error, ".2e"))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "format": lambda row: row.format,
    "on disk, MiB": lambda row: _shown(row.disk_bytes and row.disk_bytes / 2**20, ".2f"),
    "resident, MiB": lambda row: _shown(row.resident_bytes and row.resident_bytes / 2**20, ".2f"),
    "latent error": _error,
    "first run, s": lambda row: _shown(row.first_seconds, ".2f"),
    "again, s": lambda row: _shown(row.again_seconds, ".2f"),
    "clips, dB": lambda row: _shown(row.psnr, ".1f"),
    "as asked": lambda row: row.recognised,
}
"""Heading -> what makes a cell of a row."""


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table with aligned columns."""
    table = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: Sequence[Row], host: str) -> None:
    """Writes table.md and table.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment(host)
    heading = (
        "Wan and Qwen-Image are tiny, with random weights: their errors compare the formats, not pictures. The moving "
        "shapes come from a small Wan that was trained: `shapes.png` and `shapes.webp` show them in every format. On a "
        f"CPU, what stays in 16 bits is held in 32.\n\n{facts['host']}, {facts['device']}, torch {facts['torch']}, {facts['date']}.\n\n"
    )
    (folder / "table.md").write_text(heading + markdown(rows))
    (folder / "table.json").write_text(
        json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}, indent=1)
    )
