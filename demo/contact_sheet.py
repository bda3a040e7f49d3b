"""Draws clips side by side: a contact sheet of frames, and one animation of a clip in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

Clip = torch.Tensor
"""(frames, height, width, 3) in [0, 1]."""

_PAPER, _INK, _FAINT = "#0d0f14", "#f2f2f2", "#9aa4b2"
_GAP = 4
_LABEL_WIDTH, _HEAD = 250, 26
_SCALE = 2
_SHOWN = (0, 6, 12)
_COLUMNS, _TITLE = 4, 20


def contact_sheet(
    path: Path, rows: Mapping[str, Sequence[Clip]], notes: Mapping[str, str], titles: Sequence[str]
) -> None:
    """Writes a PNG: a row for each format with its note, a column for each clip, of which it shows first, middle and last frame.

    Args:
        rows: format to its clips, all in the order of `titles`.
        notes: format to a few words below its name.
        titles: what the clips should show.
    """
    size = next(iter(rows.values()))[0].shape[1]
    width = len(_SHOWN) * size + 3 * _GAP
    canvas = Image.new("RGB", (_LABEL_WIDTH + len(titles) * width, _HEAD + len(rows) * (size + _GAP)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((_LABEL_WIDTH + column * width, 6), title, _INK, ImageFont.load_default(13))
    for line, (name, clips) in enumerate(rows.items()):
        top = _HEAD + line * (size + _GAP)
        draw.text((8, top + 14), name, _INK, ImageFont.load_default(15))
        draw.text((8, top + 36), notes.get(name, ""), _FAINT, ImageFont.load_default(12))
        for column, clip in enumerate(clips):
            for place, frame in enumerate(_SHOWN):
                canvas.paste(_picture(clip[frame]), (_LABEL_WIDTH + column * width + place * (size + 1), top))
    canvas.save(path)


def side_by_side(path: Path, clips: Mapping[str, Clip]) -> None:
    """Writes an animated WebP: one clip in every format at once, four to a row, each under its name."""
    size = _SCALE * next(iter(clips.values())).shape[1]
    lines = -(-len(clips) // _COLUMNS)
    frames = []
    for frame in range(len(next(iter(clips.values())))):
        canvas = Image.new("RGB", (_COLUMNS * (size + _GAP), lines * (size + _TITLE + _GAP)), _PAPER)
        draw = ImageDraw.Draw(canvas)
        for index, (name, clip) in enumerate(clips.items()):
            left, top = index % _COLUMNS * (size + _GAP), index // _COLUMNS * (size + _TITLE + _GAP)
            draw.text((left + 4, top + 4), name, _INK, ImageFont.load_default(11))
            canvas.paste(_picture(clip[frame]).resize((size, size), Image.Resampling.NEAREST), (left, top + _TITLE))
        frames.append(canvas)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=140, loop=0, quality=90)


def _picture(frame: torch.Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
