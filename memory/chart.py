"""Draws a run's ledger: memory by component over time, with phases, steps, releases, the peak and the limit. Pillow only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .components import (
    AUDIO_ENCODER,
    COMPONENTS,
    DIFFUSION_MODEL,
    MODEL_PATCH,
    OTHER,
    SCRATCH,
    TEXT_ENCODER,
    VAE,
    size_text,
)
from .ledger import Run, Sample

WIDTH, HEIGHT = 1600, 900
_FINE = 2  # drawn this much larger, then scaled down: Pillow's lines are not smoothed
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 1304, 190, 790
_DASH = 9

_BACKGROUND, _PANEL, _GRID = "#0f1218", "#151a23", "#262d3a"
_TEXT, _QUIET = "#edf0f7", "#8b95a7"
_LIMIT, _PEAK, _RESERVED = "#ff5c6c", "#ffd166", "#aab4c8"
_COLOURS = {
    DIFFUSION_MODEL: "#4f8cff",
    TEXT_ENCODER: "#a06bff",
    VAE: "#2ec4b6",
    AUDIO_ENCODER: "#ff8fab",
    MODEL_PATCH: "#ff9f43",
    SCRATCH: "#e9d8a6",
    OTHER: "#5c677d",
}
_MEANING = {OTHER: "activations and the rest", SCRATCH: "this pack's buffers"}


@dataclass(frozen=True)
class _Scale:
    """From seconds and bytes to pixels."""

    seconds: float
    nbytes: float

    def x(self, seconds: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * seconds / self.seconds

    def y(self, nbytes: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * nbytes / self.nbytes


class _Pen:
    """Pillow's drawing in chart pixels, finer than the picture."""

    def __init__(self) -> None:
        self.picture = Image.new("RGB", (WIDTH * _FINE, HEIGHT * _FINE), _BACKGROUND)
        self._draw = ImageDraw.Draw(self.picture)

    def area(self, points: list[tuple[float, float]], colour: str) -> None:
        self._draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str, radius: float = 0) -> None:
        corners = [left * _FINE, top * _FINE, max(left, right) * _FINE, bottom * _FINE]
        self._draw.rounded_rectangle(corners, radius * _FINE, fill=colour)

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1.5) -> None:
        self._draw.line(
            [(x * _FINE, y * _FINE) for x, y in points], fill=colour, width=round(width * _FINE), joint="curve"
        )

    def dashes(self, y: float, colour: str) -> None:
        """A dashed line across the panel."""
        for start in range(_LEFT, _RIGHT, 2 * _DASH):
            self.line([(start, y), (min(start + _DASH, _RIGHT), y)], colour, 2)

    def text(self, x: float, y: float, text: str, size: float, colour: str = _TEXT, anchor: str = "la") -> None:
        self._draw.text((x * _FINE, y * _FINE), text, fill=colour, font=_font(size), anchor=anchor)

    def width(self, text: str, size: float) -> float:
        return _font(size).getlength(text) / _FINE

    def wrapped(self, text: str, size: float, room: float) -> list[str]:
        """The text in lines of at most this width."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.width(longer, size) > room and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def fitted(self, text: str, size: float, room: float) -> str:
        """The text, cut with an ellipsis; empty where not even that fits."""
        if self.width(text, size) <= room:
            return text
        while len(text) > 3 and self.width(text + "…", size) > room:
            text = text[:-1]
        return text + "…" if len(text) > 3 else ""


@lru_cache(maxsize=16)
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINE)


def draw(run: Run, device: str) -> Image.Image:
    """The chart as 1600 x 900 RGB."""
    pen = _Pen()
    samples = run.samples
    if len(samples) < 2:
        pen.text(_LEFT, 80, "No memory was measured", 30)
        pen.text(_LEFT, 126, "Put a Memory Manager (Lowbit) in front of the sampler.", 18, _QUIET)
        return _finished(pen)
    top = max(run.peak, max(sample.reserved for sample in samples), run.limit or 0)
    scale = _Scale(max(samples[-1].seconds, 1e-3), top * (1.2 if run.releases else 1.1))
    _header(pen, run, device)
    pen.box(_LEFT, _TOP, _RIGHT, _BOTTOM, _PANEL)
    _axes(pen, scale)
    _stack(pen, samples, scale)
    _lines(pen, run, scale)
    _nodes(pen, run, scale)
    _steps(pen, samples, scale)
    _releases(pen, run, scale)
    _legend(pen, run)
    return _finished(pen)


def _finished(pen: _Pen) -> Image.Image:
    return pen.picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _header(pen: _Pen, run: Run, device: str) -> None:
    pen.text(_LEFT, 34, "Memory by component", 30)
    pen.text(_LEFT, 76, device, 17, _QUIET)
    facts = [("peak", size_text(run.peak))]
    if run.limit is not None:
        facts.append(("limit", size_text(run.limit)))
    if run.seconds_per_step is not None:
        facts.append(("a step", f"{run.seconds_per_step:.2f} s"))
    facts.append(("in all", f"{run.samples[-1].seconds:.1f} s"))
    x: float = WIDTH - 40
    for label, value in reversed(facts):
        x -= max(pen.width(value, 26), pen.width(label, 15))
        pen.text(x, 34, value, 26)
        pen.text(x, 76, label, 15, _QUIET)
        x -= 44


def _axes(pen: _Pen, scale: _Scale) -> None:
    unit, name = (2**30, "GiB") if scale.nbytes >= 2**30 else (2**20, "MiB")
    for value in _ticks(scale.nbytes / unit, 6):
        y = scale.y(value * unit)
        pen.line([(_LEFT, y), (_RIGHT, y)], _GRID, 1)
        pen.text(_LEFT - 12, y, f"{value:g}", 15, _QUIET, "rm")
    pen.text(_LEFT - 12, _TOP - 14, name, 15, _QUIET, "rm")
    for value in _ticks(scale.seconds, 8):
        pen.text(scale.x(value), _BOTTOM + 34, f"{value:g} s", 15, _QUIET, "ma")


def _ticks(most: float, count: int) -> list[float]:
    """Round numbers from 0 to `most`."""
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * index, 10) for index in range(int(most / step) + 1)]


def _stack(pen: _Pen, samples: list[Sample], scale: _Scale) -> None:
    """One area a component, the large and lasting ones at the bottom."""
    floors = [0.0] * len(samples)
    for name in COMPONENTS:
        tops = [floor + sample.components.get(name, 0) for floor, sample in zip(floors, samples, strict=True)]
        if tops != floors:
            upper = [(scale.x(sample.seconds), scale.y(value)) for sample, value in zip(samples, tops, strict=True)]
            lower = [(scale.x(sample.seconds), scale.y(value)) for sample, value in zip(samples, floors, strict=True)]
            pen.area([*upper, *reversed(lower)], _COLOURS[name])
        floors = tops


def _lines(pen: _Pen, run: Run, scale: _Scale) -> None:
    reserved, peaks = [], []
    before = run.samples[0].seconds
    for sample in run.samples:
        start, end = scale.x(before), scale.x(sample.seconds)
        reserved.append((end, scale.y(sample.reserved)))
        peaks += [(start, scale.y(sample.peak)), (end, scale.y(sample.peak))]
        before = sample.seconds
    pen.line(reserved, _RESERVED, 1.5)
    pen.line(peaks, _PEAK, 2)
    if run.limit is not None:
        y = scale.y(run.limit)
        pen.dashes(y, _LIMIT)
        pen.text(_RIGHT - 6, y - 6, f"limit {size_text(run.limit)}", 15, _LIMIT, "rs")
    top = max(run.samples, key=lambda sample: sample.peak)
    label = f"peak {size_text(run.peak)}"
    x = min(max(scale.x(top.seconds), _LEFT + 6), _RIGHT - pen.width(label, 15) - 6)
    y = scale.y(run.peak)
    pen.box(x - 4, y - 26, x + pen.width(label, 15) + 4, y - 3, _PANEL, 4)
    pen.text(x, y - 8, label, 15, _PEAK, "ls")


def _nodes(pen: _Pen, run: Run, scale: _Scale) -> None:
    """A band above the panel: which node was at work."""
    spans: list[tuple[str, float, float]] = []
    for sample, following in zip(run.samples, [*run.samples[1:], run.samples[-1]], strict=True):
        if spans and spans[-1][0] == sample.node:
            spans[-1] = (sample.node, spans[-1][1], following.seconds)
        else:
            spans.append((sample.node, sample.seconds, following.seconds))
    for index, (node, start, end) in enumerate(spans):
        left, right = scale.x(start), scale.x(end)
        if right - left < 2:
            continue
        pen.box(left + 0.5, _TOP - 60, right - 0.5, _TOP - 32, "#2b3444" if index % 2 else "#222a37", 4)
        label = pen.fitted(run.nodes.get(node) or "between nodes", 14, right - left - 12)
        if label:
            pen.text((left + right) / 2, _TOP - 46, label, 14, _TEXT, "mm")


def _steps(pen: _Pen, samples: list[Sample], scale: _Scale) -> None:
    """A tick below the panel for each step, and the number where there is room."""
    last = -100.0
    if any(sample.steps for sample in samples):
        pen.text(_LEFT - 12, _BOTTOM + 10, "step", 13, _QUIET, "ra")
    for sample in samples:
        if not sample.steps:
            continue
        x = scale.x(sample.seconds)
        pen.line([(x, _BOTTOM), (x, _BOTTOM + 7)], _QUIET, 1)
        if x - last > 26:
            pen.text(x, _BOTTOM + 10, str(sample.step), 13, _TEXT, "ma")
            last = x


def _releases(pen: _Pen, run: Run, scale: _Scale) -> None:
    """A mark where components left the GPU, and what that gave back."""
    for index, release in enumerate(run.releases):
        x, y = scale.x(min(release.seconds, scale.seconds)), _TOP + 12 + 22 * (index % 4)
        pen.line([(x, _TOP), (x, _BOTTOM)], "#6ee7a8", 1)
        label = f"released {', '.join(release.names)}: {size_text(release.freed)} back"
        width = pen.width(label, 13)
        left = x + 8 if x + 16 + width < _RIGHT else x - 16 - width
        pen.box(left - 4, y - 2, left + width + 6, y + 17, "#11261c", 4)
        pen.text(left, y, label, 13, "#6ee7a8")


def _legend(pen: _Pen, run: Run) -> None:
    x, y = _RIGHT + 36.0, float(_TOP)
    pen.text(x, y, "at most", 15, _QUIET)
    y += 34
    for name in reversed(COMPONENTS):
        most = max(sample.components.get(name, 0) for sample in run.samples)
        if not most:
            continue
        pen.box(x, y + 3, x + 16, y + 19, _COLOURS[name], 3)
        pen.text(x + 28, y, name, 17)
        pen.text(x + 28, y + 22, f"{size_text(most)}{'  ' + _MEANING[name] if name in _MEANING else ''}", 13, _QUIET)
        y += 54
    y += 14
    for label, colour in (("peak between two samples", _PEAK), ("reserved", _RESERVED), ("limit", _LIMIT)):
        if label != "limit" or run.limit is not None:
            pen.line([(x, y + 9), (x + 18, y + 9)], colour, 2.5)
            pen.text(x + 28, y, label, 15, _QUIET)
            y += 30
    _remarks(pen, run, x, y + 20)
    share = 100 * run.measuring_steps_seconds / max(run.stepping_seconds, 1e-9)
    clearings = f", {run.clearings} clearings" if run.clearings else ""
    skipped = f", {run.skipped} of them not measured" if run.skipped else ""
    pen.text(
        _LEFT,
        HEIGHT - 46,
        f"{len(run.step_seconds)} steps{skipped}{clearings}; measuring took {share:.2f}% of a step",
        14,
        _QUIET,
    )
    pen.text(WIDTH - 40, HEIGHT - 46, "Lowbit memory report", 14, _QUIET, "ra")


def _remarks(pen: _Pen, run: Run, x: float, y: float) -> None:
    """What was out of the ordinary, as far as there is room for it."""
    for note in run.notes:
        lines = pen.wrapped(note, 13, WIDTH - 24 - x)
        if y + 18 * len(lines) > _BOTTOM + 60:
            break
        pen.box(x - 12, y - 2, x - 9, y + 18 * len(lines) - 2, _LIMIT)
        for line in lines:
            pen.text(x, y, line, 13)
            y += 18
        y += 12
