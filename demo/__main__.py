"""`./run demo`: a trained video model, tiny Wan and Qwen-Image in several formats: clips and a table into demo-output/."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lowbit.ops.auto_format import four_bit_format
from lowbit.ops.device_info import device_info
from lowbit.ops.formats import AS_STORED, AUTO, FORMATS
from testing import comfyui

from . import clips, report
from .clips import Quality
from .report import BF16, Row
from .screen import open_picture


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results")
    few = (BF16, AUTO, "fp8_e4m3fn_scaled_fast", four_bit_format(device_info()))
    parser.add_argument("--formats", default=",".join(few), help=f"comma-separated (default: {', '.join(few)})")
    parser.add_argument("--all", action="store_true", help="every format")
    parser.add_argument(
        "--without-comfyui", action="store_true", help="use diffusers' models even if there is a ComfyUI"
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace, formats: list[str]) -> tuple[Iterator[Quality | Row], str]:
    """What is made, as it is made, and what runs it."""
    try:
        path = None if arguments.without_comfyui else comfyui.find()
    except comfyui.ComfyUIMissingError as missing:
        print(f"Without ComfyUI ({missing}): the same job on diffusers' own models, through the same ops.", flush=True)
        path = None
    if path is not None:
        from . import in_comfyui

        return in_comfyui.run(path, arguments.out, formats), f"ComfyUI {comfyui.version(path)}"
    from . import in_diffusers

    return in_diffusers.run(arguments.out, formats), "diffusers"


def collect(results: Iterator[Quality | Row], out: Path) -> list[Row]:
    """The table's rows; the contact sheet is drawn anew with every format, and opened when it is whole."""
    found: list[Quality] = []
    rows: list[Row] = []
    started = time.monotonic()
    opened = False
    for result in results:
        if isinstance(result, Row):
            opened = opened or bool(found) and open_picture(out / clips.SHEET)
            rows.append(result)
            continue
        found.append(result)
        rows.append(result.row)
        clips.draw(out, found)
        if len(found) == 1:
            print(f"The first clips are in {out / clips.SHEET} after {time.monotonic() - started:.0f} s.", flush=True)
    return rows


def main() -> int:
    """Runs the demo; returns the exit code: 0 when every format gave a finite result, 2 on a bad format name."""
    arguments = _arguments()
    asked = list(FORMATS) if arguments.all else [name.strip() for name in arguments.formats.split(",") if name.strip()]
    formats = [name for name in dict.fromkeys(asked) if name not in (BF16, AS_STORED)]
    known = (BF16, AUTO, *FORMATS)
    unknown = [name for name in formats if name not in known]
    if unknown:
        print(f"There is no format {', '.join(unknown)}; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    results, host = _run(arguments, formats)
    rows = collect(results, arguments.out)
    report.write(arguments.out, rows, host)
    print(f"\n{report.markdown(rows)}\nPictures, table.md and table.json are in {arguments.out}/.")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
