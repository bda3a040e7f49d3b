"""The names of what takes memory, and its sizes, as reports, charts and the live meter write them."""

from __future__ import annotations

DIFFUSION_MODEL = "diffusion model"
TEXT_ENCODER = "text encoder"
VAE = "VAE"
AUDIO_ENCODER = "audio encoder"
MODEL_PATCH = "model patch"
SCRATCH = "scratch"
OTHER = "other"

MODELS = (DIFFUSION_MODEL, TEXT_ENCODER, VAE, AUDIO_ENCODER, MODEL_PATCH)
"""Components that are models, which can leave the GPU and come back."""

COMPONENTS = (*MODELS, SCRATCH, OTHER)
"""Everything, in the order of charts and tables. `other` is what is left: activations, latents, other packs."""


GIB = 1 << 30


def size_text(nbytes: float) -> str:
    """GiB from a tenth of one up, MiB below."""
    return f"{nbytes / GIB:.2f} GiB" if abs(nbytes) >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
