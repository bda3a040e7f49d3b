"""The trained model's clips in a format: how near they are to bf16's, whether they show what was asked, and their pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from .contact_sheet import contact_sheet, side_by_side
from .recognition import recognise
from .report import Row
from .shapes import Scene

MODEL = "Moving shapes (trained)"
REFERENCE = "none"
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
        clips: what was made, (frames, height, width, 3) in [0, 1], one for each scene.
        psnr: of each clip against bf16's with the same seed, dB; empty for bf16 itself.
        recognised: how many clips show the colour, the shape and the direction of their prompt.
        seconds: sampling and decoding all of them, quantizing included.
        disk_bytes: the transformer's file that was loaded.
        resident_bytes: what the loaded transformer's tensors hold; with a GPU, what ComfyUI counts as loaded there.
        problem: why there are no clips, else empty.
    """

    clips: list[torch.Tensor]
    psnr: list[float]
    recognised: int
    seconds: float
    disk_bytes: int | None = None
    resident_bytes: int | None = None
    problem: str = ""

    @property
    def text(self) -> str:
        """The result in a few words."""
        near = f"{fmean(self.psnr):.1f} dB, " if self.psnr else ""
        return f"{near}{self.recognised} of {len(self.clips)} as asked, {self.seconds:.1f} s"

    def row(self, name: str) -> Row:
        """The format's row of the demo's table."""
        if self.problem:
            return Row(MODEL, name, problem=self.problem)
        return Row(
            MODEL,
            name,
            self.disk_bytes,
            self.resident_bytes,
            first_seconds=self.seconds,
            psnr=fmean(self.psnr) if self.psnr else None,
            recognised=f"{self.recognised} of {len(self.clips)}",
        )


def judge(
    clips: list[torch.Tensor],
    reference: Sequence[torch.Tensor],
    scenes: Sequence[Scene],
    seconds: float,
    disk_bytes: int,
    resident_bytes: int,
) -> Quality:
    """The quality of clips of `scenes`, beside bf16's; `reference` is empty for bf16's own."""
    near = [psnr(*pair) for pair in zip(clips, reference, strict=True)] if reference else []
    shown = sum(recognise(clip) == scene for clip, scene in zip(clips, scenes, strict=True))
    return Quality(clips, near, shown, seconds, disk_bytes, resident_bytes)


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of clips in [0, 1], dB."""
    return -10 * math.log10(max(float((clip.double() - reference.double()).square().mean()), 1e-12))


def title(name: str) -> str:
    """What to call a format beside its clips."""
    return "bf16" if name == REFERENCE else name


def draw(out: Path, found: Mapping[str, Quality], scenes: Sequence[Scene] = SHOWN) -> None:
    """The contact sheet and the animation shapes.webp of the first scenes, as far as there are clips."""
    made = {title(name): quality for name, quality in found.items() if quality.clips}
    if not made:
        return
    notes = {
        name: f"{fmean(quality.psnr):.1f} dB" if quality.psnr else "the reference" for name, quality in made.items()
    }
    contact_sheet(
        out / SHEET,
        {name: quality.clips[: len(SHOWN)] for name, quality in made.items()},
        notes,
        [scene.prompt() for scene in scenes[: len(SHOWN)]],
    )
    side_by_side(out / "shapes.webp", {name: quality.clips[0] for name, quality in made.items()})
