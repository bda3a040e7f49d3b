"""Every loader on every tiny architecture, as a table: the graph, what is read from it, and which node loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.ops.formats import FORMATS

from . import graphs
from .graphs import Graph, Link

_PLAIN_LAST = sorted(FORMATS, key=lambda name: not FORMATS[name].fast)
EACH_STORAGE = tuple({FORMATS[name].storage: name for name in _PLAIN_LAST}.values())
"""One format of each way to store weights."""


def in_formats(*first: str, others: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(case, format) to test: the first cases of a kind in every format, the others in one of each way to store weights.

    They differ in which layers there are, not in how a layer multiplies.
    """
    pairs = [(name, format) for name in first for format in FORMATS]
    return pairs + [(name, format) for name in others for format in EACH_STORAGE]


UMT5 = graphs.conditioning_from_text(graphs.load_text_encoder("umt5.safetensors", "wan"))
QWEN25 = graphs.conditioning_from_text(graphs.load_text_encoder("qwen25_vl.safetensors", "qwen_image"))


@dataclass(frozen=True)
class Case:
    """One architecture through one loader.

    Attributes:
        graph: (format, seed) to the graph; format None takes core's loader: the reference.
        value: link to the tensor that is compared.
        loader: id of the loader node.
        decodes: whether the graph has a node `sample` whose latent can be decoded.
    """

    graph: Callable[[str | None, int], Graph]
    value: Link
    loader: str
    decodes: bool = True


def _diffusion(
    make: Callable[..., Graph], file: str, conditioning: Graph = UMT5, **options: bool
) -> Callable[[str | None, int], Graph]:
    return lambda format, seed: make(
        graphs.load_diffusion_model(f"{file}.safetensors", format), conditioning, seed=seed, **options
    )


def _text(file: str, type: str) -> Callable[[str | None, int], Graph]:
    return lambda format, seed: graphs.conditioning_from_text(
        graphs.load_text_encoder(f"{file}.safetensors", type, format), prompt="a red train " * seed
    )


def _infinitetalk(format: str | None, seed: int) -> Graph:
    model = graphs.load_diffusion_model("wan_i2v_infinitetalk.safetensors")
    return graphs.infinitetalk(model, graphs.load_model_patch("infinitetalk.safetensors", format), UMT5, seed=seed)


SAMPLED, ENCODED = ["sample", 0], ["positive", 0]
CASES: dict[str, Case] = {
    "wan_t2v": Case(_diffusion(graphs.wan_t2v, "wan_t2v"), SAMPLED, "model"),
    "wan_t2v_small": Case(
        _diffusion(graphs.wan_t2v, "wan_t2v_small", graphs.conditioning_random(32)), SAMPLED, "model"
    ),
    "wan_i2v_21": Case(_diffusion(graphs.wan_i2v, "wan_i2v_21", clip_vision=True), SAMPLED, "model"),
    "wan_i2v_22": Case(_diffusion(graphs.wan_i2v, "wan_i2v_22", clip_vision=False), SAMPLED, "model"),
    "qwen_image": Case(_diffusion(graphs.qwen_image, "qwen_image", QWEN25), SAMPLED, "model"),
    "infinitetalk": Case(_infinitetalk, SAMPLED, "patch"),
    "umt5": Case(_text("umt5", "wan"), ENCODED, "clip", decodes=False),
    "qwen25_vl": Case(_text("qwen25_vl", "qwen_image"), ENCODED, "clip", decodes=False),
}
