"""The UMT5 encoder on a table of parameters: transformers' class, made to be trained; and the tokenizer of the demo's prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch.func import functional_call

from demo.shapes_in_diffusers import TEXT_SIZES, umt5_encoder
from testing.tiny.text_encoders import PAD, Umt5Config, sentencepiece_model

Parameters = Mapping[str, torch.Tensor]


def tokenizer(prompts: Sequence[str]) -> torch.Tensor:
    """A sentencepiece model of the words of `prompts`."""
    words = {word for prompt in prompts for word in prompt.split()}
    return sentencepiece_model(len(words) + 3, prompts, model_type="word", character_coverage=1.0)


def tokenize(spiece_model: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the prompts, each with its end token, padded to the longest: (prompts, tokens), and which are real."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model.numpy().tobytes(), add_eos=True)
    rows = [processor.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def encode(
    parameters: Parameters, ids: torch.Tensor, real: torch.Tensor, config: Umt5Config = TEXT_SIZES
) -> torch.Tensor:
    """Embeddings of the tokens, zero where there is padding: (prompts, tokens) -> (prompts, tokens, width)."""
    found = functional_call(_model(config), dict(parameters), kwargs={"input_ids": ids, "attention_mask": real})
    return found.last_hidden_state * real[..., None]


@functools.cache
def _model(config: Umt5Config) -> torch.nn.Module:
    return umt5_encoder(config).eval()
