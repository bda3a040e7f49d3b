"""Claims about Qwen2.5-VL, Qwen-Image's encoder: with its file's output head it writes, from text and from pictures."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from lowbit.errors import CapabilityError
from testing import tiny
from testing.tiny import lora

pytestmark = pytest.mark.headless

WRITING, SILENT = "text_encoders/qwen25_vl_writing.safetensors", "text_encoders/qwen25_vl.safetensors"
PREFIX = "text_encoders.qwen25_7b.transformer."
LENGTH = 10
GREEDY = {"do_sample": False, "max_length": LENGTH}
SAMPLED = {"do_sample": True, "max_length": LENGTH, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3}
FORMATS = ("none", "int8")


@pytest.fixture(scope="module")
def host(core_modules, tmp_path_factory):
    """Core on the CPU, where the tiny file is taken for what it is, and ours."""
    import comfy.sd
    from comfy.text_encoders.llama import BaseGenerate, Qwen25_7BVLI

    from lowbit.host.text import generating, route
    from lowbit.host.weights import loading, preparing
    from testing.shims import detection

    folder = tmp_path_factory.mktemp("models")
    files = {name: tiny.write(name, folder) for name in (WRITING, SILENT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CACHE_DIR", str(folder / "cache"))
        wrapped = detection._with_text_encoder_dims(comfy.sd.load_text_encoder_state_dicts)
        patch.setattr(comfy.sd, "load_text_encoder_state_dicts", wrapped)

        def load(name: str, format: str = "none") -> Any:
            path = preparing.prepared_file(preparing.plan_text_encoder(files[name], preparing.Request(format)))
            return loading.load_text_encoder([str(path)], comfy.sd.CLIPType.QWEN_IMAGE)

        def transformer(clip: Any) -> Any:
            return next(module for module in clip.cond_stage_model.modules() if isinstance(module, Qwen25_7BVLI))

        with torch.inference_mode():
            yield types.SimpleNamespace(
                load=load,
                transformer=transformer,
                route=route,
                core=BaseGenerate.generate,
                settings=generating.TextGeneration(),
                load_lora=comfy.sd.load_lora_for_models,
            )


@pytest.fixture(scope="module")
def clips(host):
    """The writing file in every format."""
    return {format: host.load(WRITING, format) for format in FORMATS}


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 56, 84, 3, generator=torch.Generator().manual_seed(4))


def core_writes(host, clip: Any, tokens: Any, **options: Any) -> list[int]:
    """What core's loop would write, were it told the stop tokens, the head and where the pictures are."""
    model = host.transformer(clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.route, "generate_text", lambda owner, settings, *args, **kw: host.core(owner, *args, **kw))
        patch.setattr(model.model.config, "stop_tokens", (151643, 151645), raising=False)
        patch.setattr(model, "logits", lambda x: model.model.lm_head(x[:, -1:]), raising=False)
        return host.route.install_settings(clip, host.settings).generate(tokens, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shows", [False, True], ids=["text", "picture"])
def test_it_writes_what_cores_loop_would(host, clips, picture, format, options, shows):
    clip = clips[format]
    tokens = clip.tokenize("a red train", **({"images": [picture]} if shows else {}))
    wanted = core_writes(host, clip, tokens, **options)
    assert host.route.install_settings(clip, host.settings).generate(tokens, **options) == wanted
    assert len(set(wanted)) > 1


def test_a_picture_is_looked_at(host, clips, picture):
    ours = host.route.install_settings(clips["none"], host.settings)
    written = [
        ours.generate(ours.tokenize("a red train", images=[image]), **GREEDY) for image in (picture, picture.flip(2))
    ]
    assert written[0] != written[1]


def given_by_generate_text(clip: Any, **options: Any) -> Any:
    """What core's Generate Text tokenizes."""
    plain = {"image": None, "video": None, "audio": None, "skip_template": False, "min_length": 1, "thinking": False}
    return clip.tokenize("a red train", **(plain | options))


def pictures_in(tokens: Any) -> int:
    return sum(isinstance(token[0], dict) for token in tokens["qwen25_7b"][0])


def test_generate_text_shows_its_pictures(host, clips, picture):
    ours = host.route.install_settings(clips["none"], host.settings)
    written = [
        ours.generate(given_by_generate_text(ours, image=image), **GREEDY) for image in (None, picture, picture.flip(2))
    ]
    assert len({tuple(tokens) for tokens in written}) == 3
    both = given_by_generate_text(ours, image=torch.cat([picture, picture]))
    assert pictures_in(both) == 2


def test_generate_text_makes_a_turn_of_a_chat(host, clips):
    """Core's templates are for encoding: one asks for a description of a picture, another never gives the word back."""
    ours = host.route.install_settings(clips["none"], host.settings)
    turn = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na red train<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = ours.tokenize("a red train")
    assert given_by_generate_text(ours) == ours.tokenize(turn) != plain
    assert given_by_generate_text(ours, skip_template=True) == ours.tokenize("a red train", llama_template="{}")
    assert plain == clips["none"].tokenize("a red train") == given_by_generate_text(clips["none"])


@pytest.mark.parametrize(
    "name",
    [
        "qwen_image.QwenImageTokenizer",
        "hunyuan_image.HunyuanImageTokenizer",
        "hunyuan_video.HunyuanVideo15Tokenizer",
        "kandinsky5.Kandinsky5Tokenizer",
        "longcat_image.LongCatImageTokenizer",
    ],
)
def test_every_tokenizer_of_this_encoder_gives_the_same_turn(host, clips, picture, name, monkeypatch):
    """Core's template of each is another, and LongCat's fills the prompt up, where nothing could go on."""
    import importlib

    module, _, kind = name.partition(".")
    tokenizer = getattr(importlib.import_module(f"comfy.text_encoders.{module}"), kind)()
    clip = host.route.install_settings(clips["none"], host.settings)
    wanted = clip.generate(given_by_generate_text(clip, image=picture), **GREEDY)
    monkeypatch.setattr(clip, "tokenizer", tokenizer)
    assert clip.generate(given_by_generate_text(clip, image=picture), **GREEDY) == wanted


@pytest.mark.parametrize(
    ("options", "left_out"),
    [({"skip_template": True}, ["image"]), ({}, []), ({"audio": {"waveform": torch.zeros(1, 1, 8)}}, ["audio"])],
)
def test_what_the_text_does_not_know_of_is_named(host, clips, picture, options, left_out, caplog):
    ours = host.route.install_settings(clips["none"], host.settings)
    given_by_generate_text(ours, image=picture, **options)
    assert [name for name in ("image", "video", "audio") if f"Left out of the text: {name}" in caplog.text] == left_out


def test_a_picture_that_no_part_of_the_model_sees_is_named(host, clips, picture, caplog, monkeypatch):
    """As core's Gemma 3 4B: its tokenizer has a place for pictures, and nothing is put there."""
    ours = host.route.install_settings(clips["none"], host.settings)
    monkeypatch.delattr(type(host.transformer(ours)), "preprocess_embed")
    given_by_generate_text(ours, image=picture)
    assert "Left out of the text: image" in caplog.text


def test_the_head_is_the_files_and_quantized_as_the_rest(host, clips):
    from lowbit.host.weights.operations import QuantizedLinear

    head = tiny.qwen25_writing_tensors()["lm_head.weight"].float()
    for format, clip in clips.items():
        module = host.transformer(clip).model.lm_head
        assert isinstance(module, QuantizedLinear) is (format != "none")
        weight = module.weight.dequantize() if format != "none" else module.weight
        assert (weight.float() - head).norm() / head.norm() < 0.04
        key = "qwen25_7b.transformer.model.lm_head.weight"
        assert key in clip.patcher.model_state_dict()
        assert clip.patcher.model_size() > host.load(SILENT, format).patcher.model_size()


def test_without_a_head_it_says_what_to_do(host):
    clip = host.route.install_settings(host.load(SILENT), host.settings)
    with pytest.raises(CapabilityError, match="has no output head"):
        clip.generate(clip.tokenize("a red train"), **GREEDY)


@pytest.mark.parametrize("format", FORMATS)
def test_a_lora_on_the_encoder_counts(host, clips, format):
    clip = clips[format]
    weights = tiny.qwen25_writing_tensors()
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(("q_proj.weight", "lm_head.weight"))]
    named = {name.replace("lm_head.", "model.lm_head."): tensor for name, tensor in weights.items()}
    layers = [name.replace("lm_head", "model.lm_head") for name in layers]
    _, patched = host.load_lora(None, clip, lora.make(named, layers, PREFIX), 0, 1.0)
    tokens = clip.tokenize("a red train")
    before = host.route.install_settings(clip, host.settings).generate(tokens, **GREEDY)
    ours = host.route.install_settings(patched, host.settings).generate(tokens, **GREEDY)
    assert ours == core_writes(host, patched, tokens, **GREEDY)
    assert ours != before
    assert host.route.install_settings(clip, host.settings).generate(tokens, **GREEDY) == before


def test_encoding_for_sampling_is_as_before(host, clips):
    clip = clips["none"]
    ours = host.route.install_settings(clip, host.settings)
    ours.generate(clip.tokenize("a red train"), **GREEDY)
    texts = [one.encode_from_tokens(one.tokenize("a red train")) for one in (clip, ours)]
    assert torch.equal(*texts)
    silent = host.load(SILENT)
    assert torch.equal(texts[0], silent.encode_from_tokens(silent.tokenize("a red train")))
