"""What each benchmark was to reach: judged when its file is written, and kept in it under `goals`.

python -m benchmarks.goals FILE...    judges results that are there already
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One number that was aimed at.

    Attributes:
        name: what was measured, with its shape.
        target: the number aimed at, in `unit`.
        unit: ms, us, TFLOP/s, TB/s, x (times as fast), % (error), dB, ...
        at_most: whether a smaller number is better.
    """

    name: str
    target: float
    unit: str
    at_most: bool = False

    def judged(self, values: Iterable[float | None]) -> Record:
        """The entry of a results file: the worst of `values` counts, and no value is a goal that was not met."""
        present = [value for value in values if value is not None]
        measured = (max if self.at_most else min)(present) if present else None
        met = measured is not None and (measured <= self.target if self.at_most else measured >= self.target)
        return asdict(self) | {"measured": measured, "met": met}


RATES: dict[str, Callable[[Record], float | None]] = {
    "TFLOP/s": lambda row: row["tflops"],
    "us": lambda row: row["us"],
    "TB/s": lambda row: row["weight_bytes_per_second"] / 1e12,
    "x bf16's time": lambda row: row["ratio_to_bf16"],
}
"""A linear's unit -> its value in one row."""

FP8, INT8, CONVROT, NVFP4 = ("fp8_e4m3fn_scaled",), ("int8",), ("int8_convrot_fast",), ("fp4_scaled",)
FP8_FAST = ("fp8_e4m3fn_scaled_fast",)
WEIGHT_ONLY = ("fp8_e4m3fn_scaled", "fp8_e5m2_scaled", "int8", "mxfp8", "fp4_scaled")
LARGE = (("wan_qkv", 32760), ("wan_ffn_up", 32760), ("wan_ffn_down", 32760))
LINEAR_GOALS: tuple[tuple[Goal, Sequence[tuple[str, int]], Sequence[str]], ...] = (
    (Goal("FP8 fast, 32,760 x 5,120 x 5,120", 1180, "TFLOP/s"), LARGE[:1], FP8_FAST),
    (Goal("FP8 fast, 32,760 x 5,120 x 13,824", 1300, "TFLOP/s"), LARGE[1:2], FP8_FAST),
    (Goal("FP8 fast, 4,352 x 3,072 x 12,288", 1120, "TFLOP/s"), [("qwen_mlp_up", 4352)], FP8_FAST),
    (Goal("INT8 convrot fast, 32,760 x 5,120 x 5,120", 1060, "TFLOP/s"), LARGE[:1], CONVROT),
    (Goal("INT8 convrot fast, 32,760 x 5,120 x 13,824", 1200, "TFLOP/s"), LARGE[1:2], CONVROT),
    (Goal("FP8, INT8, 1 row, 4,096 to 14,336", 18, "us", at_most=True), [("decode", 1)], FP8 + INT8),
    (Goal("FP8, INT8, 16 rows, 4,096 to 14,336", 18, "us", at_most=True), [("decode", 16)], FP8 + INT8),
    (Goal("NVFP4, 1 row, 4,096 to 14,336", 13, "us", at_most=True), [("decode", 1)], NVFP4),
    (Goal("NVFP4, 16 rows, 4,096 to 14,336", 13, "us", at_most=True), [("decode", 16)], NVFP4),
    (Goal("FP8, MXFP8, 1 row, 3,072 to 18,432", 3.4, "TB/s"), [("qwen_modulation", 1)], (*FP8, "mxfp8")),
    (Goal("INT8, 1 row, 3,072 to 18,432", 3.4, "TB/s"), [("qwen_modulation", 1)], INT8),
    (Goal("8 bits, 2 rows, 3,072 to 18,432", 3.4, "TB/s"), [("qwen_modulation", 2)], (*FP8, *INT8, "mxfp8")),
    (Goal("weight-only, every format, 32,760 rows", 1.04, "x bf16's time", at_most=True), LARGE, WEIGHT_ONLY),
    (Goal("FP8 fast, 512 x 5,120 x 5,120", 40, "us", at_most=True), [("wan_text_kv", 512)], FP8_FAST),
    (Goal("MXFP8 fast, 32,760 x 5,120 x 5,120", 1.04, "x bf16's time", at_most=True), LARGE[:1], ("mxfp8_fast",)),
)
"""A goal, the (case, rows) it is judged on, and the formats; the worst of them counts."""


def linear(record: Record) -> list[Record]:
    """Of linear.json; what was not measured is left out."""
    entries = []
    for goal, cases, formats in LINEAR_GOALS:
        rows = [
            row
            for row in record["results"]
            if row["contender"] == "lowbit" and (row["case"], row["m"]) in cases and row["format"] in formats
        ]
        if rows:
            entries.append(goal.judged(RATES[goal.unit](row) for row in rows))
    return entries


def formats(record: Record) -> list[Record]:
    """Of formats.json."""
    bounds = {"fp8_e4m3fn_scaled_fast": 4, "int8_convrot_fast": 1.5, "fp4_scaled": 10, "int4_convrot_fast": 16}
    return [
        Goal(f"{name}, product, with outliers and without", bound, "%", at_most=True).judged(
            100 * record["rows"][name][key] for key in ("product_error", "product_error_with_outliers")
        )
        for name, bound in bounds.items()
    ]


def quality(record: Record) -> list[Record]:
    """Of quality.json."""
    rows = record["rows"]
    asked = Goal("clips that show what was asked, every format", 95, "%")
    bounds = {"int8_convrot_fast": 50, "fp8_e4m3fn_scaled": 40, "fp4_scaled": 30}
    return [
        asked.judged(100 * row["as_asked"] / row["clips"] for row in rows.values()),
        *(
            Goal(f"{name}, mean PSNR", bound, "dB").judged([rows[name]["psnr_mean_db"]])
            for name, bound in bounds.items()
            if name in rows
        ),
    ]


def quantize(record: Record) -> list[Record]:
    """Of quantize-*.json: the memory of two tensors."""
    goal = Goal("main memory over idle, every format", 2 * record["largest_tensor_mib"], "MiB", at_most=True)
    streamed = [row for what, row in record["rows"].items() if what != "plain copy" and "whole" not in what]
    return [goal.judged(row["peak_mib"] for row in streamed)]


def memory(record: Record) -> list[Record]:
    """Of memory.json: every row completes, nothing grows, and a manager on `auto` costs next to nothing."""
    entries = [Goal("runs that complete", 100, "%").judged([100 * float(row["completed"]) for row in record["rows"]])]
    for entry in record["growth"]:
        grown = (entry["growth_over_third"] or {}).values() if entry["case"] != "infinitetalk" else []
        grown = [*grown] or [(entry["growth_over_third"] or {}).get("allocated")]
        goal = Goal(f"{entry['case']}: growth over the third run", 3, "%", at_most=True)
        entries.append(goal.judged(None if value is None else 100 * value for value in grown))
    for entry in record["overhead"]:
        slower = entry["slower_by"]
        goal = Goal("a step with a manager on auto, memory to spare: slower by", 1, "%", at_most=True)
        entries.append(goal.judged([None if slower is None else 100 * slower]))
    # The least of the runs of one and the same: what disturbs one, such as a file that is read for the first time, adds to it.
    totals: dict[tuple[str, int | None, str], float] = {}
    for row in record["rows"]:
        key, total = (row["case"], row["vram_cap"], row["contender"]), row["total_seconds"]
        if total is not None:
            totals[key] = min(total, totals.get(key, total))
    for (case, cap, contender), total in totals.items():
        stock = totals.get((case, cap, "stock ComfyUI"))
        if contender == "memory manager, bf16 files" and stock:
            name = f"{case}, {(cap or 0) >> 30} GiB, bf16 files: whole run beside ComfyUI's"
            entries.append(Goal(name, 1.01, "x", at_most=True).judged([total / stock]))
    return entries + small_cards(record["rows"])


SMALL_CARDS = {"wan_2_2": 1.15, "qwen_image": 1.6}
"""A step on 12 and 8 GiB beside one on the whole GPU, at most."""


def small_cards(rows: Sequence[Record]) -> list[Record]:
    """Of memory.json's rows that have a whole GPU beside them."""
    seconds = {(row["case"], row["vram_cap"], row["contender"]): row["seconds_per_step"] for row in rows}
    return [
        Goal(
            f"{case}, {cap >> 30} GiB, {contender}: a step beside the whole GPU's", SMALL_CARDS[case], "x", True
        ).judged([step and step / whole])
        for (case, cap, contender), step in seconds.items()
        if cap in (8 << 30, 12 << 30) and "format auto" in contender and "stock" not in contender
        if case in SMALL_CARDS and (whole := seconds.get((case, None, contender)))
    ]


JUDGES: dict[str, Callable[[Record], list[Record]]] = {
    "linear": linear,
    "formats": formats,
    "quality": quality,
    "quantize": quantize,
    "memory": memory,
}
"""The beginning of a results file's name -> how it is judged. Another file brings its goals, or has none."""


def _judge(path: Path) -> Callable[[Record], list[Record]] | None:
    return JUDGES.get(path.stem) or JUDGES.get(path.stem.split("-")[0])


def judged(path: Path, record: Record) -> Record:
    """`record` with its goals."""
    judge = _judge(path)
    return record | {"goals": judge(record) if judge else record.get("goals", [])}


def write(path: Path, record: Record) -> None:
    """Writes a results file, judged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(judged(path, record), indent=1) + "\n")


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        if _judge(name) is None:
            sys.exit(f"{name} is judged by the script that writes it.")
        write(name, json.loads(name.read_text()))
