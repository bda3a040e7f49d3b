"""Claims about keep rules: whole segments only, every family found, nothing silently kept."""

from __future__ import annotations

import pytest

from lowbit.errors import FormatError
from lowbit.ops.diffusion_names import tables
from lowbit.ops.keep_rules import (
    EIGHT_BITS,
    FAMILIES,
    GENERIC,
    KEEP,
    QUANTIZE,
    Rule,
    affordable,
    detect_family,
    expand_rules,
    first_match,
    parse_rules,
    unmatched_rules,
)

WAN = {f"blocks.0.{name}" for name in ("self_attn.q", "cross_attn.q", "ffn.0", "ffn.2")} | {
    "patch_embedding",
    "text_embedding.0",
    "time_embedding.0",
    "time_projection.1",
    "head.head",
}
QWEN = {
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "norm_out.linear",
    "proj_out",
    *(
        f"transformer_blocks.0.{name}"
        for name in ("img_mod.1", "txt_mod.1", "attn.to_q", "attn.add_q_proj", "img_mlp.net.0.proj", "txt_mlp.net.2")
    ),
}
SIGNATURES = {
    "Wan": WAN,
    "Wan VACE": WAN | {"vace_blocks.0.self_attn.q", "vace_blocks.0.before_proj", "vace_patch_embedding"},
    "Wan Animate": WAN | {"face_adapter.fuser_blocks.0.linear1_q", "pose_patch_embedding"},
    "Wan HuMo": WAN | {"blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q", "audio_proj.proj1_glob"},
    "Wan S2V": WAN | {"casual_audio_encoder.encoder.conv1_local", "audio_injector.injector.0.q"},
    "Wan camera control": WAN | {"control_adapter.conv"},
    "Wan SCAIL": WAN | {"patch_embedding_pose"},
    "Wan Dancer": WAN | {"music_projection", "music_encoder.0.linear1"},
    "Wan (diffusers names)": {
        "condition_embedder.time_embedder.linear_1",
        "proj_out",
        "blocks.0.attn1.to_q",
        "blocks.0.attn2.to_q",
    },
    "Qwen-Image": QWEN,
    "InfiniteTalk / MultiTalk patch": {"audio_proj.proj1", "blocks.0.audio_cross_attn.q_linear"},
    "UMT5": {"shared", "encoder.block.0.layer.0.SelfAttention.q"},
    "Qwen-VL": {"model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv", "model.embed_tokens"},
    "text model": {"model.layers.0.self_attn.q_proj", "model.embed_tokens"},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_family_is_recognised_by_its_keys(name):
    assert detect_family(SIGNATURES[name]).name == name


def test_the_table_has_a_test_for_each_row():
    assert {family.name for family in FAMILIES} == set(SIGNATURES)
    assert detect_family({"something.else"}) is GENERIC


@pytest.mark.parametrize("name", SIGNATURES)
def test_expected_rules_match_their_own_family(name):
    family = detect_family(SIGNATURES[name])
    assert unmatched_rules(family.rules, SIGNATURES[name], user_written=False) == ()


@pytest.mark.parametrize(
    ("pattern", "layer", "matches"),
    [
        ("add", "blocks.0.attn.add_q_proj", False),
        ("add", "blocks.0.add.proj", True),
        ("add_*", "blocks.0.attn.add_q_proj", True),
        ("norm*", "blocks.0.norm1", True),
        ("norm", "blocks.0.norm1", False),
        ("ffn.0", "blocks.10.ffn.0", True),
        ("blocks.0", "blocks.0.ffn.2", True),
        ("blocks.0", "blocks.10.ffn.2", False),
        ("blocks.0", "vace_blocks.0.ffn.2", False),
        ("blocks.*.ffn", "blocks.7.ffn.2", True),
        ("a.b.c", "a.b", False),
        ("head", "head.head", True),
        ("head|head_global", "head_global.head", True),
        ("a|blocks.*.mod", "blocks.3.mod", True),
        ("a|b", "a_b", False),
        ("blocks.[1-3].q", "blocks.2.q", True),
        ("blocks.[!1-3].q", "blocks.2.q", False),
        ("blocks.1?", "blocks.1", False),
        ("a+b", "aab", False),
        ("q[", "q[", True),
    ],
)
def test_patterns_match_whole_segments(pattern, layer, matches):
    assert Rule(pattern).matches(layer) is matches


def test_qwen_image_attention_is_not_kept_by_an_adapter_rule():
    """`add` as a substring would keep a third of Qwen-Image's attention."""
    rules = detect_family(QWEN).rules
    assert first_match(rules, "transformer_blocks.0.attn.add_q_proj") is None
    assert first_match(rules, "img_in").action == KEEP


@pytest.mark.parametrize(
    ("file", "tower"),
    [
        (
            {"model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.qkv"},
            "model.visual.merger.fc1",
        ),
        ({"model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"}, "visual.blocks.0.attn.qkv"),
        ({"model.layers.0.self_attn.q_proj"}, "vision_model.encoder.layers.0.mlp.fc1"),
        ({"model.layers.0.self_attn.q_proj"}, "audio_model.layers.0.self_attn.post.linear"),
    ],
)
def test_what_a_language_model_sees_and_hears_by_stays_whatever_its_file_calls_it(file, tower):
    """Qwen3-VL's and Qwen 3.5's as published, Qwen2.5-VL's, Gemma 3's and Gemma 4's."""
    family = detect_family({*file, tower})
    assert family.kind == "text_encoder"
    assert first_match(family.rules, tower).action == KEEP
    assert first_match(family.rules, next(name for name in file if "q_proj" in name)) is None


def test_infinitetalk_keeps_its_audio_projection_and_quantizes_its_attention():
    rules = detect_family(SIGNATURES["InfiniteTalk / MultiTalk patch"]).rules
    assert first_match(rules, "audio_proj.proj1").action == KEEP
    assert first_match(rules, "blocks.3.norm_x").action == KEEP
    assert first_match(rules, "blocks.3.audio_cross_attn.kv_linear") is None


def test_a_users_text_is_read_line_by_line_with_comments_and_exceptions():
    rules = parse_rules("!blocks.0.ffn.0  # this one all the same\nblocks.0, img_mlp = fp8_e4m3fn_scaled; auto")
    assert [(rule.pattern, rule.action) for rule in rules] == [
        ("blocks.0.ffn.0", QUANTIZE),
        ("blocks.0", KEEP),
        ("img_mlp", "fp8_e4m3fn_scaled"),
        ("auto", KEEP),
    ]
    assert first_match(rules, "blocks.0.ffn.0").action == QUANTIZE
    assert first_match(rules, "blocks.0.ffn.2").action == KEEP


@pytest.mark.parametrize("text", ["", "auto", "  AUTO \n"])
def test_auto_means_the_familys_rules(text):
    assert parse_rules(text) is None


def test_auto_inside_a_text_stands_for_the_familys_rules():
    family = detect_family(WAN)
    assert expand_rules(parse_rules("blocks.0, auto"), family)[-len(family.rules) :] == family.rules


@pytest.mark.parametrize(
    "layer", ["tok_embed", "model.word_embeddings", "transformer.wte", "pos_emb", "shared", "model.embed_tokens"]
)
def test_tables_are_known_by_their_names_where_there_are_no_modules_to_ask(layer):
    """Core looks rows up in FP8 and INT8 tables only, and a header does not tell a table from a linear layer."""
    assert set(tables([layer, "layers.1.q", "t_embedder.mlp.0"])) == {layer}


@pytest.mark.parametrize(
    ("layer", "outside"),
    [
        ("proj_out", True),
        ("model.diffusion_model.img_in", True),
        ("time_embed.0", True),
        ("label_emb.0.0", True),
        ("blocks.0.proj_out", False),
        ("input_blocks.4.1.proj_in", False),
        ("txt_in.individual_token_refiner.blocks.0.mlp.fc1", False),
    ],
)
def test_a_layer_outside_the_blocks_has_no_name_behind_a_number(layer, outside):
    assert Rule("*", outside_blocks=True).matches(layer) is outside


def test_a_rule_for_small_layers_goes_where_they_would_add_much_to_the_quantized_model():
    rules = (Rule("adaln", most_added=0.1), Rule("head"))
    sizes = {"blocks.0.adaln": 8, "blocks.0.ffn": 87, "head": 5}
    assert [rule.pattern for rule in affordable(rules, sizes, 8)] == ["adaln", "head"]
    assert [rule.pattern for rule in affordable(rules, sizes, 4)] == ["head"]
    assert [rule.pattern for rule in affordable(rules, sizes | {"blocks.1.adaln": 8}, 8)] == ["head"]
    assert affordable(rules, {}, 4) == rules


@pytest.mark.parametrize(
    "layer",
    [
        "double_blocks.0.img_mod.lin",
        "single_blocks.0.modulation.lin",
        "layers.0.adaLN_modulation.1",
        "patch_blocks.0.adaLN_modulation_img.0",
        "blocks.0.adaln_proj.linear",
        "double_layers.0.modX.1",
        "blocks.0.mod_y",
        "blocks.0.norm1.linear",
        "double_stream_layers.0.instruct_norm2.linear",
        "input_blocks.1.0.emb_layers.1",
    ],
)
def test_modulation_under_any_name_takes_16_bits_where_they_are_few_and_8_elsewhere(layer):
    few = affordable(GENERIC.rules, {layer: 4, "blocks.0.ffn": 96}, 4)
    many = affordable(GENERIC.rules, {layer: 30, "blocks.0.ffn": 70}, 4)
    assert first_match(few, layer).action == KEEP
    assert first_match(many, layer).action == EIGHT_BITS


@pytest.mark.parametrize(
    "layer", ["blocks.0.attn.model.q", "blocks.0.norm1", "layers.0.modulated.linear", "blocks.0.mode"]
)
def test_other_names_are_no_modulation(layer):
    assert first_match(GENERIC.rules, layer) is None


@pytest.mark.parametrize("text", ["a = fp6", "!", "!  # nothing", "= int8", "blocks.[9-0]"])
def test_a_rule_that_makes_no_sense_is_refused(text):
    with pytest.raises(FormatError, match="keep rule"):
        parse_rules(text)


def test_a_users_rule_that_matches_nothing_is_reported():
    assert unmatched_rules(parse_rules("blocks.0, add"), WAN, user_written=True) == ("add",)
