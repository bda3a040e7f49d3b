"""Every bundled workflow and the official template that it started from.

The files in workflows/ are edited in ComfyUI and saved from there (File > Export). The tests compare each with its template, run
it, and look it over in a browser; `python -m tools.thumbnails` draws its picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from testing import comfyui

from .unfold import Flat, Source, unfold
from .widgets import ObjectInfo

FOLDER = comfyui.CHECKOUT / "workflows"
TEMPLATES = "comfyui_workflow_templates_json"
INFINITETALK = "video_wan2_1_infinitetalk"


@dataclass(frozen=True)
class Workflow:
    """A bundled workflow.

    Attributes:
        title: what its thumbnail says.
        subtitle: and below that.
        template: the official template it started from.
        varies: how it differs from the template in files and settings, where it is meant to.
        adapt: makes the variant of the template that it is to be compared with.
        added: core's nodes that it has and the template has not; its picture is another one then.
    """

    title: str
    subtitle: str
    template: str
    varies: str = ""
    adapt: Callable[[Flat], None] | None = None
    added: tuple[str, ...] = ()


def official(name: str) -> dict[str, Any]:
    """An official template as saved. Raises FileNotFoundError when the installed package has none of this name."""
    return json.loads((resources.files(TEMPLATES) / "templates" / f"{name}.json").read_text(encoding="utf-8"))


def official_nodes(workflow: Workflow, info: ObjectInfo) -> Flat:
    """The template of a workflow, flat, its nodes named by their numbers alone; adapted where there is none of the very kind."""
    flat = unfold(official(workflow.template), info)
    short = {key: key.rpartition(":")[2] for key in flat}
    if len({*short.values()}) < len(flat):
        raise ValueError(f"{workflow.template} uses a node number twice")
    for node in flat.values():
        node.links = {entry: (short[source], slot) for entry, (source, slot) in node.links.items()}
    flat = {short[key]: node for key, node in flat.items()}
    if workflow.adapt is not None:
        workflow.adapt(flat)
    return flat


def _relink(flat: Flat, old: Source, new: Source) -> None:
    """Everything linked to output `old` is linked to `new`."""
    for node in flat.values():
        node.links = {name: new if source == old else source for name, source in node.links.items()}


def one_speaker(flat: Flat) -> None:
    """InfiniteTalk's template with one voice: the second voice, the masks and what joins the voices go."""
    for node in flat.values():
        if node.type == "WanInfiniteTalkToVideo":
            node.values["mode"] = "single_speaker"
            node.links = {name: source for name, source in node.links.items() if not name.startswith("mode.")}
        elif node.type == "ModelPatchLoader":
            node.values["name"] = node.values["name"].replace("_multi_", "_single_")
        elif node.type == "CLIPTextEncode":
            node.values["text"] = node.values["text"].replace("Two characters are", "A character is")
    voices, first = "113", "24"
    _relink(flat, (voices, 0), (first, 0))
    for key in (voices, "90", "93", "314", "174", "175"):
        del flat[key]


_TWINS = {
    "307": "13", "308": "16", "309": "29", "312": "14", "313": "25", "314": "93", "315": "112", "316": "26",
    "317": "179", "323": "306",
}  # fmt: skip
"""Nodes of the second part of InfiniteTalk's template that do what one of the first part does already."""


def share_models(flat: Flat) -> None:
    """Both parts use the models, prompt and voices of the first, as in the bundled workflows."""
    for twin, first in _TWINS.items():
        if flat.pop(twin, None) is not None:
            _relink(flat, (twin, 0), (first, 0))


WORKFLOWS: dict[str, Workflow] = {
    "wan2.2_14B_text_to_video": Workflow("Wan 2.2 14B", "Text to video, two models", "video_wan2_2_14B_t2v"),
    "wan2.2_14B_image_to_video": Workflow("Wan 2.2 14B", "Image to video, two models", "video_wan2_2_14B_i2v"),
    "fit_wan2.2_14B_in_16GB": Workflow(
        "Wan 2.2 14B in 16 GB",
        "Text to video, 4-bit weights",
        "video_wan2_2_14B_t2v",
        varies="16-bit files, stored in 4 bits",
    ),
    "qwen_image_text_to_image": Workflow("Qwen-Image", "Text to image", "image_qwen_image"),
    "qwen_image_rewrite_the_prompt": Workflow(
        "Rewrite the prompt", "then make the picture, Qwen-Image", "image_qwen_image", added=("TextGenerate",)
    ),
    "qwen_image_edit": Workflow("Qwen-Image-Edit", "Edit an image", "image_qwen_image_edit"),
    "quantize_qwen_image_once_and_save": Workflow(
        "Quantize once and save",
        "Qwen-Image in 8 bits",
        "image_qwen_image",
        varies="the 16-bit file, quantized and saved",
    ),
    "infinitetalk_single_speaker": Workflow("InfiniteTalk", "One speaker", INFINITETALK, adapt=one_speaker),
    "all_nodes": Workflow("Every node of the pack", "InfiniteTalk, one speaker", INFINITETALK, adapt=one_speaker),
    "infinitetalk_two_speakers": Workflow("InfiniteTalk", "Two speakers", INFINITETALK),
}
"""File name -> the workflow."""


def saved(name: str) -> dict[str, Any]:
    """A bundled workflow as its file has it."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
