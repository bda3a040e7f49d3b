"""How values and rows are written in the tables of README and docs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Four significant digits, thousands set apart; nothing for None."""
    if value is None:
        return ""
    decimals = max(0, 3 - (math.floor(math.log10(abs(value))) if value else 0))
    text = f"{value:,.{min(decimals, 3)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(error: float | None) -> str:
    """A relative error in percent, two digits."""
    return "" if error is None else f"{100 * error:.2g} %"


def gib(nbytes: float | None) -> str:
    """Bytes as GiB."""
    return "" if nbytes is None else f"{nbytes / 2**30:.1f} GiB"


def number_or_text(value: Any) -> str:
    """A cell."""
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value or "")


def rate(row: Row) -> str:
    """TB/s of the weight for few rows, TFLOP/s for many."""
    if not row.get("us"):
        return ""
    if row["m"] <= 64:
        return f"{row['weight_bytes_per_second'] / 1e12:.2f} TB/s"
    return f"{row['tflops']:,.0f} TFLOP/s"


def ratio(over: str, under: str) -> Callable[[Row], str]:
    """One value over another, two decimals."""
    return lambda row: f"{row[over] / row[under]:.2f}" if row.get(over) and row.get(under) else ""


def ratio_text(key: str) -> Callable[[Row], str]:
    """A ratio of a row, two decimals."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:.2f}"


def key_percent(key: str) -> Callable[[Row], str]:
    """An error of a row."""
    return lambda row: percent(row.get(key))


def near_wan(format_name: str) -> Callable[[Row], str]:
    """An architecture's error in a format, in bold where it is far from Wan's."""

    def cell(row: Row) -> str:
        error = percent(row["errors"][format_name])
        return error if row["times_wan"][format_name] <= row["near"] else f"**{error}**"

    return cell


def parts_left(row: Row) -> str:
    """What the keep rules leave of an architecture's errors, by format."""
    return " / ".join(percent(part) for part in row["part_left"].values())


def by_modulation_bits(format_name: str) -> Callable[[Row], str]:
    """An architecture's errors in a format by the bits of its modulation."""
    return lambda row: " / ".join(percent(error) for error in row["modulation_errors"].get(format_name, {}).values())


def worst_error(row: Row) -> str:
    """Of a backend: without outliers and with."""
    errors = row.get("error") or {}
    plain = [value for kind, value in errors.items() if kind != "outliers"]
    return f"{percent(max(plain))} / {percent(errors.get('outliers'))}" if plain else ""


def peak_ram(row: Row) -> str:
    """What could not be taken back, by the cgroup's count or the process's."""
    usage = row["usage"]
    return gib(usage["anonymous"] if usage["unreclaimable"] is None else usage["unreclaimable"])


KERNELS = {
    "attention": ("flash", "sdpa", "attention_hopper", "attention_int8"),
    "products": ("nvjet", "gemm", "matmul"),
    "quantizing": ("quantize", "rotate_rows", "attention_statistics"),
}
"""What a kernel of a step is for -> parts of such kernels' names, the first that fits."""


def by_kernel(record: Row) -> Iterator[Row]:
    """Of steps.json: milliseconds of the GPU's time in a step, of the contenders whose kernels were listed."""
    for row in record["rows"]:
        kernels = dict(row.get("kernels_of_two_steps_ms") or {})
        if not kernels:
            continue
        spent = dict.fromkeys(KERNELS, 0.0) | {"all": kernels.pop("all") / 2}
        for name, milliseconds in kernels.items():
            purpose = next((purpose for purpose, parts in KERNELS.items() if any(part in name for part in parts)), None)
            if purpose is not None:
                spent[purpose] += milliseconds / 2
        yield row | spent | {"rest": spent["all"] - sum(spent[purpose] for purpose in KERNELS)}
