"""The Wan 2.2 workflows: text to video, image to video, and text to video in 16 GB."""

from __future__ import annotations

from dataclasses import dataclass

from . import edit
from .compose import Design, Exposed, Subgraph
from .layout import Box, column, row
from .unfold import Flat
from .widgets import ObjectInfo

TEXT_TO_VIDEO = "video_wan2_2_14B_t2v"
IMAGE_TO_VIDEO = "video_wan2_2_14B_i2v"

ABOUT = """\
{template} of ComfyUI's own templates, with the same files and settings. Two models share the steps: one for high \
noise, one for low.

- **Load ...**: `format` quantizes a 16-bit file while it loads. An FP8 file is taken as it is.
- **Attention**: the fastest backend that is accurate enough for each shape.
- **Memory Manager**: keeps models, text encoder and VAE within the card, and shows it live.
- **Release Component**, inside *Sample*: between the two models the text encoder leaves the GPU.
- **Reports**: which attention ran, and where the memory went.

Inside *Sample*: the samplers, and the Lightning LoRAs for 4 steps instead of 20."""

ABOUT_16GB = """\
Wan 2.2 14B text to video for cards with 16 GB. What differs from *wan2.2_14B_text_to_video*:

- the 16-bit files, stored in **4 bits** while they load: some 8 GB for each model instead of 28. On an RTX 50 choose \
`fp4_scaled_fast`.
- **Memory Manager**: `balanced`, at most 15 GiB: only the model at work is on the GPU. Set the limit to 0 for the \
whole card.
- **VAE** in bf16.
- **Release Component**, inside *Sample*: the first model makes room for the second, and both for the decode.

The first run writes the 4-bit files to models/lowbit_cache; later runs load them."""

_CHANNEL = 420
"""Height, inside the sampler, of the gap through which the prompts and the latent reach both samplers."""


@dataclass(frozen=True)
class _Numbers:
    """What the nodes are called in a template."""

    high: str
    low: str
    clip: str
    vae: str
    positive: str
    negative: str
    lora: tuple[str, str]
    switch: tuple[str, str]
    sampling: tuple[str, str]
    sample: tuple[str, str]
    steps: tuple[str, str, str]
    split: tuple[str, str, str]
    cfg: tuple[str, str, str]
    lightning: str
    duration: str
    fps: str
    length: str
    decode: str
    video: str
    save: str


_TEXT = _Numbers(
    high="75", low="76", clip="71", vae="73", positive="89", negative="72", lora=("83", "85"), switch=("120", "121"),
    sampling=("82", "86"), sample=("81", "78"), steps=("114", "117", "122"), split=("115", "118", "123"),
    cfg=("116", "119", "124"), lightning="129", duration="126", fps="125", length="127", decode="87", video="88",
    save="80",
)  # fmt: skip
_IMAGE = _Numbers(
    high="95", low="96", clip="84", vae="90", positive="93", negative="89", lora=("101", "102"), switch=("116", "117"),
    sampling=("104", "103"), sample=("86", "85"), steps=("128", "118", "119"), split=("127", "124", "125"),
    cfg=("126", "122", "120"), lightning="131", duration="161", fps="162", length="163", decode="87", video="94",
    save="108",
)  # fmt: skip

_LATENT, _START, _PICTURE = "74", "98", "97"

_HEIGHTS = {
    "positive": 150, "negative": 60, "chart": 240, "report_high": 160,
    "report_low": 160, "memory_report": 220,
}  # fmt: skip


def text_to_video(info: ObjectInfo) -> Design:
    """Wan 2.2 14B text to video."""
    flat = edit.official_nodes(TEXT_TO_VIDEO, info)
    return _text_to_video("wan2.2_14B_text_to_video", flat, ABOUT.format(template=f"*{TEXT_TO_VIDEO}*"))


def in_16_gb(info: ObjectInfo) -> Design:
    """Wan 2.2 14B text to video with 4-bit weights and a memory budget."""
    flat = edit.official_nodes(TEXT_TO_VIDEO, info)
    n = _TEXT
    for key in (n.high, n.low):
        name = flat[key].values["unet_name"]
        edit.rename_file(flat, key, "unet_name", name.replace("fp8_scaled", "fp16"))
    release = edit.own("LowbitReleaseComponent", "Release the models", text_encoder=True, diffusion_model=True)
    edit.insert(flat, "release_models", release, "value", (n.sample[1], 0))
    design = _text_to_video("fit_wan2.2_14B_in_16GB", flat, ABOUT_16GB)
    for key in (n.high, n.low):
        flat[key].values["format"] = "int4_asym_fast"
    flat[n.vae].values["precision"] = "bf16"
    for key in ("memory_high", "memory_low"):
        flat[key].values |= {"policy": "balanced", "vram_limit_gib": 15.0}
    flat["release"].title = "Release the first model"
    flat["release"].values["diffusion_model"] = True
    return design


def _text_to_video(name: str, flat: Flat, about: str) -> Design:
    n, latent = _TEXT, _LATENT
    size = [
        *_length_widgets(n),
        Exposed("width", ((latent, "width"),)),
        Exposed("height", ((latent, "height"),)),
    ]
    return _design(name, flat, n, latent, size, about)


def image_to_video(info: ObjectInfo) -> Design:
    """Wan 2.2 14B image to video."""
    flat, n = edit.official_nodes(IMAGE_TO_VIDEO, info), _IMAGE
    edit.retitle(flat, n97="First frame")
    size = [
        *_length_widgets(n),
        Exposed("width", ((_START, "width"),)),
        Exposed("height", ((_START, "height"),)),
    ]
    about = ABOUT.format(template=f"*{IMAGE_TO_VIDEO}*")
    return _design("wan2.2_14B_image_to_video", flat, n, _START, size, about, image=_PICTURE)


def _length_widgets(n: _Numbers) -> list[Exposed]:
    return [
        Exposed("duration in seconds", ((n.duration, "value"),)),
        Exposed("frames per second", ((n.fps, "value"),)),
    ]


def _design(
    name: str, flat: Flat, n: _Numbers, latent: str, size: list[Exposed], about: str, image: str | None = None
) -> Design:
    """The whole workflow; `latent` makes the first latent, `image` loads the first frame."""
    edit.lowbit_loaders(flat)
    _manage(flat, n)
    release = edit.own("LowbitReleaseComponent", "Release the text encoder")
    edit.insert(flat, "release", release, "value", (n.sample[0], 0))
    _report(flat, n)
    titles = {n.high: "High noise model", n.low: "Low noise model", n.clip: "Text encoder", n.vae: "VAE"}
    titles |= {n.positive: "Prompt", n.negative: "Negative prompt"}
    for key, title in titles.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    before_decode = [key for key in ("release_models",) if key in flat]
    generate = Subgraph(
        "Sample: high noise, then low noise",
        _inside(n, latent, before_decode),
        inputs={
            "high noise model": ("memory_high", 0),
            "low noise model": ("memory_low", 0),
            "positive": (n.positive, 0),
            "negative": (n.negative, 0),
            **({"first frame": (image, 0)} if image else {}),
            "vae": ("memory_low", 2),
        },
        outputs={
            "low noise model": (n.sampling[1], 0),
            "high noise model": (n.sampling[0], 0),
            "video": (n.video, 0),
        },
        widgets=[
            *size,
            Exposed("noise_seed", ((n.sample[0], "noise_seed"),)),
            Exposed("4 steps (Lightning LoRA)", ((n.lightning, "value"),)),
            Exposed("high noise LoRA", ((n.lora[0], "lora_name"),)),
            Exposed("low noise LoRA", ((n.lora[1], "lora_name"),)),
        ],
        level=_CHANNEL,
    )
    below = (image,) if image else ()
    routes = {
        ("generate", "vae"): (
            *([f"before {n.negative}"] if below else []),
            f"around {n.negative} {' '.join(below)}",
        ),
        ("report_low", "model"): ("over report_high",),
    }
    names = {"positive": n.positive, "negative": n.negative}
    heights = {names.get(key, key): height for key, height in _HEIGHTS.items()}
    heights |= {image: 240} if image else {}
    return Design(name, flat, _root(n, below), {"generate": generate}, routes, extra_heights=heights)


def _root(n: _Numbers, below: tuple[str, ...]) -> Box:
    """The root graph from left to right; `below` stands between the prompts and the sampler."""
    height = 480
    return row(
        column("about", "files"),
        column(n.high, n.low, title="Models"),
        column(
            row("attention_high", "memory_high"),
            "attention_low",
            row(column(n.clip, n.vae), "memory_low"),
            title="Faster, in less memory",
        ),
        row(
            row(column(n.positive, n.negative, *below), title="Prompt", above=900),
            column("generate", above=height),
            gap=280,
        ),
        row(
            "report_high",
            "report_low",
            "memory_report",
            column(n.save, "chart"),
            title="Video and reports",
            above=height,
        ),
    )


def _manage(flat: Flat, n: _Numbers) -> None:
    """Attention and memory nodes behind both models; the second manager takes text encoder and VAE too."""
    for name, loader in (("high", n.high), ("low", n.low)):
        attention = edit.insert(flat, f"attention_{name}", edit.own("LowbitAttention"), "model", (loader, 0))
        edit.insert(flat, f"memory_{name}", edit.own("LowbitMemoryManager"), "model", attention)
    edit.relink(flat, (n.clip, 0), ("memory_low", 1))
    edit.relink(flat, (n.vae, 0), ("memory_low", 2))
    flat["memory_low"].links |= {"clip": (n.clip, 0), "vae": (n.vae, 0)}


def _report(flat: Flat, n: _Numbers) -> None:
    """Attention and memory reports on the video's way to its file."""
    video = (n.video, 0)
    for name, sampling in zip(("high", "low"), n.sampling, strict=True):
        report = edit.own("LowbitAttentionReport", f"Attention Report: {name} noise", {"model": (sampling, 0)})
        video = edit.insert(flat, f"report_{name}", report, "after", video)
    edit.insert(flat, "memory_report", edit.own("LowbitMemoryReport"), "value", video)
    flat["chart"] = edit.own("PreviewImage", "Memory over the run", {"images": ("memory_report", 1)})


def _inside(n: _Numbers, latent: str, before_decode: list[str]) -> Box:
    """Both samplers, the choice between all steps and the four of the Lightning LoRAs, size and decode."""
    triples = (n.steps, n.split, n.cfg)
    loras = column(*n.lora, title="Lightning LoRAs")
    numbers = column(*(key for triple in triples for key in triple[:2]), title="Normal, Lightning")
    switches = column(
        *n.switch,
        *(column(triple[2], above=above) for triple, above in zip(triples, (140, 126, 126), strict=True)),
        title="Normal or Lightning",
    )
    size = column(row(n.duration, n.length, latent), column(n.fps, above=200), title="Size and length")
    first, second = n.sample
    choice = row(column(loras, numbers, gap=_CHANNEL - 280), column(n.lightning, above=1260), switches)
    return row(
        column(choice, size, gap=80),
        n.sampling[0],
        column(first, above=_CHANNEL - 60),
        column(n.sampling[1], column("release", above=_CHANNEL - 180), above=160),
        column(second, above=_CHANNEL + 460),
        row(
            *before_decode,
            column(row(n.decode, n.video), above=350 if before_decode else 0),
            title="Decode",
            above=_CHANNEL + 860,
        ),
    )
