"""The trained model's clips in a format: how near they are to bf16's, whether they show what was asked, and their pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from .contact_sheet import contact_sheet, side_by_side
from .recognition import recognise
from .report import Make, Row, in_each_format, title
from .shapes import Scene

MODEL = "Moving shapes (trained)"
FOLDER = Path(__file__).resolve().parent / "trained"
VAE, TEXT_ENCODER, TRANSFORMER = "shapes_vae.safetensors", "shapes_umt5.safetensors", "shapes_t2v.safetensors"
"""Its files in FOLDER."""
SHOWN = (
    Scene("red", "square", "left"),
    Scene("green", "triangle", "up"),
    Scene("blue", "circle", "right"),
    Scene("yellow", "square", "down"),
)
SHEET = "shapes.png"


@dataclass(frozen=True)
class Quality:
    """One format's clips.

    Attributes:
        row: the format's, with what is told here.
        clips: what was made, (frames, height, width, 3) in [0, 1], one for each scene.
        psnr: of each clip against bf16's with the same seed, dB; empty for bf16 itself.
        recognised: how many clips show the colour, the shape and the direction of their prompt.
    """

    row: Row
    clips: Sequence[torch.Tensor] = ()
    psnr: Sequence[float] = ()
    recognised: int = 0

    @property
    def text(self) -> str:
        """The result in a few words."""
        near = f"{fmean(self.psnr):.1f} dB, " if self.psnr else ""
        return f"{near}{self.recognised} of {len(self.clips)} as asked, {self.row.first_seconds:.1f} s"


def qualities(formats: Sequence[str], make: Make, scenes: Sequence[Scene]) -> Iterator[Quality]:
    """The clips of `scenes` that `make` makes in bf16 and in every format."""
    reference: Sequence[torch.Tensor] = ()
    for clips, row, progress in in_each_format(MODEL, formats, make):
        if row.problem:
            yield Quality(row)
            continue
        quality = judge(row, clips, reference, scenes)
        reference = reference or clips
        progress.finish(quality.text)
        yield quality


def judge(
    row: Row, clips: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], scenes: Sequence[Scene]
) -> Quality:
    """The quality of clips of `scenes`, beside bf16's; `reference` is empty for bf16's own."""
    near = [psnr(*pair) for pair in zip(clips, reference, strict=True)] if reference else []
    shown = sum(recognise(clip) == scene for clip, scene in zip(clips, scenes, strict=True))
    row = replace(row, psnr=fmean(near) if near else None, recognised=f"{shown} of {len(clips)}")
    return Quality(row, clips, near, shown)


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of clips in [0, 1], dB."""
    return -10 * math.log10(max(float((clip.double() - reference.double()).square().mean()), 1e-12))


def draw(out: Path, found: Iterable[Quality]) -> None:
    """The contact sheet of the clips of `SHOWN`, the first ones, and the animation shapes.webp, as far as there are clips."""
    made = {title(quality.row.format): quality for quality in found if quality.clips}
    if not made:
        return
    notes = {name: f"{quality.row.psnr:.1f} dB" if quality.psnr else "the reference" for name, quality in made.items()}
    contact_sheet(
        out / SHEET,
        {name: quality.clips[: len(SHOWN)] for name, quality in made.items()},
        notes,
        [scene.prompt() for scene in SHOWN],
    )
    side_by_side(out / "shapes.webp", {name: quality.clips[0] for name, quality in made.items()})
