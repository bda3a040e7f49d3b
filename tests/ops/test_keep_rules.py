"""Claims about keep rules: whole segments only, every family found, nothing silently kept."""

from __future__ import annotations

import pytest

from lowbit.errors import FormatError
from lowbit.ops.keep_rules import (
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
    "Wan VACE": WAN | {"vace_blocks.0.self_attn.q", "vace_patch_embedding"},
    "Wan Animate": WAN | {"face_adapter.fuser_blocks.0.linear1_q", "pose_patch_embedding"},
    "Wan HuMo": WAN | {"blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q", "audio_proj.proj1_glob"},
    "Wan S2V": WAN | {"casual_audio_encoder.encoder.conv1_local", "audio_injector.injector.0.q"},
    "Wan camera control": WAN | {"control_adapter.conv"},
    "Wan SCAIL": WAN | {"patch_embedding_pose"},
    "Wan (diffusers names)": {
        "condition_embedder.time_embedder.linear_1",
        "proj_out",
        "blocks.0.attn1.to_q",
        "blocks.0.attn2.to_q",
    },
    "Qwen-Image": QWEN,
    "InfiniteTalk / MultiTalk patch": {"audio_proj.proj1", "blocks.0.audio_cross_attn.q_linear"},
    "UMT5": {"shared", "encoder.block.0.layer.0.SelfAttention.q"},
    "Qwen2.5-VL": {"model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv", "model.embed_tokens"},
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
    ],
)
def test_patterns_match_whole_segments(pattern, layer, matches):
    assert Rule(pattern).matches(layer) is matches


def test_qwen_image_attention_is_not_kept_by_an_adapter_rule():
    """`add` as a substring would keep a third of Qwen-Image's attention."""
    rules = detect_family(QWEN).rules
    assert first_match(rules, "transformer_blocks.0.attn.add_q_proj") is None
    assert first_match(rules, "img_in").action == KEEP


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


def test_embeddings_are_kept_whatever_the_user_writes():
    family = detect_family(SIGNATURES["UMT5"])
    rules = expand_rules(parse_rules("!shared"), family)
    assert first_match(rules, "shared").action == KEEP


@pytest.mark.parametrize("layer", ["tok_embed", "model.word_embeddings", "transformer.wte", "pos_emb", "shared"])
def test_tables_of_an_unknown_family_are_kept_whatever_the_user_writes(layer):
    """Core looks rows up in FP8 and INT8 tables only, and a header does not tell a table from a linear layer."""
    rules = expand_rules(parse_rules(f"!{layer}, layers.0"), GENERIC)
    assert first_match(rules, layer).action == KEEP
    assert first_match(rules, "layers.1.q") is None


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


def test_what_is_a_large_share_of_the_model_is_quantized_by_a_rule_for_small_layers():
    rules = (Rule("adaln", largest_share=0.05), Rule("head"))
    small = affordable(rules, {"blocks.0.adaln": 5, "blocks.0.ffn": 90, "head": 5})
    large = affordable(rules, {"blocks.0.adaln": 3, "blocks.1.adaln": 3, "blocks.0.ffn": 14, "head": 80})
    assert [rule.pattern for rule in small] == ["adaln", "head"]
    assert [rule.pattern for rule in large] == ["head"]
    assert affordable(rules, {}) == rules


def test_connectors_of_ltx_are_no_embeddings():
    found = first_match(GENERIC.rules, "audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q")
    assert found.action == QUANTIZE


@pytest.mark.parametrize("text", ["a = fp6", "!", "!  # nothing", "= int8"])
def test_a_rule_that_makes_no_sense_is_refused(text):
    with pytest.raises(FormatError, match="keep rule"):
        parse_rules(text)


def test_a_users_rule_that_matches_nothing_is_reported():
    assert unmatched_rules(parse_rules("blocks.0, add"), WAN, user_written=True) == ("add",)
