"""Every loader on every tiny architecture, as a table: the graph, what is read from it, and which node loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import graphs
from .graphs import Graph, Link

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


def _wan_t2v(format: str | None, seed: int) -> Graph:
    return graphs.wan_t2v(graphs.load_diffusion_model("wan_t2v.safetensors", format), UMT5, seed=seed)


def _wan_t2v_small(format: str | None, seed: int) -> Graph:
    model = graphs.load_diffusion_model("wan_t2v_small.safetensors", format)
    return graphs.wan_t2v(model, graphs.conditioning_random(32), seed=seed)


def _wan_i2v_21(format: str | None, seed: int) -> Graph:
    model = graphs.load_diffusion_model("wan_i2v_21.safetensors", format)
    return graphs.wan_i2v(model, UMT5, clip_vision=True, seed=seed)


def _wan_i2v_22(format: str | None, seed: int) -> Graph:
    model = graphs.load_diffusion_model("wan_i2v_22.safetensors", format)
    return graphs.wan_i2v(model, UMT5, clip_vision=False, seed=seed)


def _qwen_image(format: str | None, seed: int) -> Graph:
    return graphs.qwen_image(graphs.load_diffusion_model("qwen_image.safetensors", format), QWEN25, seed=seed)


def _infinitetalk(format: str | None, seed: int) -> Graph:
    model = graphs.load_diffusion_model("wan_i2v_infinitetalk.safetensors")
    return graphs.infinitetalk(model, graphs.load_model_patch("infinitetalk.safetensors", format), UMT5, seed=seed)


def _umt5(format: str | None, seed: int) -> Graph:
    clip = graphs.load_text_encoder("umt5.safetensors", "wan", format)
    return graphs.conditioning_from_text(clip, prompt="a red train " * seed)


def _qwen25_vl(format: str | None, seed: int) -> Graph:
    clip = graphs.load_text_encoder("qwen25_vl.safetensors", "qwen_image", format)
    return graphs.conditioning_from_text(clip, prompt="a red train " * seed)


CASES: dict[str, Case] = {
    "wan_t2v": Case(_wan_t2v, ["sample", 0], "model"),
    "wan_t2v_small": Case(_wan_t2v_small, ["sample", 0], "model"),
    "wan_i2v_21": Case(_wan_i2v_21, ["sample", 0], "model"),
    "wan_i2v_22": Case(_wan_i2v_22, ["sample", 0], "model"),
    "qwen_image": Case(_qwen_image, ["sample", 0], "model"),
    "infinitetalk": Case(_infinitetalk, ["sample", 0], "patch"),
    "umt5": Case(_umt5, ["positive", 0], "clip", decodes=False),
    "qwen25_vl": Case(_qwen25_vl, ["positive", 0], "clip", decodes=False),
}
