"""Writes the README's tables from benchmarks/results/ and from the pack's own tables, between their markers.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import readme_linear, readme_memory
from benchmarks.markdown import percent, table
from benchmarks.memory_cases import COMPLETE, QUANTIZED, STOCK, STOCK_COPIES
from lowbit.attention.backends import BACKENDS, BUDGETS, CORE, ERROR_LIMITS
from lowbit.ops.formats import FORMATS, STORAGES
from lowbit.ops.linear_describe import describe_linear

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

GENERATIONS = (
    ("Turing", (7, 5)),
    ("Ampere", (8, 0)),
    ("Ampere", (8, 6)),
    ("Ada", (8, 9)),
    ("Hopper", (9, 0)),
    ("Blackwell", (10, 0)),
    ("Blackwell", (12, 0)),
    ("CPU", None),
)


def read(name: str) -> dict[str, Any] | None:
    """A results file, or None where no script has written it yet."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


HEADLINE_FORMATS = ("fp8_e4m3fn_scaled_fast", "int8_convrot_fast")


def headline() -> str:
    """What the pack is for, in a few rows: ComfyUI beside it, from the other results."""
    rows = [*headline_memory(), *headline_blocks(), *headline_attention()]
    return table(("measured on an H200", "ComfyUI 0.33", "Lowbit"), rows)


def headline_memory() -> list[tuple[str, str, str]]:
    """Step and main memory on each smaller card: stock beside format `auto`, and with attention where it was measured."""
    by_cap: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in (read("memory.json") or {"rows": []})["rows"]:
        if row["completed"]:
            by_cap.setdefault((row["case"], row["vram_cap"] >> 30), {})[row["contender"]] = row
    rows = []
    for (case, cap), found in sorted(by_cap.items(), key=lambda item: (item[0][0], -item[0][1])):
        stock, ours, complete = (found.get(contender.name) for contender in (STOCK, QUANTIZED, COMPLETE))
        # Over a few steps only those that waited for the GPU say how long one takes.
        if stock is None or ours is None or (case != "qwen_image" and "step_seconds" not in stock):
            continue
        same = found.get(STOCK_COPIES.name)
        theirs = f"bf16 file: {headline_step(stock)}"
        theirs += f"; the 8-bit file: {headline_step(same)}" if same else ""
        here = f"quantized by `auto`: {headline_step(ours)}"
        here += f"; and with its attention: {headline_time(complete)}" if complete else ""
        rows.append((f"{readme_memory.MEMORY_TITLES[case]}, {cap} GiB of VRAM", theirs, here))
    return rows


def headline_step(row: dict[str, Any]) -> str:
    """Time and main memory of one row."""
    return f"{headline_time(row)}, {readme_memory.main_memory(row) / 2**30:.0f} GiB of RAM"


def headline_time(row: dict[str, Any]) -> str:
    """The middle step, and the fastest where something else held many of them up."""
    middle, fastest = row["seconds_per_step"], min(row.get("step_seconds") or [row["seconds_per_step"]])
    return f"{middle:.2f} s/step" + (f" (the fastest {fastest:.2f})" if middle > 1.1 * fastest else "")


def headline_blocks() -> list[tuple[str, str, str]]:
    """Whole blocks in the two formats of most use."""
    results = (read("blocks.json") or {"results": []})["results"]
    ms = {(r["block"], r["format"], r["contender"]): r["ms"] for r in results if "ms" in r}
    return [
        (f"{title}, `{name}`", f"{ms[block, name, 'core']:.2f} ms", f"{ms[block, name, 'lowbit']:.2f} ms")
        for block, title in readme_linear.BLOCK_TITLES.items()
        for name in HEADLINE_FORMATS
        if {(block, name, "core"), (block, name, "lowbit")} <= ms.keys()
    ]


def headline_attention() -> list[tuple[str, str, str]]:
    """The longest self-attention, by core's default and within two budgets."""
    shapes = (read("attention.json") or {"shapes": []})["shapes"]
    if not shapes:
        return []
    longest = max(shapes, key=lambda shape: shape["core_ms"])
    ours = ", ".join(f"{longest['budgets'][budget]['auto_ms']:.0f} ms {budget}" for budget in ("exact", "fast"))
    return [(f"Attention, {longest['name']}", f"{longest['core_ms']:.0f} ms", ours)]


def formats() -> str:
    """Every format, what core calls its storage, its bits and its errors."""
    result = read("formats.json")
    rows = []
    for name, row in FORMATS.items():
        measured = result["rows"][name] if result else {}
        rows.append(
            (
                f"`{name}`",
                STORAGES[row.storage].core_format,
                f"{measured['bits_per_weight']:.2f}" if measured else "",
                percent(measured.get("weight_error")),
                percent(measured.get("product_error")),
                percent(measured.get("product_error_with_outliers")),
                row.summary,
            )
        )
    return table(("format", "stored as", "bits", "weights off by", "products off by", "with outliers", ""), rows)


def quality() -> str:
    """The trained model's clips in every format against bf16's."""
    result = read("quality.json")
    if result is None:
        return "Not measured yet."
    rows = []
    for name, row in result["rows"].items():
        mean, worst = row["psnr_mean_db"], row["psnr_worst_db"]
        near = ("the reference", "") if mean is None else (f"{mean:.1f}", f"{worst:.1f}")
        size = f"{row['transformer_bytes'] / 2**20:.1f}"
        rows.append((f"`{name}`", *near, f"{row['as_asked']} of {row['clips']}", size))
    facts = result["environment"]
    caption = f"{len(result['prompts'])} prompts, {facts['host']}, {facts['device']}, torch {facts['torch']} (`quality.json`):"
    header = ("format", "PSNR, dB", "worst clip", "shows what was asked", "transformer, MiB")
    return caption + "\n\n" + table(header, rows)


def quantize() -> str:
    """The streaming quantizer beside a copy and beside a whole state dict."""
    parts = []
    for name in ("quantize-h200.json", "quantize-cpu.json"):
        result = read(name)
        if result is None:
            continue
        rows = [
            (what, f"{row['source_mb_per_second']:,.0f}", f"{row['peak_mib']:,.0f}", f"{row['target_mib']:,.0f}")
            for what, row in result["rows"].items()
        ]
        caption = (
            f"{result['source_mib'] / 1024:.1f} GiB of bf16, largest tensor {result['largest_tensor_mib']:.0f} MiB, "
            f"on {result['device']} with {result['processor_threads']} processor threads (`{name}`):"
        )
        parts.append(
            caption + "\n\n" + table(("", "MB/s of source", "peak RAM, MiB more than idle", "file, MiB"), rows)
        )
    return "\n\n".join(parts)


def attention() -> str:
    """What `auto` chose per shape and budget, how much faster than core it was, and what it chose on other data."""
    result = read("attention.json")
    if result is None:
        return ""
    rows = [
        (shape["name"], f"{shape['core_ms']:.3f}", *(attention_choice(shape, budget) for budget in BUDGETS))
        for shape in result["shapes"]
    ]
    slowest = max(attention_over_best(shape, budget) for shape in result["shapes"] for budget in BUDGETS)
    caption = (
        f"{result['gpu']}, torch {result['torch']}, {result['date'][:10]}: times core's default, the backend chosen, its "
        "worst error. Timed on Gaussian data; where outliers in K and V make another backend take over, that one follows. "
        f"`auto` took at most {slowest:.2f} times as long as the fastest backend within the budget called by name."
    )
    return caption + "\n\n" + table(("shape", "core, ms", *BUDGETS), rows)


def attention_choice(shape: dict[str, Any], budget: str) -> str:
    """Speed, backend and worst error of each backend that a budget chose, with the data it was chosen on."""
    choice = shape["budgets"][budget]
    cells = []
    for name in dict.fromkeys(choice["picks"].values()):
        data = [kind for kind, pick in choice["picks"].items() if pick == name]
        times = choice["speedup_over_core"]
        if name != choice["chosen"]:
            times = 1.0 if name == CORE else shape["core_ms"] / shape["backends"][name]["ms"]
        where = "" if "gaussian" in data else f"{' and '.join(data)}: "
        cells.append(f"{where}{times:.2f} x {name} ({percent(max(choice['errors'][kind] for kind in data))})")
    return "; ".join(cells)


def attention_over_best(shape: dict[str, Any], budget: str) -> float:
    """The time of `auto` over that of the fastest backend of the budget's error classes, core's among them."""
    limit = ERROR_LIMITS[budget]
    ran = [entry for entry in shape["backends"].values() if "ms" in entry]
    allowed = [entry["ms"] for entry in ran if ERROR_LIMITS[entry["error_class"]] <= limit]
    return shape["budgets"][budget]["auto_ms"] / min([*allowed, shape["core_ms"]])


def memory() -> str:
    """ComfyUI on a smaller machine, with and without the manager."""
    return readme_memory.memory(read("memory.json"), read("pinning.json"))


def support() -> str:
    """How every format is multiplied on each generation, and where each attention backend can run."""
    header = ("format", *(f"{name} {'.'.join(map(str, cc))}" if cc else name for name, cc in GENERATIONS))
    rows = []
    for name, row in FORMATS.items():
        cells = [describe_linear(STORAGES[row.storage].layout, fast=row.fast, cc=cc).support for _, cc in GENERATIONS]
        rows.append((f"`{name}`", *cells))
    return table(header, rows) + "\n\n" + attention_support()


def attention_support() -> str:
    """The attention backends' own words on where they run, the error they are allowed, what was measured and where."""
    shapes = (read("attention.json") or {"shapes": []})["shapes"]
    rows = [
        (
            f"`{backend.name}`",
            backend.title,
            f"compute capability {backend.needed_capability}" if backend.capabilities else "any",
            bound(ERROR_LIMITS[backend.error_class]),
            worst_errors([shape["backends"][backend.name] for shape in shapes if backend.name in shape["backends"]]),
            ", ".join(backend.tested_on) or "not run",
        )
        for backend in BACKENDS
    ]
    header = ("attention backend", "", "needs", "allowed error", "worst measured, plain / outliers", "run by us on")
    return table(header, rows)


def worst_errors(entries: list[dict[str, Any]]) -> str:
    """The largest error over all shapes, on data without outliers and with."""
    errors = [entry["error"] for entry in entries if entry.get("error")]
    if not errors:
        return ""
    plain = max(value for error in errors for kind, value in error.items() if kind != "outliers")
    return f"{percent(plain)} / {percent(max(error['outliers'] for error in errors))}"


def bound(limit: float) -> str:
    """An error class in words."""
    return "not bounded" if math.isinf(limit) else f"at most {percent(limit)}"


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "formats": formats,
    "quality": quality,
    "quantize": quantize,
    "linear": lambda: readme_linear.linear(read("linear.json"), read("linear_profile.json")),
    "peers": lambda: readme_linear.peers(read("linear_peers.json")),
    "blocks": lambda: readme_linear.blocks(read("blocks.json"), read("blocks_slow_host.json")),
    "attention": attention,
    "memory": memory,
    "support": support,
}


def rendered(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the README is not what the results say")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    made = rendered(text)
    if options.check:
        return int(made != text)
    path.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
