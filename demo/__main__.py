"""`./run demo`: a trained video model, tiny Wan and Qwen-Image in every format: clips and a table into demo-output/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit.ops.formats import FORMATS
from testing import comfyui

from . import report
from .report import Row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated format names (default: all)")
    parser.add_argument(
        "--without-comfyui", action="store_true", help="use diffusers' models even if there is a ComfyUI"
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace, formats: list[str]) -> tuple[list[Row], str]:
    """The rows, and what ran them."""
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


def main() -> int:
    """Runs the demo; returns the exit code: 0 when every format gave a finite result, 2 on a bad format name."""
    arguments = _arguments()
    formats = [name.strip() for name in arguments.formats.split(",") if name.strip()]
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        print(f"There is no format {', '.join(unknown)}; there are {', '.join(FORMATS)}.", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, host = _run(arguments, formats)
    report.write(arguments.out, rows, host)
    print(f"\n{report.markdown(rows)}\nPictures, table.md and table.json are in {arguments.out}/.")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
