"""API-form prompts for the tiny checkpoints: Wan, Qwen-Image and InfiniteTalk, with core's loaders or with the pack's."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]
Link = list[Any]

PROMPT = "a cat walks over the quiet roof"
NEGATIVE = "blurry, low quality"

MEMORY_MANAGER = {
    "policy": "auto",
    "step_clearing": "auto",
    "every_n_steps": 1,
    "vram_limit_gib": 0.0,
    "sequential_cfg": "auto",
}
ATTENTION = {
    "backend": "auto",
    "error_budget": "balanced",
    "if_unavailable": "fall back",
    "pair_with_weights": True,
    "exact_first_steps": 0,
    "exact_last_steps": 0,
    "exact_sigma_from": 0.0,
    "exact_sigma_to": 0.0,
    "exact_blocks": "",
}
"""Every choice of a node of the pack as it first shows them: a prompt has to say them all."""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API-form prompt; a link is `[node id, output index]`."""
    return {"class_type": class_type, "inputs": inputs}


def relinked(graph: Graph, old: Link, new: Link) -> Graph:
    """The graph with `new` for everything that used `old`."""
    return {
        key: entry | {"inputs": {name: new if value == old else value for name, value in entry["inputs"].items()}}
        for key, entry in graph.items()
    }


def between(graph: Graph, link: Link, name: str, entry: dict[str, Any]) -> Graph:
    """The graph with a node between a link and everything that uses it; its first output takes the link's place."""
    return relinked(graph, link, [name, 0]) | {name: entry}


def load_diffusion_model(name: str, format: str | None = None, **options: Any) -> dict[str, Any]:
    """Core's UNETLoader, or the pack's loader when a format is given."""
    if format is None:
        return node("UNETLoader", unet_name=name, weight_dtype="default")
    return node("LowbitLoadDiffusionModel", unet_name=name, format=format, **_loader_options(options))


def load_text_encoder(name: str, type: str, format: str | None = None, **options: Any) -> dict[str, Any]:
    """Core's CLIPLoader, or the pack's loader when a format is given."""
    if format is None:
        return node("CLIPLoader", clip_name=name, type=type)
    return node(
        "LowbitLoadTextEncoder",
        clip_name=name,
        type=type,
        format=format,
        **({"device": "default"} | _loader_options(options)),
    )


def load_model_patch(name: str, format: str | None = None, **options: Any) -> dict[str, Any]:
    """Core's ModelPatchLoader, or the pack's loader when a format is given."""
    if format is None:
        return node("ModelPatchLoader", name=name)
    return node("LowbitLoadModelPatch", name=name, format=format, **_loader_options(options))


def _loader_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"keep_rules": "auto", "dry_run": False, "keep_quantized_file": True} | options


def _sample(
    model: Link, positive: Link, negative: Link, latent: Link, seed: int, steps: int, cfg: float = 3.0
) -> dict[str, Any]:
    return node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def lora(graph: Graph, name: str, strength: float = 1.0) -> Graph:
    """The same graph with a LoraLoaderModelOnly between node `model` and everything that uses it."""
    loader = node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=strength)
    return between(graph, ["model", 0], "lora", loader)


def conditioning_from_text(clip: dict[str, Any], prompt: str = PROMPT) -> Graph:
    """Nodes `clip`, `positive` and `negative`: the prompt and an empty-ish one through a text encoder."""
    return {
        "clip": clip,
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=NEGATIVE),
    }


def conditioning_random(width: int, tokens: int = 16, seed: int = 11) -> Graph:
    """Nodes `positive` and `negative` with Gaussian conditioning of this width, when the text encoder is not the point."""
    return {
        "positive": node("TinyConditioning", tokens=tokens, width=width, seed=seed),
        "negative": node("TinyConditioning", tokens=tokens, width=width, seed=seed + 1),
    }


def conditioning_from_image(clip: dict[str, Any], prompt: str = PROMPT, size: int = 64) -> Graph:
    """Qwen-Image-Edit's conditioning: the prompt and a seeded test image through Qwen2.5-VL and its vision tower."""
    edit = {"clip": ["clip", 0], "image": ["edited", 0]}
    return {
        "clip": clip,
        "edited": node("TinyImage", frames=1, height=size, width=size, seed=5),
        "positive": node("TextEncodeQwenImageEdit", prompt=prompt, **edit),
        "negative": node("TextEncodeQwenImageEdit", prompt=NEGATIVE, **edit),
    }


def decode(vae: dict[str, Any] | None = None) -> Graph:
    """Nodes `vae` and `images`: decodes node `sample`."""
    loader = vae or node("VAELoader", vae_name="wan_vae.safetensors")
    return {"vae": loader, "images": node("VAEDecode", samples=["sample", 0], vae=["vae", 0])}


def _from_noise(model: dict[str, Any], conditioning: Graph, latent: dict[str, Any], seed: int, steps: int) -> Graph:
    sample = _sample(["model", 0], ["positive", 0], ["negative", 0], ["latent", 0], seed, steps)
    return {"model": model, **conditioning, "latent": latent, "sample": sample}


def wan_t2v(
    model: dict[str, Any], conditioning: Graph, *, size: int = 64, frames: int = 5, seed: int = 1, steps: int = 2
) -> Graph:
    """Wan text-to-video: nodes model, latent, sample (add `decode()` for images)."""
    latent = node("EmptyHunyuanLatentVideo", width=size, height=size, length=frames, batch_size=1)
    return _from_noise(model, conditioning, latent, seed, steps)


def qwen_image(model: dict[str, Any], conditioning: Graph, *, size: int = 64, seed: int = 1, steps: int = 2) -> Graph:
    """Qwen-Image text-to-image: nodes model, latent, sample (add `decode()` for images)."""
    latent = node("EmptySD3LatentImage", width=size, height=size, batch_size=1)
    return _from_noise(model, conditioning, latent, seed, steps)


_START = {
    "vae": node("VAELoader", vae_name="wan_vae.safetensors"),
    "start": node("TinyImage", frames=1, height=64, width=64, seed=5),
}
_VISION = node("TinyClipVision", seed=6)


def _from_image(class_type: str, frames: int, **inputs: Any) -> dict[str, Any]:
    """A node that makes a video's latent of the seeded test image of `_START`."""
    links = {name: [name, 0] for name in ("positive", "negative", "vae")}
    return node(class_type, **links, start_image=["start", 0], width=64, height=64, length=frames, **inputs)


def wan_i2v(model: dict[str, Any], conditioning: Graph, *, clip_vision: bool, seed: int = 1) -> Graph:
    """Wan image-to-video from a seeded test image; `clip_vision` for 2.1, whose model has an image embedding."""
    graph = {
        "model": model,
        **conditioning,
        **_START,
        "latent": _from_image("WanImageToVideo", 5, batch_size=1),
        "sample": _sample(["model", 0], ["latent", 0], ["latent", 1], ["latent", 2], seed, steps=2),
    }
    if clip_vision:
        graph["vision"] = _VISION
        graph["latent"]["inputs"]["clip_vision_output"] = ["vision", 0]
    return graph


def infinitetalk(
    model: dict[str, Any],
    patch: dict[str, Any],
    conditioning: Graph,
    *,
    frames: int = 5,
    seed: int = 1,
    steps: int = 2,
) -> Graph:
    """InfiniteTalk, one speaker: seeded encoded audio drives a Wan 2.1 image-to-video model through the patch.

    cfg is 1: core's audio cross-attention cannot take the positive and the negative prompt in one batch.
    """
    return {
        "model": model,
        "patch": patch,
        **conditioning,
        **_START,
        "audio": node("TinyAudio", frames=40, seed=8),
        "vision": _VISION,
        "talk": _from_image(
            "WanInfiniteTalkToVideo",
            frames,
            mode="single_speaker",
            model=["model", 0],
            model_patch=["patch", 0],
            clip_vision_output=["vision", 0],
            audio_encoder_output_1=["audio", 0],
            motion_frame_count=1,
            audio_scale=1.0,
        ),
        "sample": _sample(["talk", 0], ["talk", 1], ["talk", 2], ["talk", 3], seed, steps, cfg=1.0),
    }


def dump(graph: Graph, name: str, **values: Link) -> Graph:
    """The graph with a TinyDump per value: `dump(graph, "a", latent=["sample", 0])` writes output/a/latent.safetensors."""
    return graph | {f"dump_{key}": node("TinyDump", value=link, name=f"{name}/{key}") for key, link in values.items()}
