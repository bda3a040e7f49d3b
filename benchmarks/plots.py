"""Draws the charts of docs/benchmarks.md beside the results that they show: python -m benchmarks.plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from benchmarks.shown import RESULTS, where

WIDTH, BAR, GAP, LEFT, LENGTH = 860, 13, 7, 300, 400
FAST = ("fp8_e4m3fn_scaled_fast", "int8_convrot_fast", "mxfp8_fast", "fp4_scaled_fast", "fp4_scaled")
FEW_ROWS = ("fp8_e4m3fn_scaled", "int8", "mxfp8", "fp4_scaled", "int4_convrot_fast")
PRODUCTS = (
    ("wan_qkv", 32760, FAST),
    ("qwen_mlp_up", 4352, FAST),
    ("decode", 1, FEW_ROWS),
    ("qwen_modulation", 1, FEW_ROWS),
)
"""Case, rows and formats of each panel of the linears."""


@dataclass(frozen=True)
class Bar:
    """One bar: whose it is, its length, and what stands behind it."""

    owner: str
    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    """Groups of bars under one title, on one scale; a line marks 1."""

    title: str
    groups: Mapping[str, Sequence[Bar]]


def draw(title: str, colours: Mapping[str, str], panels: Sequence[Panel], note: str) -> str:
    """The SVG's text. colours: of each owner of bars, for the legend."""
    parts, y = [], 46
    for panel in panels:
        most = max(1.0, *(bar.value for bars in panel.groups.values() for bar in bars))
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(panel.title)}</text>')
        y += 8
        top = y
        for name, bars in panel.groups.items():
            middle = y + BAR * len(bars) / 2 + 4
            parts.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
            for bar in bars:
                length = LENGTH * bar.value / most
                parts.append(
                    f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colours[bar.owner]}"/>'
                    f'<text x="{LEFT + length + 5:.1f}" y="{y + 11}">{escape(bar.text)}</text>'
                )
                y += BAR
            y += GAP
        one = LEFT + LENGTH / most
        parts.append(f'<line x1="{one:.1f}" y1="{top}" x2="{one:.1f}" y2="{y - GAP}" stroke="#222"/>')
        y += 22
    legend = "".join(
        f'<rect x="{LEFT + 140 * index}" y="10" width="12" height="12" fill="{colour}"/>'
        f'<text x="{LEFT + 17 + 140 * index}" y="20">{name}</text>'
        for index, (name, colour) in enumerate(colours.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-weight="bold">{title}</text>{legend}'
        f'{"".join(parts)}<text x="10" y="{y + 2}" fill="#666">{escape(note)}</text></svg>\n'
    )


def linear(record: dict[str, Any]) -> str:
    """Speed over bf16 F.linear, ours beside comfy-kitchen's."""
    panels, colours = [], {"lowbit": "#1b7f79", "comfy-kitchen": "#c7c7c7"}
    for case, m, formats in PRODUCTS:
        rows = {
            (r["format"], r["contender"]): r for r in record["results"] if (r["case"], r["m"]) == (case, m) and r["us"]
        }
        base = rows["bf16", "F.linear"]
        groups = {}
        for name in formats:
            speeds = {owner: base["us"] / rows[name, owner]["us"] for owner in colours if (name, owner) in rows}
            groups[name] = [Bar(owner, value, f"{value:.2f}") for owner, value in speeds.items()]
        title = f"{case.replace('_', ' ')}: M {m}, {base['k']} to {base['n']} (bf16 {base['us']:.0f} us)"
        panels.append(Panel(title, groups))
    return draw("Speed over bf16", colours, panels, f"{where(record)}; line: bf16 F.linear")


def attention(record: dict[str, Any]) -> str:
    """How many times as fast as ComfyUI's default `auto` is, by shape, under two budgets."""
    colours = {"auto, exact": "#4c78a8", "auto, fast": "#e45756"}
    groups = {}
    for row in record["shapes"]:
        chosen = {owner: row["budgets"][owner.removeprefix("auto, ")] for owner in colours}
        groups[row["name"]] = [
            Bar(owner, entry["speedup_over_core"], f"{entry['speedup_over_core']:.2f}  {entry['chosen']}")
            for owner, entry in chosen.items()
        ]
    panel = Panel("Times as fast as ComfyUI's default attention, by shape", groups)
    return draw("Attention", colours, [panel], f"{where(record)}, Gaussian data; line: ComfyUI's default")


def main() -> None:
    """Draws both."""
    for name, chart in (("linear", linear), ("attention", attention)):
        text = chart(json.loads((RESULTS / f"{name}.json").read_text()))
        (RESULTS / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
