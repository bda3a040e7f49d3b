"""The README's section on linears, from what benchmarks/linear.py, blocks.py and profile_linear.py measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.markdown import fold, percent, table

LINEAR_FORMATS = (
    "fp8_e4m3fn_scaled",
    "fp8_e4m3fn_scaled_fast",
    "int8",
    "int8_fast",
    "int8_convrot_fast",
    "mxfp8",
    "mxfp8_fast",
    "fp4_scaled",
    "fp4_scaled_fast",
    "int4_convrot_fast",
    "int4_asym_fast",
)

PEER_CASE = "wan_qkv"
BLOCK_TITLES = {
    "wan_14b": "A Wan 14B block, 32,760 tokens",
    "qwen_image": "A Qwen-Image block, 4,096 image and 256 text tokens",
}


DATA_SHEET_8_BIT = 1979e12
"""Dense FP8 and INT8 operations a second of an H200. Source: NVIDIA H200 data sheet."""


@dataclass(frozen=True)
class Goal:
    """What the linears were built to reach on an H200, in the unit of `measure`.

    Attributes:
        cases: (case, M) of linear.json; the worst of them counts, over all `formats`.
        measure: `tflops` (at least), `us` (at most), `bandwidth` in TB/s of weight bytes (at least), `ratio` of bf16's time
            (at most).
    """

    what: str
    cases: tuple[tuple[str, int], ...]
    formats: tuple[str, ...]
    measure: str
    value: float


WEIGHT_ONLY = ("fp8_e4m3fn_scaled", "fp8_e5m2_scaled", "int8", "mxfp8", "fp4_scaled")
LARGE = (("wan_qkv", 32760), ("wan_ffn_up", 32760), ("wan_ffn_down", 32760))
GOALS = (
    Goal("FP8 fast, 32,760 x 5,120 x 5,120", (("wan_qkv", 32760),), ("fp8_e4m3fn_scaled_fast",), "tflops", 1180),
    Goal("FP8 fast, 32,760 x 5,120 x 13,824", (("wan_ffn_up", 32760),), ("fp8_e4m3fn_scaled_fast",), "tflops", 1200),
    Goal("FP8 fast, 4,352 x 3,072 x 12,288", (("qwen_mlp_up", 4352),), ("fp8_e4m3fn_scaled_fast",), "tflops", 1120),
    Goal("INT8 convrot fast, 32,760 x 5,120 x 5,120", (("wan_qkv", 32760),), ("int8_convrot_fast",), "tflops", 1060),
    Goal(
        "INT8 convrot fast, 32,760 x 5,120 x 13,824", (("wan_ffn_up", 32760),), ("int8_convrot_fast",), "tflops", 1090
    ),
    Goal("FP8, INT8, 1 row, 4,096 to 14,336", (("decode", 1),), ("fp8_e4m3fn_scaled", "int8"), "us", 18),
    Goal("FP8, INT8, 16 rows, 4,096 to 14,336", (("decode", 16),), ("fp8_e4m3fn_scaled", "int8"), "us", 18),
    Goal("NVFP4, 1 row, 4,096 to 14,336", (("decode", 1),), ("fp4_scaled",), "us", 13),
    Goal("NVFP4, 16 rows, 4,096 to 14,336", (("decode", 16),), ("fp4_scaled",), "us", 13),
    Goal(
        "FP8, MXFP8, 1 row, 3,072 to 18,432",
        (("qwen_modulation", 1),),
        ("fp8_e4m3fn_scaled", "mxfp8"),
        "bandwidth",
        3.4,
    ),
    Goal("INT8, 1 row, 3,072 to 18,432", (("qwen_modulation", 1),), ("int8",), "bandwidth", 3.4),
    Goal(
        "FP8, INT8, MXFP8, 2 rows, 3,072 to 18,432",
        (("qwen_modulation", 2),),
        ("fp8_e4m3fn_scaled", "int8", "mxfp8"),
        "bandwidth",
        3.4,
    ),
    Goal("weight-only, every format, 32,760 rows", LARGE, WEIGHT_ONLY, "ratio", 1.04),
    Goal("FP8 fast, 512 x 5,120 x 5,120", (("wan_text_kv", 512),), ("fp8_e4m3fn_scaled_fast",), "us", 40),
    Goal("MXFP8 fast, 32,760 x 5,120 x 5,120", (("wan_qkv", 32760),), ("mxfp8_fast",), "ratio", 1.04),
)


def reached(goal: Goal, row: dict[str, Any], bandwidth: float) -> tuple[float, float | None, str]:
    """(measured, the hardware's limit, unit) of one row; the limit is None where bf16's own product is the yardstick."""
    if goal.measure == "tflops":
        return row["tflops"], DATA_SHEET_8_BIT / 1e12, "TFLOP/s"
    if goal.measure == "bandwidth":
        return row["weight_bytes_per_second"] / 1e12, bandwidth / 1e12, "TB/s"
    if goal.measure == "us" and row["m"] <= 64:
        return row["us"], row["us"] * row["weight_bytes_per_second"] / bandwidth, "us"
    if goal.measure == "us":
        return row["us"], 2e6 * row["m"] * row["k"] * row["n"] / DATA_SHEET_8_BIT, "us"
    return row["ratio_to_bf16"], None, "x bf16"


def goals(result: dict[str, Any]) -> str:
    """What was aimed at, what was measured, and how far the hardware would go."""
    rows = []
    for goal in GOALS:
        found = [
            reached(goal, row, result["bandwidth_limit_bytes_per_second"])
            for row in result["results"]
            if row["contender"] == "lowbit" and (row["case"], row["m"]) in goal.cases and row["format"] in goal.formats
        ]
        if not found:
            continue
        upwards = goal.measure in ("tflops", "bandwidth")
        measured, limit, unit = (min if upwards else max)(found)
        met = measured >= goal.value if upwards else measured <= goal.value
        digits = (
            0 if goal.measure == "tflops" else 1 if goal.measure == "us" else 2 if goal.measure == "bandwidth" else 3
        )
        share = "" if limit is None else f"{100 * (measured / limit if upwards else limit / measured):.0f} %"
        rows.append(
            (
                goal.what,
                f"{goal.value:,g} {unit}",
                f"{measured:,.{digits}f}" if met else f"**{measured:,.{digits}f}**",
                "" if limit is None else f"{limit:,.{digits}f}",
                share,
            )
        )
    return table(("", "aimed at", "measured, the worst", "hardware's limit", "of it"), rows) + "\n\nIn bold: missed."


def linear(result: dict[str, Any] | None, profiled: dict[str, Any] | None) -> str:
    """Goals; time per shape: bf16, core's way (comfy-kitchen), ours; the product's error. `result`: linear.json."""
    if result is None:
        return ""
    by_key = {(r["case"], r["m"], r["k"], r["n"], r["format"], r["contender"]): r for r in result["results"]}
    cases = dict.fromkeys((r["case"], r["m"], r["k"], r["n"]) for r in result["results"])
    parts = []
    for case in cases:
        plain = by_key.get((*case, "bf16", "F.linear"))
        if plain is None or not plain["us"]:
            continue
        rows = []
        for name in LINEAR_FORMATS:
            ours, core = (by_key.get((*case, name, who)) for who in ("lowbit", "comfy-kitchen"))
            if ours is None or not ours["us"]:
                continue
            rows.append(
                (
                    f"`{name}`",
                    f"{ours['us']:,.0f}",
                    rate(case[1], ours),
                    f"{core['us']:,.0f}" if core and core["us"] else "",
                    f"{plain['us'] / ours['us']:.2f}",
                    f"{1 / ours['ratio_to_bf16']:.2f}",
                    f"{ours['extra_peak_mib']:,.0f} / {core['extra_peak_mib']:,.0f}" if core else "",
                    percent(ours["relative_error"]),
                )
            )
        title = f"**{case[0]}**: {case[1]:,} x {case[2]:,} x {case[3]:,}, bf16 {plain['us']:,.0f} us"
        header = (
            "format",
            "Lowbit, us",
            "",
            "ComfyUI, us",
            "times bf16",
            "in turn",
            "peak MiB, ours / ComfyUI",
            "error",
        )
        parts.append(f"{title}\n\n{table(header, rows)}")
    environment = result["environment"]
    caption = (
        f"{environment['gpu']}, torch {environment['torch']}, comfy-kitchen {environment['comfy-kitchen']}. Large products "
        "are timed after 50 ms of the same one, at the clocks the power limit leaves; *in turn*: alternating with bf16's. The limits: "
        f"{result['bandwidth_limit_bytes_per_second'] / 1e12:.1f} TB/s (a copy), 989 and 1,979 TFLOP/s (data sheet, 16 and 8 bit)."
    )
    parts.append(profile(profiled))
    return goals(result) + "\n\n" + caption + "\n\n" + fold("Every shape that was measured", "\n\n".join(parts))


def profile(result: dict[str, Any] | None) -> str:
    """What Nsight Compute says of the few-row kernels: how near each is to a limit. `result`: linear_profile.json."""
    if result is None:
        return ""
    work, rows = result["workload"], []
    for launch in result["launches"]:
        if "matmul" in launch["kernel"] or "matvec" in launch["kernel"]:
            values = (
                f"{launch[key]:.0f} %" for key in ("dram_percent", "l1_percent", "sm_percent", "warps_active_percent")
            )
            rows.append((f"`{launch['kernel'].strip('_')}`", f"{launch['ns'] / 1e3:.1f}", *values))
    order = ", ".join(f"{name} at {m} row{'s' if m > 1 else ''}" for name in work["formats"] for m in work["rows"])
    caption = (
        f"**Few rows under Nsight Compute**, {work['k']:,} to {work['n']:,}: {order}; {work['repeats']} launches each"
    )
    return f"{caption}\n\n{table(('kernel', 'us', 'DRAM', 'L1', 'SM', 'warps active'), rows)}"


def peers(result: dict[str, Any] | None) -> str:
    """One shape beside the other libraries that import, from a run that measured them all. `result`: linear_peers.json."""
    if result is None:
        return ""
    found = [r for r in result["results"] if r["case"] == PEER_CASE and r["us"]]
    names = list(dict.fromkeys(r["contender"] for r in found if r["contender"] != "F.linear"))
    times = {(r["format"], r["contender"]): f"{r['us']:,.0f}" for r in found}
    rows = [
        (f"`{name}`", *(times.get((name, who), "") for who in names))
        for name in LINEAR_FORMATS
        if (name, names[0]) in times
    ]
    first, environment = found[0], result["environment"]
    versions = ", ".join(f"{who} {environment[who]}" for who in names if who in environment)
    caption = (
        f"Beside other libraries, us for {first['m']:,} x {first['k']:,} x {first['n']:,} "
        f"(bf16 {times['bf16', 'F.linear']}; {versions}):"
    )
    return f"{caption}\n\n{table(('format', *names), rows)}"


def blocks(result: dict[str, Any] | None, slow_host: dict[str, Any] | None = None) -> str:
    """Whole transformer blocks: bf16, core's way, ours. `result`: blocks.json; `slow_host`: blocks_slow_host.json."""
    if result is None:
        return ""
    by_key = {(r["block"], r["format"], r["contender"]): r for r in result["results"] if "ms" in r}
    parts = []
    for block, title in BLOCK_TITLES.items():
        plain = by_key[block, "bf16", "F.linear"]
        rows = []
        for name in LINEAR_FORMATS:
            ours, core = by_key.get((block, name, "lowbit")), by_key.get((block, name, "core"))
            if ours is None:
                continue
            rows.append(
                (
                    f"`{name}`",
                    f"{ours['ms']:.2f}",
                    f"{core['ms']:.2f}" if core else "",
                    f"{ours['speedup_over_bf16']:.2f}",
                    f"{core['speedup_over_bf16']:.2f}" if core else "",
                    f"{ours['extra_peak_mib']:,.0f} / {core['extra_peak_mib']:,.0f}" if core else "",
                )
            )
        header = (
            "format",
            "Lowbit, ms",
            "ComfyUI, ms",
            "times bf16",
            "ComfyUI, times bf16",
            "peak MiB, ours / ComfyUI",
        )
        caption = f"**{title}**, bf16 {plain['ms']:.2f} ms and {plain['extra_peak_mib']:,.0f} MiB"
        parts.append(f"{caption}\n\n{table(header, rows)}")
    if slow_host is not None:
        parts.append(launching(slow_host))
    return "\n\n".join(parts)


def launching(result: dict[str, Any]) -> str:
    """What the same blocks took where the processor could not launch kernels as fast as the GPU ran them."""
    times = {(r["block"], r["format"], r["contender"]): f"{r['ms']:.2f}" for r in result["results"] if "ms" in r}
    fast = "fp8_e4m3fn_scaled_fast"
    return (
        "These times hold where the processor launches kernels as fast as the GPU runs them. On another machine of the same "
        "kind, whose processor was busy and took twice as long, Wan's block took "
        f"{times['wan_14b', fast, 'lowbit']} ms in `{fast}`, and Qwen-Image's {times['qwen_image', fast, 'lowbit']} ms beside "
        f"{times['qwen_image', 'bf16', 'F.linear']} ms in bf16 and {times['qwen_image', fast, 'core']} ms by ComfyUI "
        "(`blocks_slow_host.json`)."
    )


def rate(rows: int, row: dict[str, Any]) -> str:
    """Bandwidth of weight bytes for few rows, arithmetic rate for many."""
    if rows <= 64:
        return f"{row['weight_bytes_per_second'] / 1e12:.2f} TB/s"
    return f"{row['tflops']:,.0f} TFLOP/s"
