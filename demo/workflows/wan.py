"""The Wan 2.2 workflows: text to video, image to video, and text to video in 16 GB."""

from __future__ import annotations

from dataclasses import dataclass

from . import edit
from .compose import Design, Exposed, Subgraph
from .layout import Box, column, row
from .unfold import Flat, Source
from .widgets import ObjectInfo

TEXT_TO_VIDEO = "video_wan2_2_14B_t2v"
IMAGE_TO_VIDEO = "video_wan2_2_14B_i2v"

ABOUT = """\
{template} of ComfyUI's own templates, with the same files and settings. Two models share the steps: one for high \
noise, one for low.

- **Load ...**: `format` quantizes a 16-bit file while it loads. An FP8 file is taken as it is.
- **Attention**: the fastest backend that is accurate enough for each shape.
- **Memory Manager**: keeps models, text encoder and VAE within the card, and shows it live.
- **Release Component**: the text encoder leaves the GPU once both prompts are encoded.
- **Reports**: which attention ran, and where the memory went.

Inside *Sample*: the samplers, and the Lightning LoRAs for 4 steps instead of 20."""

ABOUT_16GB = """\
Wan 2.2 14B text to video for cards with 16 GB. What differs from *wan2.2_14B_text_to_video*:

- the 16-bit files, stored in **4 bits** while they load: some 8 GB for each model instead of 28. On an RTX 50 choose \
`fp4_scaled_fast`.
- **Memory Manager**: `balanced`, at most 15 GiB: only the model at work is on the GPU. Set the limit to 0 for the \
whole card.
- **VAE** in bf16.
- **Release Component** before the decode: the models make room for it.

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

_HEIGHTS = {
    "about": 400, "files": 400, "positive": 150, "negative": 60, "save": 340, "chart": 240, "report_high": 160,
    "report_low": 160, "memory_report": 220,
}  # fmt: skip

_BESIDE_THE_PROMPTS = column("release", column("size"), above=90)


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
    design = _text_to_video("fit_wan2.2_14B_in_16GB", flat, ABOUT_16GB)
    for key in (n.high, n.low):
        flat[key].values["format"] = "int4_asym_fast"
    flat[n.vae].values["precision"] = "bf16"
    for key in ("memory_high", "memory_low"):
        flat[key].values |= {"policy": "balanced", "vram_limit_gib": 15.0}
    release = edit.own("LowbitReleaseComponent", "Release the models", text_encoder=True, diffusion_model=True)
    edit.insert(flat, "release_models", release, "value", ("report_low", 0))
    design.subgraphs["decode"].inputs["latent"] = ("release_models", 0)
    design.box = _root(_BESIDE_THE_PROMPTS, ("release_models",))
    return design


def _text_to_video(name: str, flat: Flat, about: str) -> Design:
    n, latent = _TEXT, flat[_TEXT.sample[0]].links["latent_image"][0]
    edit.lowbit_loaders(flat)
    _manage(flat, n)
    release = edit.own("LowbitReleaseComponent", "Release the text encoder")
    negative = edit.insert(flat, "release", release, "value", (n.negative, 0))
    size = Subgraph(
        "Size and length",
        row(column(n.duration, n.fps), n.length, column(latent, above=120)),
        inputs={},
        outputs={"latent": (latent, 0), "fps": (n.fps, 0)},
        widgets=[*_length_widgets(n), Exposed("width", ((latent, "width"),)), Exposed("height", ((latent, "height"),))],
    )
    sampler = _sampler(n, (n.positive, 0), negative, (latent, 0))
    root = _root(_BESIDE_THE_PROMPTS)
    return _design(name, flat, n, root, {"size": size, "sampler": sampler}, about, (f"under {n.negative} size",))


def image_to_video(info: ObjectInfo) -> Design:
    """Wan 2.2 14B image to video."""
    flat, n, image, start = edit.official_nodes(IMAGE_TO_VIDEO, info), _IMAGE, "97", "98"
    edit.lowbit_loaders(flat)
    edit.retitle(flat, n97="First frame")
    _manage(flat, n)
    release = edit.own("LowbitReleaseComponent", "Release the text encoder")
    negative = edit.insert(flat, "release", release, "value", (start, 1))
    size = Subgraph(
        "Length",
        row(column(n.duration, n.fps), n.length),
        inputs={},
        outputs={"length": (n.length, 1), "fps": (n.fps, 0)},
        widgets=_length_widgets(n),
    )
    sampler = _sampler(n, (start, 0), negative, (start, 2))
    root = _root(row(column(start, above=60), column("release", above=160)), image=image)
    design = _design(
        "wan2.2_14B_image_to_video", flat, n, root, {"size": size, "sampler": sampler},
        ABOUT.format(template=f"*{IMAGE_TO_VIDEO}*"), (f"before {n.negative}", f"under {n.negative} size {start} release"),
    )  # fmt: skip
    design.routes |= {
        (start, "vae"): (f"under {n.negative}",),
        (start, "length"): (f"near {start}",),
        ("sampler", "low noise model"): (f"over {n.positive} release",),
        ("sampler", "latent"): ("under release",),
    }
    design.extra_heights[image] = 240
    return design


def _length_widgets(n: _Numbers) -> list[Exposed]:
    return [
        Exposed("duration in seconds", ((n.duration, "value"),)),
        Exposed("frames per second", ((n.fps, "value"),)),
    ]


def _design(
    name: str, flat: Flat, n: _Numbers, root: Box, subgraphs: dict[str, Subgraph], about: str, around: tuple[str, ...]
) -> Design:
    """Reports, notes, titles and the decode, which every Wan workflow has."""
    _report(flat, n)
    subgraphs["decode"] = Subgraph(
        "Decode to video",
        row(n.decode, n.video),
        inputs={"latent": ("report_low", 0), "fps": (n.fps, 0), "vae": ("memory_low", 2)},
        outputs={"video": (n.video, 0)},
    )
    titles = {n.high: "High noise model", n.low: "Low noise model", n.clip: "Text encoder", n.vae: "VAE"}
    titles |= {n.positive: "Prompt", n.negative: "Negative prompt"}
    for key, title in titles.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    names = {"positive": n.positive, "negative": n.negative, "save": n.save}
    routes = {("decode", "vae"): around, ("report_low", "model"): ("over report_high",)}
    heights = {names.get(key, key): height for key, height in _HEIGHTS.items()}
    return Design(name, flat, root, subgraphs, routes, extra_heights=heights)


def _root(conditions: Box, before_decode: tuple[str, ...] = (), image: str | None = None) -> Box:
    """The root graph from left to right; `conditions` stands between the prompts and the sampler."""
    n = _IMAGE if image else _TEXT
    below = (image, column("size")) if image else ()
    height = 620 if image else 400
    return row(
        column("about", "files"),
        column(n.high, n.low, title="Models"),
        column(
            row("attention_high", "memory_high"),
            "attention_low",
            row(column(n.clip, n.vae), "memory_low"),
            title="Faster, in less memory",
        ),
        row(column(n.positive, n.negative, *below), conditions, title="Prompt and size", gap=190, above=700),
        column("sampler", above=height),
        row(
            "report_high",
            "report_low",
            *before_decode,
            column("decode", above=280),
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
    """Attention reports on the latent's way, the memory report on the video's."""
    latent = (n.sample[1], 0)
    for name, sampling in zip(("high", "low"), n.sampling, strict=True):
        report = edit.own("LowbitAttentionReport", f"Attention Report: {name} noise", {"model": (sampling, 0)})
        latent = edit.insert(flat, f"report_{name}", report, "after", latent)
    edit.insert(flat, "memory_report", edit.own("LowbitMemoryReport"), "value", (n.video, 0))
    flat["chart"] = edit.own("PreviewImage", "Memory over the run", {"images": ("memory_report", 1)})


def _sampler(n: _Numbers, positive: Source, negative: Source, latent: Source) -> Subgraph:
    """Both samplers, with the choice between all steps and the four of the Lightning LoRAs."""
    triples = (n.steps, n.split, n.cfg)
    loras = column(*n.lora, title="Lightning LoRAs")
    numbers = column(*(key for triple in triples for key in triple[:2]), title="Normal, Lightning")
    switches = column(
        *n.switch,
        *(column(triple[2], above=above) for triple, above in zip(triples, (200, 156, 156), strict=True)),
        title="Normal or Lightning",
    )
    first, second = n.sample
    box = row(
        column(loras, numbers, gap=_CHANNEL - 280),
        column(n.lightning, above=1260),
        switches,
        n.sampling[0],
        column(first, above=_CHANNEL - 60),
        column(n.sampling[1], above=160),
        column(second, above=_CHANNEL + 460),
    )
    return Subgraph(
        "Sample: high noise, then low noise",
        box,
        inputs={
            "high noise model": ("memory_high", 0),
            "low noise model": ("memory_low", 0),
            "positive": positive,
            "negative": negative,
            "latent": latent,
        },
        outputs={
            "low noise model": (n.sampling[1], 0),
            "high noise model": (n.sampling[0], 0),
            "latent": (second, 0),
        },
        widgets=[
            Exposed("noise_seed", ((first, "noise_seed"),)),
            Exposed("4 steps (Lightning LoRA)", ((n.lightning, "value"),)),
            Exposed("high noise LoRA", ((n.lora[0], "lora_name"),)),
            Exposed("low noise LoRA", ((n.lora[1], "lora_name"),)),
        ],
        level=_CHANNEL,
    )
