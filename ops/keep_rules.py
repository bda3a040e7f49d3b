"""Which layers stay in 16 bits, and why: a table by model family, and the text of globs a user may write instead."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import FormatError
from .formats import FORMATS

KEEP = "keep"
QUANTIZE = "quantize"
EIGHT_BITS = "8 bits"

_WILD = re.compile(r"(\*|\?|\[(?!!\])[^\].]+\])")


@dataclass(frozen=True)
class Rule:
    """What happens to the layers that `pattern` matches.

    `pattern` is a glob on whole dot-separated segments of the layer's name: `add` matches a segment that is exactly
    `add`, `add_*` one that starts so, `ffn.*` the segment `ffn` followed by any other. A pattern of several segments
    matches anywhere in the name.

    Attributes:
        pattern: the glob, or several with `|` between them.
        action: `keep` (16 bits), `quantize` (an exception to a later rule), `8 bits` (no fewer, whatever the format) or
            the name of another format.
        reason: shown in the dry run.
        expected: the family always has such layers, so that matching nothing is worth a report.
        structural: core has no quantized module for such layers: kept whatever a user's rules say.
        outside_blocks: only layers that stand in no numbered block: first, last and conditioning layers.
        always: 16 bits even where memory is short.
        most_added: the rule holds while 16 bits for what it matches add at most this part to the quantized model.
    """

    pattern: str
    action: str = KEEP
    reason: str = "named by a keep rule"
    expected: bool = False
    structural: bool = False
    outside_blocks: bool = False
    always: bool = False
    most_added: float = math.inf

    def matches(self, layer: str) -> bool:
        """Whether any run of whole segments of `layer` fits the pattern."""
        if self.outside_blocks and _in_block(layer.split(".")):
            return False
        return _expression(self.pattern).search(layer) is not None


@dataclass(frozen=True)
class ModelFamily:
    """A model family: how its checkpoints are recognised and what stays in 16 bits.

    Attributes:
        name: shown in reports.
        kind: `diffusion_model`, `text_encoder` or `model_patch`.
        signature: layer globs (as in `Rule`), each of which a checkpoint of the family has.
        rules: first match wins.
    """

    name: str
    kind: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...] = field(default_factory=tuple)


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """Finds a run of whole segments that one of the pattern's globs fits: a name is looked at by every rule."""
    globs = "|".join("".join(map(_translated, _WILD.split(glob))) for glob in pattern.split("|"))
    return re.compile(rf"(?:^|\.)(?:{globs})(?:\.|\Z)")


def _translated(piece: str) -> str:
    """A wild card, or the text between two, as a regular expression that stays within its segment."""
    if piece in ("*", "?"):
        return "[^.]" + piece.strip("?")
    if not _WILD.fullmatch(piece):
        return re.escape(piece)
    characters = re.sub(r"[\\^\[&~]", r"\\\g<0>", piece[1:-1])
    return f"[^.{characters[1:]}]" if characters.startswith("!") else f"[{characters}]"


def _in_block(segments: Sequence[str]) -> bool:
    """Whether a number is followed by a name: `blocks.0.attn.q` is in a block, `time_embed.0` in a plain sequence."""
    first = next((place for place, segment in enumerate(segments) if segment.isdigit()), len(segments))
    return not all(segment.isdigit() for segment in segments[first:])


_NORMS = (Rule("norm*", reason="normalization"), Rule("*_norm", reason="normalization"))
_CONDITIONING = "time, text and image conditioning: small, and every block depends on it"
_INPUT_OUTPUT = "first or last projection: small, and its error is the picture's"
_GATEWAY = "all of a group of blocks goes through it: small, and nothing scales it down"
_MODULATION = "modulation: few bytes in this model, and every block depends on it"
_LARGE_MODULATION = "modulation: every block depends on it, and in 16 bits it would be a large part of the model"
_AUDIO = "audio conditioning: small, and lip movement depends on it"

_FACE = "face and motion conditioning: small, and mouth and eyes depend on it"

_WAN_CORE = (
    *_NORMS,
    Rule("modulation", reason="modulation"),
    Rule("patch_embedding", reason=_INPUT_OUTPUT, expected=True),
    Rule("time_*", reason=_CONDITIONING, expected=True),
    Rule("text_embedding", reason=_CONDITIONING, expected=True),
    Rule("img_emb*", reason=_CONDITIONING),
    Rule("head|head_global", reason=_INPUT_OUTPUT, expected=True),
    Rule("ref_conv", reason=_INPUT_OUTPUT),
)
_ADDED = (
    Rule("adapter", reason="an adapter: small"),
    Rule("add", reason="an added input: small"),
    Rule("add_conv_in", reason="an added input: small"),
    Rule("add_proj", reason="an added input: small"),
)
_VACE = (
    Rule("vace_patch_embedding", reason=_INPUT_OUTPUT, expected=True),
    Rule("before_proj|after_proj", reason=_GATEWAY, expected=True),
)
_ANIMATE = (
    Rule("pose_patch_embedding", reason=_INPUT_OUTPUT, expected=True),
    Rule("motion_encoder", reason=_FACE, structural=True),
    Rule("face_encoder", reason=_FACE),
    Rule("face_adapter", reason=_FACE, expected=True),
)
_HUMO = (Rule("audio_proj", reason=_AUDIO, expected=True), Rule("multitalk_audio_proj", reason=_AUDIO))
_SPEECH = (
    Rule("casual_audio_encoder", reason=_AUDIO, expected=True),
    Rule("audio_injector.injector_adain_layers", reason=_AUDIO),
    Rule("cond_encoder", reason=_INPUT_OUTPUT),
    Rule("frame_packer", reason=_INPUT_OUTPUT),
)
_DANCER = (Rule("music_projection|music_encoder", reason=_AUDIO, expected=True),)
_CAMERA = (Rule("control_adapter", reason="camera conditioning: small", expected=True),)
_SCAIL = (Rule("patch_embedding_pose", reason=_INPUT_OUTPUT), Rule("patch_embedding_mask", reason=_INPUT_OUTPUT))
_QWEN_IMAGE = (
    *_NORMS,
    Rule("img_in", reason=_INPUT_OUTPUT, expected=True),
    Rule("txt_in", reason=_INPUT_OUTPUT, expected=True),
    Rule("time_text_embed", reason=_CONDITIONING, expected=True),
    Rule("norm_out", reason=_INPUT_OUTPUT, expected=True),
    Rule("proj_out", reason=_INPUT_OUTPUT, expected=True),
    Rule("img_mod|txt_mod", EIGHT_BITS, reason=_LARGE_MODULATION, expected=True),
)
_TEXT_ENCODER = (*_NORMS, Rule("*layernorm", reason="normalization"))

_LANGUAGE_MODEL = "model.layers.*.self_attn.q_proj|model.language_model.layers.*.self_attn.q_proj"
_TOWER = Rule(
    "visual|vision_model|multi_modal_projector|audio_model|audio_projector",
    reason="the tower that sees or hears: small, and edits depend on it",
)

# Core renames its weight alone, and not the scale.
_OUTPUT_HEAD = Rule("lm_head", reason=_INPUT_OUTPUT, structural=True)

_WAN_SIGNATURE = ("blocks.*.self_attn.q", "blocks.*.cross_attn.q")

FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily(
        "InfiniteTalk / MultiTalk patch",
        "model_patch",
        ("audio_proj.proj1", "blocks.*.audio_cross_attn"),
        (*_NORMS, Rule("audio_proj", reason=_AUDIO, expected=True), Rule("multitalk_audio_proj", reason=_AUDIO)),
    ),
    *(
        ModelFamily(name, "diffusion_model", (*_WAN_SIGNATURE, *extra_signature), (*_WAN_CORE, *extra_rules, *_ADDED))
        for name, extra_signature, extra_rules in (
            ("Wan VACE", ("vace_blocks",), _VACE),
            ("Wan Animate", ("face_adapter",), _ANIMATE),
            ("Wan HuMo", ("audio_cross_attn_wrapper",), _HUMO),
            ("Wan S2V", ("casual_audio_encoder",), _SPEECH),
            ("Wan camera control", ("control_adapter",), _CAMERA),
            ("Wan SCAIL", ("patch_embedding_pose",), _SCAIL),
            ("Wan Dancer", ("music_projection",), _DANCER),
            ("Wan", (), ()),
        )
    ),
    ModelFamily(
        "Wan (diffusers names)",
        "diffusion_model",
        ("condition_embedder", "blocks.*.attn1.to_q", "blocks.*.attn2.to_q"),
        (
            *_NORMS,
            Rule("condition_embedder", reason=_CONDITIONING, expected=True),
            Rule("patch_embedding", reason=_INPUT_OUTPUT),
            Rule("scale_shift_table", reason="modulation"),
            Rule("proj_out", reason=_INPUT_OUTPUT, expected=True),
        ),
    ),
    ModelFamily(
        "Qwen-Image",
        "diffusion_model",
        ("transformer_blocks.*.img_mlp", "transformer_blocks.*.txt_mlp", "transformer_blocks.*.attn.add_q_proj"),
        _QWEN_IMAGE,
    ),
    ModelFamily("UMT5", "text_encoder", ("shared", "encoder.block.*.layer.0.SelfAttention.q"), _TEXT_ENCODER),
    ModelFamily(
        "Qwen-VL",
        "text_encoder",
        (_LANGUAGE_MODEL, "visual.blocks.*"),
        (*_TEXT_ENCODER, replace(_TOWER, expected=True)),
    ),
    ModelFamily("text model", "text_encoder", (_LANGUAGE_MODEL,), (*_TEXT_ENCODER, _OUTPUT_HEAD, _TOWER)),
)

MODULATION_LAYERS = "modulation|*_modulation*|adaln_*|*_mod|mod[A-Z]*|mod_*|*norm*.linear|emb_layers|param_generator"
"""What ComfyUI 0.33 calls layers that make shift, scale and gate of a block, or its weights (Chroma Radiance)."""

# In 16 bits they take a larger part of an 8-bit model's error away than they add to its bytes up to about this size;
# in a 4-bit model 8 bits do as well (benchmarks/families.py).
_WORTH_ITS_BYTES = 0.125

# PixelDiT's last blocks, which make the picture out of what the others made; their modulation is as large as any.
_PIXEL_DECODER = "pixel_blocks.*.attn|pixel_blocks.*.mlp|compress_to_attn|expand_from_attn"

GENERIC = ModelFamily(
    "unknown",
    "diffusion_model",
    (),
    (
        _OUTPUT_HEAD,
        Rule("distilled_guidance_layer|t_embedder", reason=_CONDITIONING),
        Rule("txtfusion", reason=_CONDITIONING, most_added=_WORTH_ITS_BYTES),
        Rule("tokenizer", reason="ends in discrete codes, which an error changes whole", always=True),
        Rule(
            "*",
            reason="outside the blocks: a first, last or conditioning layer",
            outside_blocks=True,
            most_added=0.25,
        ),
        Rule(MODULATION_LAYERS, reason=_MODULATION, most_added=_WORTH_ITS_BYTES),
        Rule(MODULATION_LAYERS, EIGHT_BITS, reason=_LARGE_MODULATION),
        Rule("proj_in|proj_out", reason=_GATEWAY, most_added=_WORTH_ITS_BYTES),
        Rule(_PIXEL_DECODER, reason=_INPUT_OUTPUT, most_added=_WORTH_ITS_BYTES),
    ),
)


def detect_family(layers: Collection[str]) -> ModelFamily:
    """The first family whose whole signature is found among `layers`, else the generic one."""
    for family in FAMILIES:
        if all(any(Rule(pattern).matches(layer) for layer in layers) for pattern in family.signature):
            return family
    return GENERIC


def parse_rules(text: str) -> tuple[Rule, ...] | None:
    """Rules from a user's text, or None for `auto` (the family's own).

    One rule a line (commas and semicolons separate too); `#` starts a comment. `glob` keeps the layers in 16 bits,
    `!glob` quantizes them whatever a later rule says, `glob = format` stores them in another format, and the word
    `auto` stands for the family's own rules at that place.

    Raises:
        FormatError: a rule names a format that does not exist, or is empty.
    """
    if text.strip().lower() in ("", "auto"):
        return None
    return tuple(_parse_rule(piece) for piece in _pieces(text))


def expand_rules(rules: Sequence[Rule] | None, family: ModelFamily) -> tuple[Rule, ...]:
    """`rules` with the word `auto` replaced by the family's rules; None is the family's rules alone.

    The family's structural rules come first in any case.
    """
    if rules is None:
        return family.rules
    expanded = [rule for rule in family.rules if rule.structural]
    for rule in rules:
        expanded.extend(family.rules if rule.pattern == "auto" and rule.action == KEEP else (rule,))
    return tuple(expanded)


def affordable(rules: Iterable[Rule], sizes: Mapping[str, int], bits: int) -> tuple[Rule, ...]:
    """`rules` without those whose layers would add more to the quantized model than the rule allows.

    Args:
        rules: first match wins.
        sizes: elements of each layer that may be quantized.
        bits: of an element of the format.
    """
    total = max(sum(sizes.values()), 1)

    def added(rule: Rule) -> float:
        return (16 - bits) / bits * sum(size for name, size in sizes.items() if rule.matches(name)) / total

    return tuple(rule for rule in rules if rule.most_added == math.inf or added(rule) <= rule.most_added)


def first_match(rules: Iterable[Rule], layer: str) -> Rule | None:
    """The rule that decides `layer`, or None when none does."""
    return next((rule for rule in rules if rule.matches(layer)), None)


def unmatched_rules(rules: Iterable[Rule], layers: Collection[str], *, user_written: bool) -> tuple[str, ...]:
    """Patterns that match no layer: all of a user's, and those a family is expected to have."""
    return tuple(
        rule.pattern
        for rule in rules
        if (user_written or rule.expected) and not any(rule.matches(layer) for layer in layers)
    )


def _pieces(text: str) -> list[str]:
    lines = (line.split("#", 1)[0] for line in text.replace(";", "\n").replace(",", "\n").splitlines())
    return [line.strip() for line in lines if line.strip()]


def _parse_rule(piece: str) -> Rule:
    pattern, separator, name = (part.strip() for part in piece.partition("="))
    if separator:
        if name not in FORMATS:
            raise FormatError(f"The keep rule '{piece}' names no weight format: use one of {', '.join(FORMATS)}.")
        return Rule(_checked(pattern, piece), name, reason=f"the rule '{pattern}' asks for {name}")
    if pattern.startswith("!"):
        return Rule(_checked(pattern[1:].strip(), piece), QUANTIZE, reason=f"the rule '{pattern}' asks for it")
    return Rule(_checked(pattern, piece), KEEP, reason=f"kept by the rule '{pattern}'")


def _checked(pattern: str, piece: str) -> str:
    if not pattern:
        raise FormatError(f"The keep rule '{piece}' has no pattern: write a glob such as 'blocks.0.*'.")
    try:
        _expression(pattern)
    except re.error as error:
        raise FormatError(
            f"The keep rule '{piece}' is no glob ({error}): write one such as 'blocks.[0-3].*'."
        ) from None
    return pattern
