"""`python -m tools.train`: trains the demo's text-to-video model on this machine's CPU and writes demo/trained/.

About an hour and a quarter on two cores. The result depends on how many steps fit into the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from demo.clips import FOLDER, TEXT_ENCODER, TRANSFORMER, VAE
from demo.shapes import batch
from demo.shapes_in_diffusers import TRANSFORMER_SIZES, wan_vae
from testing.tiny.tensors import write

from . import fit_dit, fit_vae, text_encoder, vae

MEAN, DEVIATION = (torch.tensor(wan_vae().config[name]) for name in ("latents_mean", "latents_std"))
"""Of each latent channel of Wan's VAE, which ComfyUI and diffusers take off."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the three files")
    parser.add_argument("--vae-seconds", type=float, default=2300, help="time for the VAE; 0 takes the one in --out")
    parser.add_argument("--seconds", type=float, default=2400, help="time for the transformer and the text encoder")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


@torch.no_grad()
def standardized(parameters: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same VAE with latents of Wan's mean and deviation, folded into the 1x1x1 convolutions next to the latent."""
    clips, _ = batch(200, torch.Generator().manual_seed(seed))
    latent = torch.cat([vae.encode(parameters, part * 2 - 1) for part in clips.split(10)])
    deviation, mean = torch.std_mean(latent, dim=(0, 1, 3, 4))
    out = {key: value.clone() for key, value in parameters.items()}
    channels = len(mean)
    scale = DEVIATION / deviation
    out["conv1.weight"][:channels] *= scale.view(-1, 1, 1, 1, 1)
    out["conv1.bias"][:channels] = (out["conv1.bias"][:channels] - mean) * scale + MEAN
    out["conv2.weight"] /= scale.view(1, -1, 1, 1, 1)
    out["conv2.bias"] += parameters["conv2.weight"][..., 0, 0, 0] @ mean - out["conv2.weight"][..., 0, 0, 0] @ MEAN
    return out


def _stored(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value if value.dtype == torch.uint8 else value.bfloat16() for key, value in parameters.items()}


def _train_vae(path: Path, arguments: argparse.Namespace) -> None:
    trained = fit_vae.fit(arguments.vae_seconds, arguments.seed, _say)
    write(path, _stored(standardized(trained, arguments.seed + 1)))


def _train_transformer(arguments: argparse.Namespace) -> None:
    parameters = {key: value.float() for key, value in load_file(arguments.out / VAE).items()}
    _say("encoding clips")
    data = fit_dit.latents(parameters, MEAN, DEVIATION, arguments.seed + 2)
    spiece_model = text_encoder.tokenizer(fit_dit.all_prompts())
    trained = fit_dit.fit(data, fit_dit.prompts(spiece_model), arguments.seconds, arguments.seed + 3, _say)
    transformer, encoder = fit_dit.apart(trained)
    write(arguments.out / TEXT_ENCODER, _stored(encoder | {"spiece_model": spiece_model}))
    write(arguments.out / TRANSFORMER, _stored(transformer), TRANSFORMER_SIZES.metadata())


_BEGAN = time.monotonic()


def _say(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:6.0f} s  {text}", flush=True)


def main() -> None:
    """Trains what the arguments ask for."""
    arguments = _arguments()
    if arguments.vae_seconds > 0:
        _train_vae(arguments.out / VAE, arguments)
    if arguments.seconds > 0:
        _train_transformer(arguments)


if __name__ == "__main__":
    main()
