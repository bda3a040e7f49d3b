"""Runs the pack beside other releases of what ComfyUI brings, and writes docs/versions.md: python -m tools.version_matrix.

Each row puts other releases of some packages in front of those of this environment and runs a part of the tests: the
pack loads with all its nodes, graphs run with quantized weights, attention and the memory manager, and ComfyUI's pages
show the nodes in a browser. A row takes about three minutes on two cores; other ComfyUIs are chosen by COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from testing import comfyui

PACKAGES = ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package", "transformers", "torch")
PAGE = comfyui.CHECKOUT / "docs" / "versions.md"
HEAD = """# Versions that were tried

Made for ComfyUI {made_for}. Each row: the pack loads with all its nodes and no warning, graphs with quantized weights, attention and
the memory manager run (on a CPU), and a browser shows the nodes. `python -m tools.version_matrix` does it again.

Older ones, started and given the same graphs on 2026-11-27: ComfyUI 0.32.0 shows every node, and Gemma 4 writes through ComfyUI's
own loop. ComfyUI 0.31.0 has what the attention and the memory nodes need, not what the others do (`comfy.ops.CastBiasWeightContext`).
The log says so when ComfyUI starts, with the version that is needed.

"""


@dataclass(frozen=True)
class Row:
    """Packages that are installed in front of those of this environment."""

    title: str
    packages: tuple[str, ...]


ROWS = (
    Row("what ComfyUI 0.33 asks for", ("comfy-kitchen==0.2.31", "comfy-aimdo==0.4.13")),
    Row("comfy-kitchen 0.2.40", ("comfy-kitchen==0.2.40",)),
    Row("newest comfy-aimdo", ("comfy-aimdo",)),
    Row("newest of all", ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package", "transformers")),
)


@dataclass(frozen=True)
class Part:
    """A column: some tests, and a pytest expression that picks from them."""

    title: str
    files: tuple[str, ...]
    chosen: str = ""


PARTS = (
    Part("start and nodes", ("tests/nodes/test_missing_names.py", "tests/nodes/test_locales.py")),
    Part(
        "graphs",
        ("tests/headless/test_loaders.py", "tests/headless/test_attention.py", "tests/headless/test_memory.py"),
        "test_auto_is_the_format or (near_cores and auto) or release_on_an_edge",
    ),
    Part("browser", ("tests/browser/test_nodes.py", "tests/browser/test_meter.py")),
)


def install(row: Row, folder: Path) -> None:
    """Puts the row's packages, without what they ask for in turn, into a folder. Raises CalledProcessError."""
    uv = shlex.split(os.environ.get("UV", "uv"))
    target = ["--python", sys.executable, "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*uv, "pip", "install", "--quiet", *target, *row.packages], check=True)


def versions(folder: Path) -> list[str]:
    """Versions of PACKAGES, those in the folder first."""
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(folder), *sys.path]):
        found.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower(), distribution.version)
    return [found.get(name, "") for name in PACKAGES]


def outcome(part: Part, folder: Path) -> str:
    """pytest's own count of what passed, failed or was left out."""
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *part.files]
    command += ["-k", part.chosen] if part.chosen else []
    done = subprocess.run(
        command,
        cwd=comfyui.CHECKOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return ", ".join(f"{number} {what}" for number, what in counts) or f"exit code {done.returncode}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the rows; writes the page when all of them were run. Returns 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.version_matrix", description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, metavar="N", help=f"rows to run, 1 to {len(ROWS)} (default: all)")
    chosen = parser.parse_args(arguments).rows or range(1, len(ROWS) + 1)
    head = ["ComfyUI", *PACKAGES, *(part.title for part in PARTS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    release = comfyui.version(comfyui.find())
    for row in (ROWS[number - 1] for number in chosen):
        print(f"{row.title} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="lowbit-versions-") as name:
            install(row, Path(name))
            cells = [release, *versions(Path(name)), *(outcome(part, Path(name)) for part in PARTS)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    if len(chosen) == len(ROWS):
        today = datetime.date.today().isoformat()
        PAGE.write_text(f"{HEAD.format(made_for=comfyui.PINNED_VERSION)}{text}\n\nRun on {today}.\n", encoding="utf-8")
    return 1 if "failed" in text or "error" in text or "exit code" in text else 0


if __name__ == "__main__":
    sys.exit(main())
