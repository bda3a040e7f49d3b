"""What a language model is built like, read from a Hugging Face configuration or from a text encoder file's tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..ops.checkpoint import Checkpoint

_QWEN, _GEMMA = {"use_sliding_window": False}, {"tie_word_embeddings": True}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen2_5_vl_text": _QWEN,
    "qwen3": _QWEN,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA,
}
"""`model_type` of a configuration -> what transformers takes for said where it does not say it."""
_GEMMAS = ("gemma3_text", "gemma3")

_UNKNOWN_HABITS = {"partial_rotary_factor": 1.0, "attn_logit_softcapping": None, "final_logit_softcapping": None}
"""Of a configuration, with the value that leaves them out: no decoder here has them."""

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Architecture:
    """The sizes and habits of a decoder.

    Attributes:
        width, heads, kv_heads, head_dim, layers: of the language model.
        eps: of its norms.
        theta: base of the rotation.
        local_theta: that of layers with sliding attention, or None.
        rotary_factor: divides the positions of the rotation (linear scaling); 1.0: none.
        window: tokens that a layer of sliding attention sees, by layer; None: all.
        activation: of the feed-forward.
        scale: of attention's scores.
        embedding_scale: multiplies embeddings.
        adds_one: norms multiply by 1 + weight (Gemma).
        stop_tokens: end a text.
        tied: the embeddings are the output head too, where a file has none.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    eps: float
    theta: float
    local_theta: float | None
    rotary_factor: float
    window: tuple[int | None, ...]
    activation: str
    scale: float
    embedding_scale: float
    adds_one: bool
    stop_tokens: tuple[int, ...]
    tied: bool


def read_architecture(configuration: Mapping[str, Any], name: str) -> Architecture:
    """From `config.json`, and `generation_config.json` for the stop tokens where both are merged into it.

    Raises:
        CheckpointError: the model is of a family, or turns its rotation in a way, that is unknown here.
    """
    nested = configuration.get("text_config")
    nested = nested if isinstance(nested, dict) else {}
    config = {**configuration, **nested}
    kind = str(config.get("model_type", ""))
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{name} is {_called(kind)}, which lowbit generate does not know: use one of {', '.join(FAMILIES)}."
        )
    config = {**FAMILIES[kind], **config}
    try:
        return _read(config, kind in _GEMMAS, _ties(configuration, nested, FAMILIES[kind]), name)
    except KeyError as error:
        reason = f"says no {error}"
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        reason = f"cannot be read ({error})"
    raise CheckpointError(f"The configuration of {name} {reason}: download the folder again.")


def _called(kind: str) -> str:
    return f"a '{kind}'" if kind else "of a family that its configuration does not name"


def _ties(configuration: Mapping[str, Any], nested: Mapping[str, Any], family: Mapping[str, Any]) -> bool:
    """Whether the output head may be the embeddings: what the whole or its language model says, else its family."""
    key = "tie_word_embeddings"
    said = [bool(part[key]) for part in (configuration, nested) if part.get(key) is not None]
    return any(said) if said else bool(family.get(key, False))


def _read(config: Mapping[str, Any], gemma: bool, tied: bool, name: str) -> Architecture:
    for habit, none in _UNKNOWN_HABITS.items():
        if config.get(habit) not in (None, none):
            raise CheckpointError(f"{name} has '{habit}' of {config[habit]}, which lowbit generate does not know.")
    heads, count = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    theta, local_theta, factor = _rotation(config, name)
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if activation not in _GATES:
        raise CheckpointError(
            f"{name} has the activation '{activation}', which lowbit generate does not know: it has {', '.join(_GATES)}."
        )
    return Architecture(
        width=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        layers=count,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        theta=theta,
        local_theta=local_theta if gemma else None,
        rotary_factor=factor,
        window=_windows(config, count, gemma),
        activation=_GATES[activation],
        scale=float(config.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        embedding_scale=float(config["hidden_size"]) ** 0.5 if gemma else 1.0,
        adds_one=gemma,
        stop_tokens=_tokens(config.get("eos_token_id")),
        tied=tied,
    )


def _tokens(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)


def _rotation(config: Mapping[str, Any], name: str) -> tuple[float, float | None, float]:
    """(theta, theta of sliding layers, linear factor), in the spelling of transformers 4 or 5."""
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:
        local = parameters.get("sliding_attention", {}).get("rope_theta")
        parameters = parameters["full_attention"]
    else:
        local = config.get("rope_local_base_freq")
    scaling = config.get("rope_scaling") or parameters or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "mrope"):
        raise CheckpointError(f"{name} scales its rotation as '{kind}', which lowbit generate does not know.")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta", 10000.0))
    factor = float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0
    return theta, None if local is None else float(local), factor


def _windows(config: Mapping[str, Any], count: int, gemma: bool) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or (config.get("use_sliding_window") is False):
        return (None,) * count
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = int(config.get("sliding_window_pattern", 6)) if gemma else count + 1
        first = int(config.get("max_window_layers") or 0)
        kinds = [
            "sliding_attention" if index >= first and (index + 1) % pattern else "full_attention"
            for index in range(count)
        ]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


_QWEN_STOPS = [151643, 151645]
_WIDEST_TIED = 2560
"""Width of the largest Qwen2.5 and Qwen3 whose embeddings are the output head too (3B and 4B)."""


def guess_architecture(checkpoint: Checkpoint) -> Architecture:
    """From the tensors of a ComfyUI text encoder file: Qwen2.5 (VL) and Qwen3, whose constants are known.

    Raises:
        CheckpointError: it is another model.
    """
    entries = checkpoint.entries
    bias, norm = "model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.q_norm.weight"
    # Gemma; and Qwen3-VL, whose rotation has another base.
    others = "model.layers.0.pre_feedforward_layernorm.weight" in entries or any(
        "deepstack" in name for name in entries
    )
    if others or (bias not in entries and norm not in entries) or "model.embed_tokens.weight" not in entries:
        raise CheckpointError(
            f"{checkpoint.path.name} is neither a Qwen2.5 nor a Qwen3 text encoder: use one of these, or the Hugging Face folder "
            f"of one of {', '.join(FAMILIES)}."
        )
    count = 0
    while f"model.layers.{count}.input_layernorm.weight" in entries:
        count += 1
    head_dim = entries[norm].shape[0] if norm in entries else 128
    width = entries["model.embed_tokens.weight"].shape[1]
    heads = _rows(checkpoint, "model.layers.0.self_attn.q_proj") // head_dim
    kv_heads = _rows(checkpoint, "model.layers.0.self_attn.k_proj") // head_dim
    config = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": count,
        "rope_theta": 1e6,
        "eos_token_id": _QWEN_STOPS,
    }
    return _read(config, False, width <= _WIDEST_TIED, checkpoint.path.name)


def _rows(checkpoint: Checkpoint, layer: str) -> int:
    entries = checkpoint.entries
    known = entries.get(f"{layer}.bias") or entries.get(f"{layer}.weight")
    if known is None:
        raise CheckpointError(f"{checkpoint.path.name} has no '{layer}.weight': it is not whole, or another model.")
    return known.shape[0]


def read_configuration(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder, with the stop tokens of its `generation_config.json`.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    merged: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.exists() and name != "config.json":
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a model's configuration ({error}): download the folder again."
            ) from None
        merged |= values if name == "config.json" else {k: v for k, v in values.items() if k == "eos_token_id" and v}
    return merged
