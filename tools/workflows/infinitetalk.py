"""The InfiniteTalk workflows: a picture that talks with one voice, or two people who talk with one voice each."""

from __future__ import annotations

from . import edit
from .compose import Design, Exposed, Subgraph
from .layout import Box, column, row
from .unfold import Flat, Source
from .widgets import ObjectInfo

TEMPLATE = "video_wan2_1_infinitetalk"

ABOUT = """\
{template} of ComfyUI's own templates{variant}, with the same files and settings. The template loads every model once for \
each part of the video; here both parts share them.

- **Load ...**: `format` quantizes a 16-bit file while it loads, InfiniteTalk's patch too.
- **Attention**: the fastest backend that is accurate enough for each shape.
- **Memory Manager**: keeps model, text encoder and VAE within the card, and shows it live.
- **Release Component**: the text encoder leaves the GPU once the prompt is encoded, and inside *Talk* the audio encoder.
- **Reports**: which attention ran, and where the memory went.

{masks}Each part is 81 frames, 3.2 seconds. For a longer video open *Talk*, copy *Second part*, link the copy \
like it, with *Second part*'s images as its previous frames, and add its images to *Batch Images*."""

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
    about = ABOUT.format(template=f"*{TEMPLATE}*", variant="", masks=MASKS)
    return _design("infinitetalk_two_speakers", flat, about)


def single_speaker(info: ObjectInfo) -> Design:
    """InfiniteTalk with one speaker."""
    flat = edit.official_nodes(TEMPLATE, info)
    one_speaker(flat)
    about = ABOUT.format(template=f"*{TEMPLATE}*", variant=" with one speaker", masks="")
    return _design("infinitetalk_single_speaker", flat, about)


def share_models(flat: Flat) -> None:
    """Both parts use the models, prompt and voices of the first."""
    for twin, first in _TWINS.items():
        if flat.pop(twin, None) is not None:
            edit.relink(flat, (twin, 0), (first, 0))


def _design(name: str, flat: Flat, about: str) -> Design:
    two = _AUDIO_2 in flat
    share_models(flat)
    edit.lowbit_loaders(flat)
    _manage(flat)
    release = edit.own("LowbitReleaseComponent", "Release the text encoder")
    positive = edit.insert(flat, "release", release, "value", (_PROMPT, 0))
    release = edit.own("LowbitReleaseComponent", "Release the audio encoder", text_encoder=False, audio_encoder=True)
    edit.insert(flat, "release_voice", release, "value", (_PARTS[0][0], 3))
    _report(flat)
    titles = {
        _MODEL: "Diffusion model", _PATCH: "InfiniteTalk patch", _CLIP: "Text encoder", _VAE: "VAE",
        _AUDIO_ENCODER: "Audio encoder", _PROMPT: "Prompt", _IMAGE: "Picture", _AUDIO_1: "Voice 1",
    }  # fmt: skip
    titles |= {_AUDIO_2: "Voice 2", _MASK_1: "Mask of speaker 1", _MASK_2: "Mask of speaker 2"} if two else {}
    for key, title in titles.items():
        flat[key].title = title
    flat["about"] = edit.note("About", about)
    flat["files"] = edit.note("Model files", edit.model_list(flat))
    subgraphs = {"talk": _talk(flat, positive, two)}
    if two:
        subgraphs["voices"] = _voices()
    heights = {key: height for key, height in _HEIGHTS.items() if key in flat}
    design = Design(name, flat, _root(two), subgraphs, extra_heights=heights)
    design.routes = {
        ("talk", "vae"): ("past memory", f"under {_PROMPT} release {_NEGATIVE}"),
        ("talk", "picture"): (f"over {_MASK_1}",) if two else (),
        (_FIRST_VIDEO, "audio"): () if two else (f"under {_VOICE_1}",),
        (_VIDEO, "audio"): (
            *(() if two else (f"under {_VOICE_1}",)),
            f"under {_FIRST_VIDEO} {_FIRST_SAVE}",
        ),
    }
    return design


def _manage(flat: Flat) -> None:
    attention = edit.insert(flat, "attention", edit.own("LowbitAttention"), "model", (_LORA, 0))
    edit.insert(flat, "memory", edit.own("LowbitMemoryManager"), "model", attention)
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


def _talk(flat: Flat, positive: Source, two: bool) -> Subgraph:
    """Both parts of the video: the second goes on from the last frames of the first."""
    parts = (
        row(
            talk,
            column(*(["release_voice"] if talk == _PARTS[0][0] else []), *settings, above=160),
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
    inputs: dict[str, Source] = {
        "model": ("memory", 0),
        "patch": (_PATCH, 0),
        "positive": positive,
        "negative": (_NEGATIVE, 0),
        "vae": ("memory", 2),
        "picture": (_IMAGE, 0),
    }
    inputs |= {"mask 1": (_MASK_1, 1), "mask 2": (_MASK_2, 1)} if two else {}
    inputs |= {"voice 1": (_VOICE_1, 0), "voice 2": (_VOICE_2, 0)} if two else {"voice": (_VOICE_1, 0)}
    talks = [part[0] for part in _PARTS]
    return Subgraph(
        "Talk: first part, second part",
        row(column(_WIDTH, _HEIGHT, above=1500), *parts, column(_BATCH, above=40), gap=160),
        inputs=inputs,
        outputs={"model": (talks[1], 0), "images": (_BATCH, 0), "first part": (_PARTS[0][-1], 0)},
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


def _root(two: bool) -> Box:
    """The root graph: models above, then prompt, voices and picture, and what they make."""
    models = row(
        row(_MODEL, _LORA, title="Models"),
        column("attention", row(column(_CLIP, _VAE), "memory"), title="Faster, in less memory"),
    )
    prompt = row(_PROMPT, column("release", above=30), column(_NEGATIVE, above=80), title="Prompt")
    patch = column(_PATCH, title="InfiniteTalk")
    if two:
        sound = row(column(_AUDIO_ENCODER, _AUDIO_1, _AUDIO_2), "voices", title="Voices", left=_INDENT)
        picture = row(_IMAGE, column(_MASK_1, _MASK_2), title="Who speaks", left=_INDENT)
    else:
        sound = row(column(_AUDIO_ENCODER, _AUDIO_1), _VOICE_1, title="Voice", left=_INDENT)
        picture = column(_IMAGE, title="Who speaks", left=_INDENT + 440)
    height = 760
    return row(
        column("about", "files"),
        models,
        row(
            column(patch, prompt, picture, sound, gap=110, above=520, left=60),
            column("talk", above=height),
            gap=620 if two else 480,
        ),
        row(
            column("report", row(_FIRST_VIDEO, _FIRST_SAVE), gap=120),
            _VIDEO,
            "memory_report",
            column(_SAVE, "chart"),
            title="Video and reports",
            above=height,
        ),
    )
