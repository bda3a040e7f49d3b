"""The three files of the trained model, and where they lie."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "trained"
VAE, TEXT_ENCODER, TRANSFORMER = "shapes_vae.safetensors", "shapes_umt5.safetensors", "shapes_t2v.safetensors"
PLACES = {TRANSFORMER: "diffusion_models", TEXT_ENCODER: "text_encoders", VAE: "vae"}
