"""The node for several GPUs: one sample, each GPU with its part."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..host.dividing import devices_of, divide
from ..host.several_gpus.hooks import AUTO, SPLITS
from .common import node_schema, show_text

log = logging.getLogger("lowbit.several_gpus")


class SeveralGPUs(io.ComfyNode):
    """Samples on several GPUs at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LowbitSeveralGPUs",
            search_aliases=["multi gpu", "multigpu", "parallel", "raylight", "xdit", "ulysses", "sequence parallel"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input("gpus", default=AUTO),
                io.Combo.Input("split", options=list(SPLITS), default=AUTO),
                io.Boolean.Input("eight_bit_exchange", default=False, advanced=True),
            ],
            outputs=[io.Model.Output(display_name="model")],
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
