"""The Qwen-Image workflows: text to image, image editing, and quantizing once to save the result."""

from __future__ import annotations

from dataclasses import dataclass

from . import edit
from .compose import Design, Exposed, Subgraph
from .layout import Box, column, row
from .unfold import Flat, Source
from .widgets import ObjectInfo

TEXT_TO_IMAGE = "image_qwen_image"
EDIT = "image_qwen_image_edit"

ABOUT = """\
{template} of ComfyUI's own templates, with the same files and settings.

**Optimize** does all the rest:

- it quantizes a 16-bit file; a file that holds 8 bits already is taken as it is.
- it gives each attention call the fastest backend that is accurate enough.
- it keeps model, text encoder and VAE within the card, and shows it live.

It says on itself what it did. `preset` says what counts most: `smallest` when memory runs out.

Inside *Sample*: the sampler, and the Lightning LoRA for {fast} steps instead of 20."""

ABOUT_SAVE = """\
Quantizes Qwen-Image once, tries it on a picture and saves it. The file is in ComfyUI's own quantized format: its \
*Load Diffusion Model* reads it without this pack.

1. Choose the `format`. Among the loader's advanced inputs, `dry_run` lists first what would be quantized.
2. *8 steps* on: the Lightning LoRA is merged into the saved file.
3. Run. The file is in the output folder: move it to models/diffusion_models.

**Optimize**, behind the loader, leaves its weights as they are and adds attention and memory management.

Quantizing needs a few layers' worth of main memory, not the whole model."""

ABOUT_REWRITE = """\
{template} of ComfyUI's own templates, with the same files and settings; before the picture is made, its prompt is \
rewritten by the text encoder that the graph has loaded anyway.

- **Text Generation**: the encoder writes on the GPU, one captured graph a token, from its quantized weights.
- **Rewrite the prompt**: what to write, and the prompt itself, below the empty line. Another `seed`, another text.
- **The prompt that was written** goes into the picture.
- **Optimize**: as in *qwen_image_text_to_image*.

The encoder's file must hold its output head (`lm_head`)."""

_REWRITE = """\
Rewrite this into one detailed prompt for an image model: subject, surroundings, light, colors, style. One paragraph, and \
nothing before or after it.

"""


@dataclass(frozen=True)
class _Numbers:
    """What the nodes are called in a template; `sampling` are the patches between the model's switch and the sampler."""

    model: str
    clip: str
    vae: str
    lora: str
    switch: str
    sampling: tuple[str, ...]
    steps: tuple[str, str, str]
    cfg: tuple[str, str, str]
    lightning: str
    sample: str
    decode: str
    save: str


_TEXT = _Numbers(
    model="37", clip="38", vae="39", lora="73", switch="78", sampling=("66",), steps=("84", "79", "82"),
    cfg=("85", "81", "83"), lightning="86", sample="3", decode="8", save="60",
)  # fmt: skip
_EDIT = _Numbers(
    model="37", clip="38", vae="39", lora="89", switch="108", sampling=("66", "75"), steps=("106", "103", "110"),
    cfg=("107", "105", "109"), lightning="111", sample="3", decode="8", save="60",
)  # fmt: skip
_POSITIVE, _NEGATIVE, _LATENT, _IMAGE, _ENCODE, _UNLINKED = "6", "7", "58", "78", "88", "93"
_EDIT_POSITIVE, _EDIT_NEGATIVE = "76", "77"

_HEIGHTS = {"60": 320}


def text_to_image(info: ObjectInfo) -> Design:
    """Qwen-Image text to image."""
    flat = edit.official_nodes(TEXT_TO_IMAGE, info)
    return _text_to_image("qwen_image_text_to_image", flat, ABOUT.format(template=f"*{TEXT_TO_IMAGE}*", fast=8))


def quantize_and_save(info: ObjectInfo) -> Design:
    """Qwen-Image quantized from the 16-bit file, tried and saved."""
    flat = edit.official_nodes(TEXT_TO_IMAGE, info)
    n = _TEXT
    edit.rename_file(flat, n.model, "unet_name", "qwen_image_bf16.safetensors")
    name = flat[n.model].values["unet_name"]
    edit.replace(flat, n.model, "LowbitLoadDiffusionModel", unet_name=name, format="int8_convrot_fast")
    design = _text_to_image("quantize_qwen_image_once_and_save", flat, ABOUT_SAVE)
    flat["save_model"] = edit.own(
        "LowbitSaveQuantizedModel", None, {"model": (n.switch, 0)}, filename_prefix="diffusion_models/qwen_image"
    )
    flat["quantized"] = edit.own("PreviewAny", "What is quantized, and why", {"source": (n.model, 1)})
    design.subgraphs["sampler"].outputs = {
        "model to save": (n.switch, 0),
        **design.subgraphs["sampler"].outputs,
    }
    models = row(n.model, column(n.clip, n.vae, "quantized", above=140), title="Models")
    design.box = _root(_prompts(), models, beside="save_model")
    design.extra_heights |= {"quantized": 220}
    return design


def rewrite_the_prompt(info: ObjectInfo) -> Design:
    """Qwen-Image from a prompt that its own text encoder has rewritten."""
    flat = edit.official_nodes(TEXT_TO_IMAGE, info)
    chosen = {widget: flat[_TEXT.clip].values[widget] for widget in ("clip_name", "type", "device")}
    edit.replace(flat, _TEXT.clip, "LowbitLoadTextEncoder", format="auto", **chosen)
    name = "qwen_image_rewrite_the_prompt"
    design = _text_to_image(name, flat, ABOUT_REWRITE.format(template=f"*{TEXT_TO_IMAGE}*"))
    prompt = flat[_POSITIVE].values.pop("text")
    flat[_POSITIVE].title = "Rewritten prompt"
    flat["writer"] = edit.own("LowbitTextGeneration", None, {"clip": ("optimize", 1)})
    flat["write"] = edit.own(
        "TextGenerate",
        "Rewrite the prompt",
        {"clip": ("writer", 0)},
        prompt=_REWRITE + prompt,
        max_length=256,
        sampling_mode="on",
        **{"sampling_mode.seed": 0},
    )
    flat["written"] = edit.own("PreviewAny", "The prompt that was written", {"source": ("write", 0)})
    flat[_POSITIVE].links["text"] = ("write", 0)
    flat[_POSITIVE].links["clip"] = ("writer", 0)
    design.subgraphs["rewrite"] = Subgraph(
        "Rewrite the prompt",
        row("writer", column("write", above=160), column(_POSITIVE, "written")),
        inputs={"clip": ("optimize", 1)},
        outputs={"positive": (_POSITIVE, 0)},
        widgets=[Exposed("prompt", (("write", "prompt"),)), Exposed("seed", (("write", "sampling_mode.seed"),))],
    )
    design.box = _root(_prompts("rewrite", above=480))
    design.routes[(_TEXT.decode, "vae")] = (f"under {_NEGATIVE} {_LATENT}",)
    design.extra_heights |= {"rewrite": 150, "write": 200, "written": 160, _POSITIVE: 0}
    return design


def _prompts(positive: str = _POSITIVE, above: int = 320) -> Box:
    return row(
        column(positive, _NEGATIVE),
        column(_LATENT, above=above),
        title="Prompt and size",
        above=410,
        left=100,
    )


def _text_to_image(name: str, flat: Flat, about: str) -> Design:
    n = _TEXT
    edit.retitle(flat, n6="Prompt", n7="Negative prompt")
    edit.optimize(flat, "optimize", (n.model, 0), n.clip, n.vae)
    sampler = _sampler(n, "8 steps (Lightning LoRA)", (_POSITIVE, 0), (_NEGATIVE, 0), (_LATENT, 0))
    design = _design(name, flat, n, _root(_prompts()), {"sampler": sampler}, about)
    design.routes[(n.decode, "vae")] = (f"under {_NEGATIVE} {_LATENT}",)
    design.extra_heights |= {_POSITIVE: 150, _NEGATIVE: 60}
    return design


def image_edit(info: ObjectInfo) -> Design:
    """Qwen-Image-Edit."""
    flat, n = edit.official_nodes(EDIT, info), _EDIT
    del flat[_UNLINKED]  # the template leaves its output unlinked
    edit.retitle(flat, n76="Prompt", n77="Negative prompt", n78="Image to edit")
    edit.optimize(flat, "optimize", (n.model, 0), n.clip, n.vae)
    encode = Subgraph(
        "Prompts and image",
        column(_EDIT_POSITIVE, _EDIT_NEGATIVE, _ENCODE),
        inputs={"clip": ("optimize", 1), "vae": ("optimize", 2), "image": (_IMAGE, 0)},
        outputs={"positive": (_EDIT_POSITIVE, 0), "negative": (_EDIT_NEGATIVE, 0), "latent": (_ENCODE, 0)},
        widgets=[
            Exposed("prompt", ((_EDIT_POSITIVE, "prompt"),)),
            Exposed("negative prompt", ((_EDIT_NEGATIVE, "prompt"),)),
        ],
    )
    sampler = _sampler(n, "4 steps (Lightning LoRA)", (_EDIT_POSITIVE, 0), (_EDIT_NEGATIVE, 0), (_ENCODE, 0))
    conditions = row(column(_IMAGE, above=180), "encode", title="Prompt and image", gap=190, above=410, left=100)
    about = ABOUT.format(template=f"*{EDIT}*", fast=4)
    design = _design(
        "qwen_image_edit", flat, n, _root(conditions, height=300), {"encode": encode, "sampler": sampler}, about
    )
    design.routes |= {
        (n.decode, "vae"): (f"under {_IMAGE} encode",),
    }
    design.extra_heights |= {_IMAGE: 240}
    return design


def _design(name: str, flat: Flat, n: _Numbers, root: Box, subgraphs: dict[str, Subgraph], about: str) -> Design:
    """Notes and titles, which every Qwen-Image workflow has."""
    for key, title in {n.model: "Diffusion model", n.clip: "Text encoder", n.vae: "VAE"}.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    return Design(name, flat, root, subgraphs, extra_heights=dict(_HEIGHTS))


def _root(conditions: Box, models: Box | None = None, beside: str | None = None, height: int = 0) -> Box:
    """The root graph from left to right; `conditions` stands between the one node and the sampler."""
    n = _TEXT
    return row(
        column("about", "files"),
        row(
            models or column(n.model, n.clip, n.vae, title="Models"),
            column("optimize", title="Faster, in less memory"),
        ),
        conditions,
        column("sampler", above=height),
        column(
            *([row(beside, title="Saved for later runs")] if beside else []),
            row(column(n.decode, above=400), n.save, title="Image"),
            above=height,
        ),
    )


def _sampler(n: _Numbers, lightning: str, positive: Source, negative: Source, latent: Source) -> Subgraph:
    """The sampler, with the choice between all steps and the few of the Lightning LoRA."""
    pairs = (n.steps, n.cfg)
    numbers = column(*(key for triple in pairs for key in triple[:2]), title="Normal, Lightning")
    switches = column(
        n.switch,
        *(column(triple[2], above=above) for triple, above in zip(pairs, (270, 126), strict=True)),
        title="Normal or Lightning",
    )
    return Subgraph(
        "Sample",
        row(
            column(column(n.lora, title="Lightning LoRA"), numbers, gap=160),
            column(n.lightning, above=880),
            switches,
            *n.sampling,
            column(n.sample, above=220),
        ),
        inputs={"model": ("optimize", 0), "positive": positive, "negative": negative, "latent": latent},
        outputs={"latent": (n.sample, 0)},
        widgets=[
            Exposed("seed", ((n.sample, "seed"),)),
            Exposed(lightning, ((n.lightning, "value"),)),
            Exposed("Lightning LoRA", ((n.lora, "lora_name"),)),
        ],
        level=260,
    )
