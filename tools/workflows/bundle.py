"""Every bundled workflow: file name -> the official template it starts from, and the function that designs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import infinitetalk, qwen_image, wan
from .compose import Design
from .unfold import Flat
from .widgets import ObjectInfo


@dataclass(frozen=True)
class Workflow:
    """A bundled workflow.

    Attributes:
        title: what its thumbnail says.
        subtitle: and below that.
        template: the official template it starts from.
        design: makes it.
        varies: how it differs from the template in files and settings, where it is meant to.
        adapt: makes the variant of the template that it is to be compared with.
        added: core's nodes that it has and the template has not; its picture is another one then.
    """

    title: str
    subtitle: str
    template: str
    design: Callable[[ObjectInfo], Design]
    varies: str = ""
    adapt: Callable[[Flat], None] | None = None
    added: tuple[str, ...] = ()


WORKFLOWS: dict[str, Workflow] = {
    "wan2.2_14B_text_to_video": Workflow(
        "Wan 2.2 14B", "Text to video, two models", wan.TEXT_TO_VIDEO, wan.text_to_video
    ),
    "wan2.2_14B_image_to_video": Workflow(
        "Wan 2.2 14B", "Image to video, two models", wan.IMAGE_TO_VIDEO, wan.image_to_video
    ),
    "fit_wan2.2_14B_in_16GB": Workflow(
        "Wan 2.2 14B in 16 GB",
        "Text to video, 4-bit weights",
        wan.TEXT_TO_VIDEO,
        wan.in_16_gb,
        varies="16-bit files, stored in 4 bits",
    ),
    "qwen_image_text_to_image": Workflow(
        "Qwen-Image", "Text to image", qwen_image.TEXT_TO_IMAGE, qwen_image.text_to_image
    ),
    "qwen_image_rewrite_the_prompt": Workflow(
        "Rewrite the prompt",
        "then make the picture, Qwen-Image",
        qwen_image.TEXT_TO_IMAGE,
        qwen_image.rewrite_the_prompt,
        added=("TextGenerate",),
    ),
    "qwen_image_edit": Workflow("Qwen-Image-Edit", "Edit an image", qwen_image.EDIT, qwen_image.image_edit),
    "quantize_qwen_image_once_and_save": Workflow(
        "Quantize once and save",
        "Qwen-Image in 8 bits",
        qwen_image.TEXT_TO_IMAGE,
        qwen_image.quantize_and_save,
        varies="the 16-bit file, quantized and saved",
    ),
    "infinitetalk_single_speaker": Workflow(
        "InfiniteTalk",
        "One speaker",
        infinitetalk.TEMPLATE,
        infinitetalk.single_speaker,
        adapt=infinitetalk.one_speaker,
    ),
    "all_nodes": Workflow(
        "Every node of the pack",
        "InfiniteTalk, one speaker",
        infinitetalk.TEMPLATE,
        infinitetalk.all_nodes,
        adapt=infinitetalk.one_speaker,
    ),
    "infinitetalk_two_speakers": Workflow(
        "InfiniteTalk", "Two speakers", infinitetalk.TEMPLATE, infinitetalk.two_speakers
    ),
}
