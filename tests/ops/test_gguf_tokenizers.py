"""Tokenizers made of what GGUF files keep cut text as the ones that the files were made from."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest

from lowbit.errors import CheckpointError
from lowbit.ops import gguf_file
from lowbit.ops.checkpoint import open_checkpoint
from testing.tiny.text_encoders import SENTENCES, sentencepiece_model

gguf = pytest.importorskip("gguf")
CONTROL, NORMAL = 3, 1
TEXTS = ("a red train", "a  cat on   a wall", "Zürich 東京", " film grain,\n35mm", "<end_of_turn>a")


def write(path, architecture, embedding, model, tokens, kinds, scores=None, **fields):
    """A GGUF file with an embedding and a tokenizer; a field is a number, a truth, a name or bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in fields.items():
        kind = {bool: "bool", int: "uint32", str: "string", bytes: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(f"tokenizer.ggml.{name}", value)
    writer.add_tensor(embedding, np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(old):
    """A sentencepiece model as llama.cpp's converter reads it."""
    numbers = range(old.get_piece_size())
    tokens, scores = [old.id_to_piece(number) for number in numbers], [old.get_score(number) for number in numbers]
    kinds = [
        CONTROL if old.is_control(number) else 2 if old.is_unknown(number) else 6 if old.is_byte(number) else NORMAL
        for number in numbers
    ]
    return tokens, kinds, scores


def test_umt5s_is_made_anew(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    content = sentencepiece_model(128).numpy().tobytes()
    old = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokens, kinds, scores = pieces(old)
    monkeypatch.setattr(gguf_file, "_UNIGRAM_VOCABULARY", len(tokens))
    roles = {"eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 2}
    characters = ModelProto.FromString(content).normalizer_spec.precompiled_charsmap
    path = write(
        tmp_path / "umt5.gguf",
        "t5encoder",
        "token_embd.weight",
        "t5",
        tokens,
        kinds,
        scores,
        **roles,
        add_space_prefix=True,
        remove_extra_whitespaces=True,
        precompiled_charsmap=characters,
    )
    made = open_checkpoint(path).read("spiece_model").numpy().tobytes()
    new = sentencepiece.SentencePieceProcessor(model_proto=made, add_eos=True)
    for text in TEXTS:
        assert new.encode(text) == [*old.encode(text), 1]


def test_other_t5s_have_one_of_comfyuis(tmp_path):
    path = write(tmp_path / "t5.gguf", "t5encoder", "token_embd.weight", "t5", ["<pad>", "a"], [3, 1], [0.0, 0.0])
    assert set(open_checkpoint(path).entries) == {"shared.weight"}


@pytest.mark.parametrize("unknown_is", [2, CONTROL])
def test_gemmas_is_made_anew(tmp_path, unknown_is):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    old = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue(), add_bos=True)
    tokens, kinds, scores = pieces(old)
    kinds[3] = unknown_is
    for symbol in ("<start_of_turn>", "<end_of_turn>"):
        kinds[tokens.index(symbol)] = CONTROL
    roles = {"padding_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3}
    path = write(
        tmp_path / "gemma.gguf",
        "gemma3",
        "token_embd.weight",
        "llama",
        tokens,
        kinds,
        scores,
        **roles,
        add_space_prefix=False,
    )
    made = open_checkpoint(path).read("spiece_model").numpy().tobytes()
    new = sentencepiece.SentencePieceProcessor(model_proto=made, add_bos=True)
    for text in TEXTS:
        assert new.encode(text) == old.encode(text)
    assert new.encode("a cat")[0] == 2
    assert new.encode("<end_of_turn>") == [2, tokens.index("<end_of_turn>")]
    assert new.decode(new.encode(TEXTS[1])) == TEXTS[1]


def test_a_gemma_with_another_kind_of_tokenizer_is_refused(tmp_path):
    path = write(tmp_path / "gemma.gguf", "gemma3", "token_embd.weight", "gpt2", ["a", "b"], [1, 1], [0.0, 0.0])
    with pytest.raises(CheckpointError, match=r"gemma\.gguf has a tokenizer of the kind 'gpt2', of which ComfyUI's"):
        open_checkpoint(path)


def gpt2_letters():
    """GPT-2's letters for bytes, as its encoder.py makes them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    for count, byte in enumerate(byte for byte in range(256) if byte not in shown):
        letters[byte] = chr(256 + count)
    return letters


@pytest.mark.parametrize("architecture", ["llama", "mistral3"])
def test_mistrals_is_the_tekken_file_that_it_was_made_from(tmp_path, architecture):
    letters = gpt2_letters()
    content = [bytes([byte]) for byte in range(256)] + [b"ca", b"cat", "ü".encode(), b" \n"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "<SPECIAL_4>"]
    tokens = special + ["".join(letters[byte] for byte in token) for token in content]
    kinds = [CONTROL] * 3 + [4, CONTROL] + [NORMAL] * len(content)
    path = write(tmp_path / "m.gguf", architecture, "token_embd.weight", "gpt2", tokens, kinds, pre="tekken")
    made = json.loads(open_checkpoint(path).read("tekken_model").numpy().tobytes())
    assert made["config"] == {"default_vocab_size": len(tokens), "default_num_special_tokens": 5}
    assert [base64.b64decode(word["token_bytes"]) for word in made["vocab"]] == content
    assert [word["rank"] for word in made["vocab"]] == list(range(len(content)))
    assert [(word["rank"], word["token_str"]) for word in made["special_tokens"]] == list(enumerate(special))


def test_llamas_own_is_comfyuis(tmp_path):
    path = write(tmp_path / "l.gguf", "llama", "token_embd.weight", "gpt2", ["a", "b"], [1, 1], pre="llama-bpe")
    assert set(open_checkpoint(path).entries) == {"model.embed_tokens.weight"}
