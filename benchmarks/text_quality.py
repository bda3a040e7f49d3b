"""Measures what formats and heavy hitters cost: perplexity of a trained model on a text that is not drawn.

python -m benchmarks.text_quality MODEL.gguf --text FILE [--name SmolLM2-135M] [--out benchmarks/results/text_quality.json]
The model is any GGUF of the Llama, Qwen or Gemma 3 family; transformers reads its tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.goals import Goal
from benchmarks.textgen import keep
from lowbit.ops.checkpoint import open_checkpoint
from lowbit.ops.formats import FORMATS, find_format
from lowbit.text.architecture import Architecture, read_architecture
from lowbit.text.caches import FULL, HEAVY_HITTERS, CachePolicy
from lowbit.text.prompt import run_prompt
from lowbit.text.writer import Writer

NUMBERS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}
"""Hugging Face's name of a size -> GGUF's."""

UNSAID = {"gemma3": {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0}}
"""What a file of a family does not say (llama.cpp's src/models/gemma3.cpp has it as constants)."""


def architecture_of(path: Path) -> Architecture:
    """From the file's own fields."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind = fields["general.architecture"].contents()
    # A file leaves the output head out where the embeddings are it.
    config: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": True, **UNSAID.get(kind, {})}
    for name, theirs in NUMBERS.items():
        field = fields.get(f"{kind}.{theirs}")
        if field is not None:
            config[name] = field.contents()
    return read_architecture(config, path.name)


def tokens_of(path: Path, text: Path, count: int) -> list[int]:
    """The first tokens of a text by the file's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return tokenizer(text.read_text(encoding="utf-8"))["input_ids"][:count]


def load(path: Path, shape: Architecture, name: str | None) -> Writer:
    """The model, its linears in a format (None: in 16 bits)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Writer.build(open_checkpoint(path), shape, None if name is None else find_format(name), device)


@torch.inference_mode()
def at_once(writer: Writer, tokens: list[int]) -> float:
    """Perplexity of every token after the first, all in one forward: no cache has a part in it."""
    text = torch.tensor(tokens, device=writer.device)
    logits = run_prompt(writer.model, writer.architecture, text, 1, CachePolicy())
    return F.cross_entropy(logits[:-1].float(), text[1:]).exp().item()


def main() -> None:
    """Measures and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=100, help="tokens before the cache is looked at")
    parser.add_argument("--windows", default="16,64,128,252", help="newest tokens, and as many heavy hitters")
    parser.add_argument("--formats", default=",".join(name for name, row in FORMATS.items() if not row.fast))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_quality.json"))
    options = parser.parse_args()
    name = options.name or options.model.stem
    shape = architecture_of(options.model)
    tokens = tokens_of(options.model, options.text, options.tokens)
    rows: list[dict[str, Any]] = []

    def add(weights: str, contender: str, perplexity: float) -> None:
        rows.append({"model": name, "weights": weights, "contender": contender, "perplexity": perplexity})
        print(rows[-1], flush=True)

    for chosen in (None, *options.formats.split(",")):
        add(chosen or "16 bits", "all at once", at_once(load(options.model, shape, chosen), tokens))
    writer = load(options.model, shape, None)
    add("16 bits", "full cache", writer.perplexity(tokens, options.prompt, CachePolicy(FULL)))
    for window in (int(size) for size in options.windows.split(",")):
        policy = CachePolicy(HEAVY_HITTERS, window, window)
        add("16 bits", f"{window} newest, {window} heavy hitters", writer.perplexity(tokens, options.prompt, policy))
    whole = {row["weights"]: row["perplexity"] for row in rows if row["contender"] == "all at once"}
    found = [
        Goal(f"{name}: {weights}, perplexity", 1.02, "x 16 bits", at_most=True).judged(
            [whole[weights] / whole["16 bits"]]
        )
        for weights in ("int8", "fp8_e4m3fn_scaled")
        if weights in whole
    ]
    keep(options.out, name, rows, found)


if __name__ == "__main__":
    main()
