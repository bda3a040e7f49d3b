"""The InfiniteTalk workflows: a picture that talks with one voice, or two people who talk with one voice each."""

from __future__ import annotations

from . import edit
from .compose import Design, Exposed, Subgraph
from .layout import Box, column, row
from .unfold import BYPASS, NEVER, Flat, Source
from .widgets import ObjectInfo

TEMPLATE = "video_wan2_1_infinitetalk"

ABOUT = """\
{template} of ComfyUI's own templates{variant}, with the same files and settings. The template loads every model once for \
each part of the video; here both parts share them.

{nodes}

{masks}Each part is 81 frames, 3.2 seconds. For a longer video open *Talk*, copy *Second part*, link the copy \
like it, with *Second part*'s images as its previous frames, and add its images to *Batch Images*."""

IN_ONE = """\
**Optimize** does all the rest:

- it quantizes a 16-bit file; a file that holds 8 bits already is taken as it is.
- it gives each attention call the fastest backend that is accurate enough.
- it keeps model, text encoder and VAE within the card, and shows it live.

It says on itself what it did. **Load Model Patch** quantizes InfiniteTalk's patch."""

SINGLY = """\
Every node of the pack, for those who want more than **Optimize**, which stands here bypassed:

- **Load ...**: `format` quantizes a 16-bit file while it loads, InfiniteTalk's patch too. Here the model's is `none`.
- **Quantize Model** does the same behind any loader, with LoRAs on the model.
- **Save Quantized Model**, muted (Ctrl+M), writes it in ComfyUI's own format.
- **Attention**: the fastest backend that is accurate enough for each shape.
- **Memory Manager**: keeps model, text encoder and VAE within the card, and shows it live.
- **Release Component**: the text encoder leaves the GPU once the prompt is encoded, and inside *Talk* the audio encoder.
- **Reports**: which attention ran, and where the memory went."""

MASKS = """\
Draw each speaker's mask on the pictures in *Who speaks*: the painter needs Nodes 2.0, in ComfyUI's settings.

"""

_TWINS = {
    "307": "13", "308": "16", "309": "29", "312": "14", "313": "25", "314": "93", "315": "112", "316": "26",
    "317": "179", "323": "306",
}  # fmt: skip
"""Nodes of the second part that do what one of the first part does already."""

_MODEL, _LORA, _PATCH, _CLIP, _VAE, _AUDIO_ENCODER = "13", "179", "112", "16", "29", "26"
_PROMPT, _NEGATIVE, _VOICE_1, _VOICE_2, _CONCAT = "14", "306", "25", "93", "113"
_IMAGE, _AUDIO_1, _AUDIO_2, _MASK_1, _MASK_2, _WIDTH, _HEIGHT = "32", "24", "90", "174", "175", "149", "150"
_PARTS = (
    ("129", "193", "191", "190", "192", "194", "119"),
    ("311", "321", "319", "318", "320", "322", "310"),
)
"""Per part: the conditioning, noise, guider, sampler, schedule, sampling and decode."""
_BATCH, _FIRST_VIDEO, _FIRST_SAVE, _VIDEO, _SAVE = "172", "138", "162", "140", "141"

_HEIGHTS = {
    _AUDIO_1: 40, _AUDIO_2: 40, _IMAGE: 260, _MASK_1: 260, _MASK_2: 260, _PROMPT: 80,
    "report": 160, "memory_report": 220, "chart": 240,
}  # fmt: skip


_INDENT = 450
"""How far picture and voices stand to the right of the prompt, so that their links do not run behind it."""


def one_speaker(flat: Flat) -> None:
    """The template with one voice: the second voice, the masks and what joins the voices go."""
    for node in flat.values():
        if node.type == "WanInfiniteTalkToVideo":
            node.values["mode"] = "single_speaker"
            node.links = {name: source for name, source in node.links.items() if not name.startswith("mode.")}
            node.sockets = [entry for entry in node.sockets or [] if not entry["name"].startswith("mode.")]
        elif node.type == "ModelPatchLoader":
            rename = node.values["name"].replace("_multi_", "_single_")
            edit.rename_file(flat, next(key for key, value in flat.items() if value is node), "name", rename)
        elif node.type == "CLIPTextEncode":
            node.values["text"] = node.values["text"].replace("Two characters are", "A character is")
    edit.relink(flat, (_CONCAT, 0), (_AUDIO_1, 0))
    for key in (_CONCAT, _AUDIO_2, _VOICE_2, "314", _MASK_1, _MASK_2):
        del flat[key]


def two_speakers(info: ObjectInfo) -> Design:
    """InfiniteTalk with two speakers."""
    flat = edit.official_nodes(TEMPLATE, info)
    about = ABOUT.format(template=f"*{TEMPLATE}*", variant="", nodes=IN_ONE, masks=MASKS)
    return _design("infinitetalk_two_speakers", flat, about)


def single_speaker(info: ObjectInfo) -> Design:
    """InfiniteTalk with one speaker."""
    flat = edit.official_nodes(TEMPLATE, info)
    one_speaker(flat)
    about = ABOUT.format(template=f"*{TEMPLATE}*", variant=" with one speaker", nodes=IN_ONE, masks="")
    return _design("infinitetalk_single_speaker", flat, about)


def all_nodes(info: ObjectInfo) -> Design:
    """InfiniteTalk with one speaker and every node of the pack."""
    flat = edit.official_nodes(TEMPLATE, info)
    one_speaker(flat)
    about = ABOUT.format(template=f"*{TEMPLATE}*", variant=" with one speaker", nodes=SINGLY, masks="")
    return _design("all_nodes", flat, about, singly=True)


def share_models(flat: Flat) -> None:
    """Both parts use the models, prompt and voices of the first."""
    for twin, first in _TWINS.items():
        if flat.pop(twin, None) is not None:
            edit.relink(flat, (twin, 0), (first, 0))


def _design(name: str, flat: Flat, about: str, singly: bool = False) -> Design:
    """The whole workflow, with the one node or (singly) with every other one."""
    two = _AUDIO_2 in flat
    share_models(flat)
    positive: Source = (_PROMPT, 0)
    if singly:
        edit.lowbit_loaders(flat)
        _manage(flat)
        release = edit.own("LowbitReleaseComponent", "Release the text encoder")
        positive = edit.insert(flat, "release", release, "value", positive)
        release = edit.own("LowbitReleaseComponent", "Release the audio encoder", text_encoder=False, audio_encoder=True)
        edit.insert(flat, "release_voice", release, "value", (_PARTS[0][0], 3))
        _report(flat)
    else:
        edit.replace(flat, _PATCH, "LowbitLoadModelPatch", name=flat[_PATCH].values["name"])
        edit.optimize(flat, "optimize", (_LORA, 0), _CLIP, _VAE)
    titles = {
        _MODEL: "Diffusion model", _PATCH: "InfiniteTalk patch", _CLIP: "Text encoder", _VAE: "VAE",
        _AUDIO_ENCODER: "Audio encoder", _PROMPT: "Prompt", _IMAGE: "Picture", _AUDIO_1: "Voice 1",
    }  # fmt: skip
    titles |= {_AUDIO_2: "Voice 2", _MASK_1: "Mask of speaker 1", _MASK_2: "Mask of speaker 2"} if two else {}
    for key, title in titles.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    subgraphs = {"talk": _talk(positive, two, singly)}
    if two:
        subgraphs["voices"] = _voices()
    heights = {key: height for key, height in _HEIGHTS.items() if key in flat}
    design = Design(name, flat, _root(two, singly), subgraphs, extra_heights=heights)
    design.routes = {
        ("talk", "vae"): (
            "past memory" if singly else "past optimize",
            f"under {_PROMPT} {'release' if singly else ''} {_NEGATIVE}",
        ),
        ("talk", "picture"): (f"over {_MASK_1}",) if two else (),
        (_FIRST_VIDEO, "audio"): () if two else (f"under {_VOICE_1}",),
        (_VIDEO, "audio"): (
            *(() if two else (f"under {_VOICE_1}",)),
            f"under {_FIRST_VIDEO} {_FIRST_SAVE}",
        ),
    }
    return design


def _manage(flat: Flat) -> None:
    """Every node on the model's way, the one node bypassed and the saving one muted."""
    flat[_MODEL].values["format"] = "none"
    model = edit.insert(flat, "optimize", edit.own("LowbitOptimize"), "model", (_LORA, 0))
    flat["optimize"].mode = BYPASS
    model = edit.insert(flat, "quantize", edit.own("LowbitQuantizeModel"), "model", model)
    flat["save_model"] = edit.own("LowbitSaveQuantizedModel", links={"model": model})
    flat["save_model"].mode = NEVER
    model = edit.insert(flat, "several_gpus", edit.own("LowbitSeveralGPUs"), "model", model)
    flat["save_model"].links["model"] = ("quantize", 0)
    model = edit.insert(flat, "attention", edit.own("LowbitAttention"), "model", model)
    edit.insert(flat, "memory", edit.own("LowbitMemoryManager"), "model", model)
    edit.relink(flat, (_CLIP, 0), ("memory", 1))
    edit.relink(flat, (_VAE, 0), ("memory", 2))
    flat["memory"].links |= {"clip": (_CLIP, 0), "vae": (_VAE, 0)}


def _report(flat: Flat) -> None:
    report = edit.own("LowbitAttentionReport", None, {"model": (_PARTS[1][0], 0)})
    edit.insert(flat, "report", report, "after", (_BATCH, 0))
    edit.insert(flat, "memory_report", edit.own("LowbitMemoryReport"), "value", (_VIDEO, 0))
    flat["chart"] = edit.own("PreviewImage", "Memory over the run", {"images": ("memory_report", 1)})


def _voices() -> Subgraph:
    return Subgraph(
        "Encode both voices",
        column(_VOICE_1, _VOICE_2, _CONCAT),
        inputs={"audio encoder": (_AUDIO_ENCODER, 0), "voice 1": (_AUDIO_1, 0), "voice 2": (_AUDIO_2, 0)},
        outputs={"voice 1": (_VOICE_1, 0), "voice 2": (_VOICE_2, 0), "audio": (_CONCAT, 0)},
    )


def _talk(positive: Source, two: bool, singly: bool) -> Subgraph:
    """Both parts of the video: the second goes on from the last frames of the first."""
    parts = (
        row(
            talk,
            column(*(["release_voice"] if singly and talk == _PARTS[0][0] else []), *settings, above=160),
            sampling,
            column(decode, above=40),
            title=title,
            gap=120,
            above=above,
        )
        for (talk, *settings, sampling, decode), title, above in zip(
            _PARTS, ("First part", "Second part"), (0, 1240), strict=True
        )
    )
    manager = "memory" if singly else "optimize"
    inputs: dict[str, Source] = {
        "model": (manager, 0),
        "patch": (_PATCH, 0),
        "positive": positive,
        "negative": (_NEGATIVE, 0),
        "vae": (manager, 2),
        "picture": (_IMAGE, 0),
    }
    inputs |= {"mask 1": (_MASK_1, 1), "mask 2": (_MASK_2, 1)} if two else {}
    inputs |= {"voice 1": (_VOICE_1, 0), "voice 2": (_VOICE_2, 0)} if two else {"voice": (_VOICE_1, 0)}
    talks = [part[0] for part in _PARTS]
    return Subgraph(
        "Talk: first part, second part",
        row(column(_WIDTH, _HEIGHT, above=1500), *parts, column(_BATCH, above=40), gap=160),
        inputs=inputs,
        outputs={
            **({"model": (talks[1], 0)} if singly else {}),
            "images": (_BATCH, 0),
            "first part": (_PARTS[0][-1], 0),
        },
        widgets=[
            Exposed("width", ((_WIDTH, "value"),)),
            Exposed("height", ((_HEIGHT, "value"),)),
            Exposed("frames of each part", tuple((talk, "length") for talk in talks)),
            Exposed("audio_scale", tuple((talk, "audio_scale") for talk in talks)),
            Exposed("noise_seed, first part", ((_PARTS[0][1], "noise_seed"),)),
            Exposed("noise_seed, second part", ((_PARTS[1][1], "noise_seed"),)),
        ],
        level=1270,
    )


def _root(two: bool, singly: bool) -> Box:
    """The root graph: models above, then prompt, voices and picture, and what they make."""
    if singly:
        models = row(
            row(_MODEL, _LORA, title="Models"),
            column("optimize", title="In one"),
            row("quantize", column("save_model", above=140), title="In 8 bits"),
            column("several_gpus", title="On every GPU"),
            column("attention", row(column(_CLIP, _VAE), "memory"), title="Faster, in less memory"),
        )
        prompt = row(_PROMPT, column("release", above=30), column(_NEGATIVE, above=80), title="Prompt")
    else:
        models = row(
            row(_MODEL, column(_LORA, _CLIP, _VAE), title="Models"),
            column("optimize", title="Faster, in less memory"),
        )
        prompt = row(_PROMPT, column(_NEGATIVE, above=80), title="Prompt")
    patch = column(_PATCH, title="InfiniteTalk")
    if two:
        sound = row(column(_AUDIO_ENCODER, _AUDIO_1, _AUDIO_2), "voices", title="Voices", left=_INDENT)
        picture = row(_IMAGE, column(_MASK_1, _MASK_2), title="Who speaks", left=_INDENT)
    else:
        sound = row(column(_AUDIO_ENCODER, _AUDIO_1), _VOICE_1, title="Voice", left=_INDENT)
        picture = column(_IMAGE, title="Who speaks", left=_INDENT + 440)
    height = 760
    reports = ("memory_report", column(_SAVE, "chart")) if singly else (_SAVE,)
    return row(
        column("about", "files"),
        models,
        row(
            column(patch, prompt, picture, sound, gap=110, above=520, left=160),
            column("talk", above=height),
            gap=620 if two else 480,
        ),
        row(
            column(*(["report"] if singly else []), row(_FIRST_VIDEO, _FIRST_SAVE, above=0 if singly else 370), gap=120),
            _VIDEO,
            *reports,
            title="Video and reports" if singly else "Video",
            above=height,
        ),
    )
