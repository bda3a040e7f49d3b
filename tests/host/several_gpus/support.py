"""A sampling run, and what the tests put on a model."""

from __future__ import annotations

import copy

import torch

from testing import tiny

EXACT = 1e-5
"""Attention in float32 of fewer heads at a time."""


class Run:
    """One sampling run of fresh inputs, the same for every model it is made with.

    Args:
        shape: of the latent.
        text: tokens and width of the prompts, a number of tokens for each prompt.
        cfg: of the sampler.
        conds: what the conditionings have besides the text.
        mask: of the latent.
    """

    def __init__(self, shape, text=((7, 7), 64), cfg=3.0, conds=None, mask=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths, width = text
        self.noise = torch.randn(shape, generator=generator)
        self.mask, self.cfg, self.latent = mask, cfg, torch.randn(shape, generator=generator)
        self.prompts = [[[torch.randn(1, length, width, generator=generator), dict(conds or {})]] for length in lengths]

    def nudged(self) -> Run:
        """The same with noise that differs in its last bits, which tells what rounding makes of a trifle."""
        run = copy.copy(self)
        run.noise = self.noise * (1 + 1e-6)
        return run

    def sample(self, model, steps: int = 2) -> torch.Tensor:
        import comfy.sample

        prompts = [[[text.clone(), dict(extra)] for text, extra in prompt] for prompt in self.prompts]
        return comfy.sample.sample(
            model, self.noise.clone(), steps, self.cfg, "euler", "simple", *prompts, self.latent.clone(), seed=5,
            disable_pbar=True, noise_mask=self.mask,
        ).float()  # fmt: skip


def talking(host, model, frames: int, scale: float = 0.9):
    """The model with InfiniteTalk's patch, as core's node puts it on."""
    from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch

    patch = host.loading.load_model_patch(str(host.folder / "talk_patch.safetensors"))
    model = model.clone()
    generator = torch.Generator().manual_seed(4)
    model.model_options["transformer_options"]["audio_embeds"] = torch.randn(1, frames, 32, 32, generator=generator)
    model.set_model_patch(MultiTalkCrossAttnPatch(patch, scale), "attn2_patch")
    return model


def with_lora(model, strength: float, seed: int = 7):
    """The model with a LoRA through core's own loader."""
    import comfy.sd

    names = [key.removesuffix(".weight") for key in model.model.state_dict() if key.endswith(".weight")]
    weights = {}
    for name in names:
        if name.endswith(tiny.LORA_LAYERS):
            weight = model.get_model_object(f"{name}.weight")
            weights[f"{name.removeprefix('diffusion_model.')}.weight"] = weight
    layers = [name.removesuffix(".weight") for name in weights]
    lora = tiny.lora.make(weights, layers, seed=seed)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
