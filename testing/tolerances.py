"""Measures the error of every case in every format over a few seeds: `python -m testing.tolerances [case ...]`.

Writes the table of the headless tests (with cases named: only their part of it). They hold each error between a third of the largest measured here and one and a half times it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from lowbit.ops.formats import FORMATS

from . import comfyui, graphs, tiny
from .cases import CASES, Case
from .measure import environment, relative_error
from .server import GraphFailedError, Server, prepare_base

SEEDS = (1, 2, 3, 4, 5)
TABLE = comfyui.CHECKOUT / "tests" / "headless" / "tolerances.json"


def measure(server: Server, case: Case, format: str) -> float:
    """The largest relative error over SEEDS against the reference."""
    errors = []
    for seed in SEEDS:
        value, reference = (_value(server, case, name, seed) for name in (format, None))
        errors.append(relative_error(value, reference))
    return max(errors)


def _value(server: Server, case: Case, format: str | None, seed: int):
    graph = graphs.dump(case.graph(format, seed), "tolerance", value=case.value)
    server.run(graph)
    return next(iter(load_file(server.base / "output" / "tolerance" / "value.safetensors").values()))


def main() -> int:
    """Writes the table; returns 1 when a format failed and has no number."""
    path = comfyui.find()
    failed = 0
    named = sys.argv[1:]
    largest: dict[str, dict[str, float]] = json.loads(TABLE.read_text())["largest_error"] if named else {}
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        base = prepare_base(Path(folder))
        tiny.write_all(base / "models")
        with Server(base, path) as server:
            for name in named or CASES:
                for format in FORMATS:
                    try:
                        largest.setdefault(name, {})[format] = float(f"{measure(server, CASES[name], format):.2e}")
                        print(name, format, largest[name][format], flush=True)
                    except GraphFailedError as error:
                        failed = 1
                        print(name, format, error.exception_message, flush=True)
    facts = environment(f"ComfyUI {comfyui.version(path)}, --cpu")
    TABLE.write_text(json.dumps({"environment": facts, "seeds": SEEDS, "largest_error": largest}, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
