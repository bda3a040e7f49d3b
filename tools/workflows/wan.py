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

**Optimize** stands behind each of them:

- it quantizes a 16-bit file; an FP8 file is taken as it is.
- it gives each attention call the fastest backend that is accurate enough.
- it keeps models, text encoder and VAE within the card, and shows it live.

It says on itself what it did. `preset` says what counts most: `smallest` when memory runs out.

Inside *Sample*: the samplers, and the Lightning LoRAs for 4 steps instead of 20."""

ABOUT_16GB = """\
Wan 2.2 14B text to video for cards with 16 GB. What differs from *wan2.2_14B_text_to_video*:

- the 16-bit files, stored in **4 bits** while they load: some 8 GB for each model instead of 28, and never 28 in main \
memory. On an RTX 50 choose `fp4_scaled_fast`.
- **Optimize** on `smallest`: only the model at work is on the GPU.

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

_HEIGHTS = {"positive": 150, "negative": 60}


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
        name = flat[key].values["unet_name"]
        edit.replace(flat, key, "LowbitLoadDiffusionModel", unet_name=name, format="int4_asym_fast")
    return _text_to_video("fit_wan2.2_14B_in_16GB", flat, ABOUT_16GB, "smallest")


def _text_to_video(name: str, flat: Flat, about: str, preset: str = "balanced") -> Design:
    n, latent = _TEXT, _LATENT
    size = [
        *_length_widgets(n),
        Exposed("width", ((latent, "width"),)),
        Exposed("height", ((latent, "height"),)),
    ]
    return _design(name, flat, n, latent, size, about, preset=preset)


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
    name: str,
    flat: Flat,
    n: _Numbers,
    latent: str,
    size: list[Exposed],
    about: str,
    image: str | None = None,
    preset: str = "balanced",
) -> Design:
    """The whole workflow; `latent` makes the first latent, `image` loads the first frame."""
    edit.optimize(flat, "optimize_high", (n.high, 0), preset=preset)
    edit.optimize(flat, "optimize_low", (n.low, 0), n.clip, n.vae, preset)
    titles = {n.high: "High noise model", n.low: "Low noise model", n.clip: "Text encoder", n.vae: "VAE"}
    titles |= {n.positive: "Prompt", n.negative: "Negative prompt"}
    for key, title in titles.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    generate = Subgraph(
        "Sample: high noise, then low noise",
        _inside(n, latent),
        inputs={
            "high noise model": ("optimize_high", 0),
            "low noise model": ("optimize_low", 0),
            "positive": (n.positive, 0),
            "negative": (n.negative, 0),
            **({"first frame": (image, 0)} if image else {}),
            "vae": ("optimize_low", 2),
        },
        outputs={"video": (n.video, 0)},
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
        row(
            column(n.high, n.low, n.clip, n.vae, title="Models"),
            column("optimize_high", "optimize_low", title="Faster, in less memory"),
        ),
        row(
            row(column(n.positive, n.negative, *below), title="Prompt", above=900, left=100),
            column("generate", above=height),
            gap=280,
        ),
        column(n.save, title="Video", above=height),
    )


def _inside(n: _Numbers, latent: str) -> Box:
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
        column(n.sampling[1], above=160),
        column(second, above=_CHANNEL + 460),
        row(n.decode, n.video, title="Decode", above=_CHANNEL + 860),
    )
