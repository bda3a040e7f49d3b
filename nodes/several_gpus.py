"""The node for several GPUs: one sample, each GPU with its part."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..host.dividing import AUTO, SPLITS, devices_of, divide
from .common import CATEGORY, show_text

log = logging.getLogger("lowbit.several_gpus")


class SeveralGPUs(io.ComfyNode):
    """Samples on several GPUs at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LowbitSeveralGPUs",
            display_name="Several GPUs (Lowbit)",
            category=CATEGORY,
            description=(
                "Divides every step of one sample over several GPUs of this machine, each with a copy of the model: Wan, "
                "InfiniteTalk and Qwen-Image, in any weight format of this pack. LoRAs, attention and memory nodes may come "
                "before or after it. What cannot be divided runs on one GPU and says so. Needs NVIDIA GPUs under Linux."
            ),
            search_aliases=["multi gpu", "multigpu", "parallel", "raylight", "xdit", "ulysses", "sequence parallel"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A diffusion model that Load Diffusion Model (Lowbit) or Load Diffusion Model has loaded from a file. "
                        "Each further GPU holds a copy of it."
                    ),
                ),
                io.String.Input(
                    "gpus",
                    default=AUTO,
                    tooltip=(
                        "auto: every GPU that ComfyUI sees. Or their numbers, such as 0, 1; the model's own is always one of "
                        "them. Unequal GPUs get unequal parts."
                    ),
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default=AUTO,
                    tooltip=(
                        "What is divided. sequence: the tokens of the picture or video; works always. cfg: the positive and the "
                        "negative prompt, on two GPUs; without effect at cfg 1. both: prompts between two halves "
                        "of the GPUs, tokens within each. auto: both where the GPUs are alike and even in number, else sequence."
                    ),
                ),
                io.Boolean.Input(
                    "eight_bit_exchange",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Keys and values travel between GPUs in 8 bits, a quarter less in all, for links that are slow. "
                        "The picture changes a little, in steps with exact attention too."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, which samples on all of them."),
            ],
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: io.Model.Type, gpus: str, split: str, eight_bit_exchange: bool = False) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def say(sentence: str) -> None:
            log.warning(sentence)
            show_text(node_id, sentence)

        return io.NodeOutput(
            divide(model, devices_of(gpus, model.load_device), split, say, eight_bits=eight_bit_exchange)
        )


NODES = [SeveralGPUs]
