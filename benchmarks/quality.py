"""Measures what each format does to the picture: clips of the trained model against bf16's, and whether they show what was asked.

python -m benchmarks.quality [--out benchmarks/results/quality.json] [--formats a,b ...]
Runs ComfyUI (COMFYUI_PATH); the contact sheet and the animation go beside the JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import write
from demo import clips, shapes_in_comfyui
from demo.clips import SHOWN, Quality
from demo.report import title
from demo.shapes import SCENES
from lowbit.ops.formats import FORMATS
from testing import comfyui
from testing.measure import environment

OTHERS = [scene for scene in SCENES if scene not in SHOWN][::3]


def entry(quality: Quality) -> dict[str, Any]:
    """One format's numbers."""
    near, row = quality.psnr, quality.row
    return {
        "problem": row.problem,
        "clips": len(quality.clips),
        "as_asked": quality.recognised,
        "psnr_mean_db": row.psnr,
        "psnr_worst_db": min(near) if near else None,
        "transformer_bytes": row.disk_bytes,
        "seconds": row.first_seconds,
    }


def main() -> None:
    """Measures and writes the JSON file, the contact sheet and the animation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated format names (default: all)")
    options = parser.parse_args()
    scenes = (*SHOWN, *OTHERS)
    with shapes_in_comfyui.server_with_files(comfyui.find(), cpu=not torch.cuda.is_available()) as prompt:
        found = list(shapes_in_comfyui.measure(prompt, options.formats.split(","), scenes))
    facts = environment(f"ComfyUI {comfyui.version(comfyui.find())}")
    rows = {title(quality.row.format): entry(quality) for quality in found}
    result = {"environment": facts, "prompts": [scene.prompt() for scene in scenes], "rows": rows}
    write(options.out, result)
    clips.draw(options.out.parent, found)


if __name__ == "__main__":
    main()
