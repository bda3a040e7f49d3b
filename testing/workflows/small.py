"""Scales a prompt down for a CPU: frames, sizes and steps, and what a user would have drawn; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Prompt = dict[str, dict[str, Any]]

SIZE, STEPS, FRAMES = 64, 2, 5

INPUTS: Mapping[tuple[str, str], Any] = {
    ("EmptyHunyuanLatentVideo", "width"): SIZE,
    ("EmptyHunyuanLatentVideo", "height"): SIZE,
    ("EmptySD3LatentImage", "width"): SIZE,
    ("EmptySD3LatentImage", "height"): SIZE,
    ("WanImageToVideo", "width"): SIZE,
    ("WanImageToVideo", "height"): SIZE,
    ("WanInfiniteTalkToVideo", "length"): FRAMES,
    ("WanInfiniteTalkToVideo", "motion_frame_count"): 1,
    ("BasicScheduler", "steps"): STEPS,
    ("LowbitMemoryManager", "vram_limit_gib"): 0.0,
    ("TextGenerate", "max_length"): 8,
}
"""(class, input) -> value. The memory limit is that of a GPU, which the CPU has not."""

TITLES: Mapping[str, Any] = {
    "width": SIZE,
    "height": SIZE,
    "steps": 1,
    "int (steps)": STEPS,
    "int (split steps)": 1,
    "int (split_step)": 1,
    "float (duration)": 0.25,
}
"""Title of a primitive, in lower case -> its value. "Steps" is Qwen-Image's: when it edits, a step sees a whole megapixel
whatever the sizes say."""

MASKS: Mapping[str, str] = {"1": "mask_left.png", "2": "mask_right.png"}
"""Last figure in a mask painter's title -> the mask drawn."""


def scale_down(prompt: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """The prompt with the values above where they are not linked."""
    small = {}
    for key, node in prompt.items():
        inputs, title = dict(node["inputs"]), node["_meta"]["title"]
        for name, value in inputs.items():
            if isinstance(value, list):
                continue
            inputs[name] = INPUTS.get((node["class_type"], name), value)
            if node["class_type"].startswith("Primitive") and name == "value":
                inputs[name] = TITLES.get(title.lower(), value)
        if node["class_type"] == "Painter":
            inputs["mask"] = next(mask for figure, mask in MASKS.items() if figure in title)
        small[key] = {**node, "inputs": inputs}
    return small
