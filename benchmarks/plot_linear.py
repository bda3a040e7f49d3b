"""Draws benchmarks/results/linear.json as one SVG: speed over bf16 F.linear, ours beside comfy-kitchen's.

python benchmarks/plot_linear.py [--results benchmarks/results/linear.json] [--out benchmarks/results/linear.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PANELS = (
    ("wan_qkv", 32760, ("fp8_e4m3fn_scaled_fast", "int8_convrot_fast", "mxfp8_fast", "fp4_scaled_fast", "fp4_scaled")),
    (
        "qwen_mlp_up",
        4352,
        ("fp8_e4m3fn_scaled_fast", "int8_convrot_fast", "mxfp8_fast", "fp4_scaled_fast", "fp4_scaled"),
    ),
    ("decode", 1, ("fp8_e4m3fn_scaled", "int8", "mxfp8", "fp4_scaled", "int4_convrot_fast")),
    ("qwen_modulation", 1, ("fp8_e4m3fn_scaled", "int8", "mxfp8", "fp4_scaled", "int4_convrot_fast")),
)
COLOURS = {"lowbit": "#1b7f79", "comfy-kitchen": "#c7c7c7"}
WIDTH, BAR, GAP, LEFT, SCALE_WIDTH = 760, 13, 7, 190, 460


def _speedups(results: list[dict], case: str, m: int) -> tuple[dict[tuple[str, str], float], dict]:
    """Times of F.linear over each contender's on one case, and that case's record."""
    rows = [r for r in results if r["case"] == case and r["m"] == m and r["us"]]
    base = next(r for r in rows if r["contender"] == "F.linear")
    return {(r["format"], r["contender"]): base["us"] / r["us"] for r in rows}, base


def draw(record: dict) -> str:
    """The SVG's text."""
    environment, parts, y = record["environment"], [], 46
    for case, m, formats in PANELS:
        speedups, base = _speedups(record["results"], case, m)
        shown = [(f, c) for f in formats for c in COLOURS if (f, c) in speedups]
        most = max(1.0, *(speedups[key] for key in shown))
        title = f"{case.replace('_', ' ')}: M {m}, {base['k']} to {base['n']} (bf16 {base['us']:.0f} us)"
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        y += 8
        one = LEFT + SCALE_WIDTH / most
        top = y
        for name in formats:
            for contender, colour in COLOURS.items():
                if (name, contender) not in speedups:
                    continue
                value = speedups[name, contender]
                length = SCALE_WIDTH * value / most
                parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>')
                parts.append(f'<text x="{LEFT + length + 5:.1f}" y="{y + 11}">{value:.2f}</text>')
                if contender == "lowbit":
                    parts.append(f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{name}</text>')
                y += BAR
            y += GAP
        parts.append(
            f'<line x1="{one:.1f}" y1="{top}" x2="{one:.1f}" y2="{y - GAP}" stroke="#c0392b" stroke-width="1"/>'
        )
        y += 22
    legend = "".join(
        f'<rect x="{300 + 110 * i}" y="10" width="12" height="12" fill="{colour}"/>'
        f'<text x="{317 + 110 * i}" y="20">{name}</text>'
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    note = f"{environment.get('gpu', '')}, torch {environment['torch']}, {environment['date']}; red: bf16 F.linear"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-weight="bold">Speed over bf16</text>{legend}'
        f"{''.join(parts)}<text x='10' y='{y + 2}' fill='#666'>{note}</text></svg>\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "linear.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear.svg")
    arguments = parser.parse_args()
    arguments.out.write_text(draw(json.loads(arguments.results.read_text())))


if __name__ == "__main__":
    main()
