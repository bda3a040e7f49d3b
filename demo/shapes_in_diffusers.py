"""The trained text-to-video model on diffusers' and transformers' own classes, in every format, through the pack's ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from testing.measure import held_bytes
from testing.tiny.text_encoders import Umt5Config
from testing.tiny.wan import WanConfig

from .clips import FOLDER, MODEL, SHOWN, TEXT_ENCODER, TRANSFORMER, VAE, Quality, qualities
from .progress import ProgressLine
from .quantized_modules import DEVICE, DTYPE, load
from .report import Row
from .shapes import FRAMES, SIZE, Scene

STEPS, CFG, SHIFT = 20, 2.0, 3.0
"""As demo/prompts/shapes_t2v.json has them."""
TEXT_TOKENS, CHANNELS = 512, 16
TRANSFORMER_SIZES = WanConfig(layers=4)
TEXT_SIZES = Umt5Config(ffn=256, vocabulary=32)
_LATENT = (1, CHANNELS, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)

Encode = Callable[[str], torch.Tensor]
Decode = Callable[[torch.Tensor], torch.Tensor]


def measure(folder: Path, formats: Sequence[str], scenes: Sequence[Scene] = SHOWN) -> Iterator[Quality]:
    """Makes the clips of `scenes` in bf16 and in every format; files of the transformer go to `folder`."""
    encode, decode = text_encoder(), decoder()
    source = transformer_file(folder)

    def make(name: str, progress: ProgressLine) -> tuple[list[torch.Tensor], Row]:
        started = time.monotonic()
        path, model = load(source, wan_transformer, name, folder, progress)
        clips = [decode(_sample(model, encode, scene, seed, progress)) for seed, scene in enumerate(scenes)]
        seconds = time.monotonic() - started
        return clips, Row(MODEL, name, path.stat().st_size, held_bytes(model), first_seconds=seconds)

    return qualities(formats, make, scenes)


def wan_transformer(sizes: WanConfig = TRANSFORMER_SIZES) -> torch.nn.Module:
    """diffusers' Wan transformer."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.dim // sizes.heads,
        text_dim=sizes.text,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
    )


def umt5_encoder(sizes: Umt5Config = TEXT_SIZES) -> torch.nn.Module:
    """transformers' UMT5."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=sizes.vocabulary,
            d_model=sizes.width,
            d_kv=sizes.head_dim,
            d_ff=sizes.ffn,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
        )
    )


def wan_vae(dim: int = 8) -> torch.nn.Module:
    """diffusers' Wan 2.1 VAE; `dim` is the width of its first convolution."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=dim, z_dim=CHANNELS)


def transformer_file(folder: Path) -> Path:
    """The trained transformer under the names that diffusers gives its weights."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    path = folder / "shapes.safetensors"
    save_file(convert_wan_transformer_to_diffusers(load_file(FOLDER / TRANSFORMER)), path)
    return path


def text_encoder() -> Encode:
    """The trained UMT5 in transformers: a prompt to embeddings (1, TEXT_TOKENS, width), zero behind its end."""
    import sentencepiece

    tensors = load_file(FOLDER / TEXT_ENCODER)
    words = sentencepiece.SentencePieceProcessor(
        model_proto=tensors.pop("spiece_model").numpy().tobytes(), add_eos=True
    )
    model = umt5_encoder().to(DEVICE).eval()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    model.load_state_dict(tensors)

    def encode(prompt: str) -> torch.Tensor:
        ids = torch.tensor([words.encode(prompt)], device=DEVICE)
        found = model(input_ids=ids).last_hidden_state
        return torch.nn.functional.pad(found, (0, 0, 0, TEXT_TOKENS - found.shape[1])).to(DTYPE)

    return encode


def decoder() -> Decode:
    """The trained VAE in diffusers: a latent (1, 16, t, h, w) to a clip (frames, height, width, 3) in [0, 1]."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = wan_vae().to(DEVICE).eval()
    vae.load_state_dict(convert_wan_vae_to_diffusers(load_file(FOLDER / VAE)))
    mean, deviation = (
        torch.tensor(numbers, device=DEVICE).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )

    def decode(latent: torch.Tensor) -> torch.Tensor:
        video = vae.decode(latent.float() * deviation + mean, return_dict=False)[0][0]
        return (video.permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).float().cpu()

    return decode


def _sample(model: torch.nn.Module, encode: Encode, scene: Scene, seed: int, progress: ProgressLine) -> torch.Tensor:
    """ComfyUI's Euler sampler on its simple schedule, from the noise that it draws for this seed."""
    latent = torch.randn(_LATENT, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    text = torch.cat([encode(scene.prompt()), encode("")])
    even = 1 - torch.arange(STEPS + 1) / STEPS
    sigmas = (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        both = latent.to(DTYPE).expand(2, -1, -1, -1, -1)
        time_now = torch.full((2,), 1000 * sigma, device=DEVICE, dtype=DTYPE)
        velocity = model(hidden_states=both, timestep=time_now, encoder_hidden_states=text, return_dict=False)[0]
        wanted, unwanted = velocity.float().chunk(2)
        latent = latent + (unwanted + CFG * (wanted - unwanted)) * (after - sigma)
        progress.step(scene.prompt(), step + 1, STEPS)
    return latent
