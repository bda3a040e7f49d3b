"""The memory benchmark's cases: checkpoints of the real dimensions, and the graphs that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import CACHE, quantize, second_name, write_checkpoint
from testing import graphs, tiny
from testing.tiny import infinitetalk, qwen_image, text_encoders, vae, wan

QWEN_IMAGE = qwen_image.QwenImageConfig(heads=24, layers=60, joint=3584)
QWEN25 = text_encoders.Qwen25Config(3584, 18944, 28, 4, 28, 1280, 3420, 32)
WAN_14B = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=40, text=4096)
WAN_TALK = wan.WanConfig(dim=5120, ffn=13824, heads=40, layers=40, text=4096, in_channels=36, image_embedding=True)
UMT5 = text_encoders.Umt5Config(4096, 10240, 64, 64, 24, 256384)
TALK = infinitetalk.InfiniteTalkConfig(dim=5120, intermediate=512, out=768)


@dataclass(frozen=True)
class Scale:
    """How large everything is: the real thing, or tiny for a test of the script.

    Attributes:
        steps: of each sampler; None for the case's own.
        seconds: the most a graph may take.
    """

    tiny: bool
    steps: int | None
    prompts: int
    windows: int
    seconds: float = 240

    def pick(self, real: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.tiny else real


def copy_name(name: str) -> str:
    """Of the quantized copy of a model's file, where core's loaders look."""
    return f"{name.removesuffix('.safetensors')}_auto.safetensors"


def quantized_copies(models: Path, name: str) -> Iterator[Path]:
    """All that were made of a model's file, in any format."""
    return (models / CACHE).glob(f"{Path(name).stem}.*.safetensors")


@dataclass(frozen=True)
class Contender:
    """A way to run a graph.

    Attributes:
        weight_format: what the pack's loaders are asked for; None for core's loaders.
        managed: whether a memory manager stands behind each model.
        copies: whether core's loaders get the copies in format `auto`, by names of their own.
        attention: whether the pack's attention node stands behind each manager, with the budget `exact`.
    """

    name: str
    weight_format: str | None = None
    managed: bool = False
    copies: bool = False
    attention: bool = False

    @property
    def has_pack(self) -> bool:
        """Whether any of its nodes is the pack's."""
        return self.managed or self.weight_format is not None

    def file(self, name: str) -> str:
        """The name under which it loads a model's file."""
        return copy_name(name) if self.copies else name


STOCK = Contender("stock ComfyUI")
STOCK_COPIES = Contender("stock ComfyUI, files in format auto", copies=True)
MANAGED = Contender("memory manager, bf16 files", managed=True)
QUANTIZED = Contender("memory manager, format auto", "auto", True)
COMPLETE = Contender("memory manager, format auto, exact attention", "auto", True, attention=True)
CONTENDERS = (STOCK, STOCK_COPIES, MANAGED, QUANTIZED, COMPLETE)


@dataclass(frozen=True)
class Case:
    """A graph and its checkpoints.

    Attributes:
        files: what is read, below the models folder; the first `quantized` of them have a copy in format `auto`.
        vram: GPU sizes to run it at, in GiB; empty leaves the GPU alone.
        host: main memory, in GiB; None leaves it alone.
    """

    name: str
    write: Callable[[Path, Scale], None]
    graph: Callable[[Scale, Contender], graphs.Graph]
    files: tuple[str, ...]
    quantized: int
    vram: tuple[int, ...]
    host: int | None

    def quantize(self, models: Path) -> float | None:
        """Makes the copies that the loaders' `auto` would make; returns the seconds, None where none had to be made."""
        seconds = [quantize(models / name, models / CACHE) for name in self.files[: self.quantized]]
        return sum(taken for taken in seconds if taken is not None) or None

    def name_copies(self, models: Path) -> None:
        """Lets core's loaders find the quantized copies."""
        for name in self.files[: self.quantized]:
            newest = max(quantized_copies(models, name), key=lambda path: path.stat().st_mtime)
            second_name(models / copy_name(name), newest)

    def paths(self, models: Path) -> list[Path]:
        """Every file that a contender reads, as far as it is there."""
        sources = [models / name for name in self.files]
        copies = [path for name in self.files for path in quantized_copies(models, name)]
        return [path for path in [*sources, *copies] if path.exists()]


# --- checkpoints


def write_qwen(models: Path, scale: Scale) -> None:
    """The 20 B transformer, the 7 B text encoder and the VAE."""
    write_checkpoint(
        models / "diffusion_models/qwen_image.safetensors",
        qwen_image.shapes(scale.pick(QWEN_IMAGE, tiny.QWEN_IMAGE)),
    )
    encoder = text_encoders.qwen25_shapes(scale.pick(QWEN25, tiny.QWEN25))
    if not scale.tiny:
        encoder["lm_head.weight"] = (text_encoders.QWEN_VOCABULARY, QWEN25.width)
    write_checkpoint(models / "text_encoders/qwen25_vl.safetensors", encoder)
    write_vae(models, scale)


def write_vae(models: Path, scale: Scale) -> None:
    """The VAE that Wan 2.1, Wan 2.2 14B and Qwen-Image share."""
    write_checkpoint(models / "vae/wan_vae.safetensors", vae.shapes(scale.pick(96, 4)))


def write_umt5(models: Path, scale: Scale) -> None:
    """Wan's text encoder."""
    write_checkpoint(
        models / "text_encoders/umt5.safetensors",
        text_encoders.umt5_shapes(scale.pick(UMT5, tiny.UMT5)),
        extra={"spiece_model": text_encoders.sentencepiece_model(tiny.UMT5.vocabulary)},
    )


def write_wan(models: Path, scale: Scale) -> None:
    """Wan 2.2 14B's two models, UMT5 and the VAE. The second model is the first one's file under another name."""
    config = scale.pick(WAN_14B, tiny.WAN)
    high = models / "diffusion_models/wan_high.safetensors"
    write_checkpoint(high, wan.shapes(config), config.metadata())
    write_umt5(models, scale)
    write_vae(models, scale)
    second_name(high.with_name("wan_low.safetensors"), high)


def write_talk(models: Path, scale: Scale) -> None:
    """Wan 2.1 I2V 14B, the InfiniteTalk patch and the VAE."""
    config = scale.pick(WAN_TALK, infinitetalk.matching_wan(tiny.INFINITETALK))
    write_checkpoint(models / "diffusion_models/wan_talk.safetensors", wan.shapes(config), config.metadata())
    write_checkpoint(
        models / "model_patches/infinitetalk.safetensors", infinitetalk.shapes(scale.pick(TALK, tiny.INFINITETALK))
    )
    write_vae(models, scale)


# --- graphs


def managed(graph: graphs.Graph, sources: tuple[str, ...], contender: Contender) -> graphs.Graph:
    """The graph with a manager behind each model, and a report at its end, if the contender has them."""
    if not contender.managed:
        return graph
    for source in sources:
        manager, attention = f"manager_{source}", f"attention_{source}"
        entry = graphs.node("LowbitMemoryManager", model=[source, 0], vae=["vae", 0], **graphs.MEMORY_MANAGER)
        graph = graphs.between(graph, [source, 0], manager, entry)
        if contender.attention:
            choices = graphs.ATTENTION | {"error_budget": "exact"}
            entry = graphs.node("LowbitAttention", model=[manager, 0], **choices)
            graph = graphs.between(graph, [manager, 0], attention, entry)
    decoder = graph["images"]["inputs"]
    decoder["vae"] = [manager, 2]
    graph["report"] = graphs.node("LowbitMemoryReport", value=["images", 0])
    graph["json"] = graphs.node("PreviewAny", source=["report", 3])
    return graph


def finished(graph: graphs.Graph) -> graphs.Graph:
    """With an output that needs the images and shows nothing large."""
    return (
        graph
        | {"end": graphs.node("PreviewImage", images=["last", 0])}
        | {"last": graphs.node("ImageFromBatch", image=["images", 0], batch_index=0, length=1)}
    )


def qwen_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """Qwen-Image at 1328 x 1328, 20 steps."""
    graph = graphs.qwen_image(
        graphs.load_diffusion_model(contender.file("qwen_image.safetensors"), contender.weight_format),
        graphs.conditioning_from_text(
            graphs.load_text_encoder(contender.file("qwen25_vl.safetensors"), "qwen_image", contender.weight_format)
        ),
        size=scale.pick(1328, 64),
        steps=scale.steps or scale.pick(20, 3),
    )
    return finished(managed(graph | graphs.decode(), ("model",), contender))


def wan_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """Wan 2.2 14B at 832 x 480 x 81: the high-noise model takes the first half of the steps, the low-noise one the rest."""
    steps = scale.steps or scale.pick(20, 4)
    load, file, form = graphs.load_diffusion_model, contender.file, contender.weight_format
    graph = graphs.wan_t2v(
        load(file("wan_low.safetensors"), form),
        graphs.conditioning_from_text(graphs.load_text_encoder(file("umt5.safetensors"), "wan", form)),
        size=64,
        frames=scale.pick(81, 5),
        steps=steps,
    )
    graph["latent"]["inputs"] |= scale.pick({"width": 832, "height": 480}, {})
    graph["model_high"] = load(file("wan_high.safetensors"), form)
    shared = {key: value for key, value in graph["sample"]["inputs"].items() if key not in ("seed", "denoise", "model")}
    halves = {
        "sample_high": {
            "model": ["model_high", 0],
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": steps // 2,
        },
        "sample": {"model": ["model", 0], "add_noise": "disable", "start_at_step": steps // 2, "end_at_step": steps},
    }
    for name, half in halves.items():
        leftover = "enable" if name == "sample_high" else "disable"
        graph[name] = graphs.node(
            "KSamplerAdvanced", **(shared | half), noise_seed=1, return_with_leftover_noise=leftover
        )
    graph["sample"]["inputs"]["latent_image"] = ["sample_high", 0]
    return finished(managed(graph | graphs.decode(), ("model_high", "model"), contender))


def talk_graph(scale: Scale, contender: Contender) -> graphs.Graph:
    """InfiniteTalk: windows one after the other, each going on from the frames of the one before."""
    graph = graphs.infinitetalk(
        graphs.load_diffusion_model("wan_talk.safetensors", contender.weight_format),
        graphs.load_model_patch("infinitetalk.safetensors", contender.weight_format),
        graphs.conditioning_random(width=scale.pick(WAN_TALK.text, 256)),
        frames=scale.pick(81, 5),
        steps=scale.steps or scale.pick(4, 1),
    )
    graph["talk"]["inputs"] |= scale.pick({"width": 832, "height": 480}, {})
    graph["audio"]["inputs"]["frames"] = scale.pick(4000, 400)
    graph["images"] = graphs.node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    frames = ["images", 0]
    for index in range(1, scale.windows):
        talk = dict(graph["talk"]["inputs"]) | {"previous_frames": frames}
        sample = dict(graph["sample"]["inputs"])
        sample |= {
            "model": [f"talk_{index}", 0],
            "positive": [f"talk_{index}", 1],
            "negative": [f"talk_{index}", 2],
            "latent_image": [f"talk_{index}", 3],
        }
        graph[f"talk_{index}"] = graphs.node("WanInfiniteTalkToVideo", **talk)
        graph[f"sample_{index}"] = graphs.node("KSampler", **sample)
        graph[f"images_{index}"] = graphs.node("VAEDecode", samples=[f"sample_{index}", 0], vae=["vae", 0])
        frames = [f"images_{index}", 0]
    graph = managed(graph, ("model",), contender)
    if "report" in graph:
        graph["report"]["inputs"]["value"] = frames
    out = finished(graph)
    out["last"]["inputs"]["image"] = frames
    return out


VAE = "vae/wan_vae.safetensors"
QWEN_FILES = ("diffusion_models/qwen_image.safetensors", "text_encoders/qwen25_vl.safetensors", VAE)
WAN_FILES = (
    "diffusion_models/wan_high.safetensors",
    "diffusion_models/wan_low.safetensors",
    "text_encoders/umt5.safetensors",
    VAE,
)
TALK_FILES = ("diffusion_models/wan_talk.safetensors", "model_patches/infinitetalk.safetensors", VAE)

CASES = {
    case.name: case
    for case in (
        Case("qwen_image", write_qwen, qwen_graph, QWEN_FILES, 2, (32, 24, 16), 60),
        Case("wan_2_2", write_wan, wan_graph, WAN_FILES, 3, (24, 16), 64),
    )
}
LONG = {
    case.name: case
    for case in (
        Case("50_generations", write_qwen, qwen_graph, QWEN_FILES, 0, (), None),
        Case("infinitetalk", write_talk, talk_graph, TALK_FILES, 0, (), None),
        Case("overhead", write_qwen, qwen_graph, QWEN_FILES, 0, (), None),
    )
}
ALL = CASES | LONG
