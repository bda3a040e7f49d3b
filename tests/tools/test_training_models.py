"""The models that are trained compute what ComfyUI's own modules compute from the same file."""

from __future__ import annotations

import pytest
import torch

from demo.shapes_in_diffusers import TEXT_SIZES
from testing.tiny import text_encoders, wan
from testing.tiny import vae as tiny_vae
from testing.tiny.tensors import draw
from tools.train import __main__ as training
from tools.train import dit, fit_dit, text_encoder, vae
from tools.train.__main__ import DEVIATION, MEAN, standardized
from tools.train.fit_vae import start as start_vae
from tools.train.optimizing import Trained

pytestmark = pytest.mark.usefixtures("core_modules")

VAE_DIM = 4


def near(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((value - expected).abs().max() < 1e-4 * expected.abs().max())


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@torch.no_grad()
def test_the_vae_is_comfyuis(frames):
    import comfy.ldm.wan.vae

    parameters = draw(tiny_vae.shapes(VAE_DIM), dtype=torch.float32)
    module = comfy.ldm.wan.vae.WanVAE(
        dim=VAE_DIM, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True]
    ).float()
    module.load_state_dict(parameters)
    video = torch.randn(2, frames, 3, 24, 40)
    latent = vae.encode(parameters, video)
    assert latent.shape == (2, (frames + 3) // 4, 16, 3, 5)
    assert near(latent.transpose(1, 2), module.encode(video.transpose(1, 2)))
    decoded = vae.decode(parameters, latent).transpose(1, 2)
    assert decoded.abs().median() < 1
    assert near(decoded, module.decode(latent.transpose(1, 2)).clamp(-1, 1))


@torch.no_grad()
def test_the_transformer_is_comfyuis_with_512_tokens():
    import comfy.ldm.wan.model
    import comfy.ops

    config = wan.WanConfig(dim=128, ffn=192, heads=2, layers=2, text=64)
    parameters = draw(wan.shapes(config), dtype=torch.float32)
    module = comfy.ldm.wan.model.WanModel(
        model_type="t2v",
        in_dim=16,
        dim=config.dim,
        ffn_dim=config.ffn,
        text_dim=config.text,
        num_heads=config.heads,
        num_layers=config.layers,
        cross_attn_norm=True,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )
    module.load_state_dict(parameters)
    real = torch.arange(7) < torch.tensor([[3], [7]])
    text = torch.randn(2, 7, config.text) * real[..., None]
    latent, sigma = torch.randn(2, 16, 3, 6, 8), torch.tensor([0.2, 0.9])
    padded = torch.nn.functional.pad(text, (0, 0, 0, dit.TEXT_TOKENS - 7))
    assert near(dit.velocity(parameters, latent, sigma, text, real, config), module(latent, sigma * 1000, padded))


@torch.no_grad()
def test_the_text_encoder_and_its_tokens_are_comfyuis():
    import comfy.ops
    import comfy.text_encoders.t5
    import comfy.text_encoders.wan

    prompts = fit_dit.all_prompts()
    spiece_model = text_encoder.tokenizer(prompts)
    ids, real = text_encoder.tokenize(spiece_model, [prompts[5], prompts[100], ""])
    theirs = comfy.text_encoders.wan.WanT5Tokenizer(tokenizer_data={"spiece_model": spiece_model})
    for row, kept, prompt in zip(ids, real, (prompts[5], prompts[100], ""), strict=True):
        tokens = [token for token, _ in theirs.tokenize_with_weights(prompt)["umt5xxl"][0]]
        assert tokens[: kept.sum()] == row[kept].tolist()
        assert len(tokens) == dit.TEXT_TOKENS
        assert set(tokens[kept.sum() :]) == {text_encoders.PAD}
    assert text_encoders.UNKNOWN not in ids

    config = TEXT_SIZES
    parameters = draw(text_encoders.umt5_shapes(config), dtype=torch.float32)
    settings = {
        "d_model": config.width,
        "d_kv": config.head_dim,
        "num_heads": config.heads,
        "d_ff": config.ffn,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "num_layers": config.layers,
        "model_type": "umt5",
        "vocab_size": config.vocabulary,
    }
    module = comfy.text_encoders.t5.T5(settings, torch.float32, None, comfy.ops.manual_cast)
    module.load_state_dict(parameters)
    long = torch.randint(3, config.vocabulary, (2, 60))
    kept = torch.arange(60) < torch.tensor([[60], [23]])
    assert near(text_encoder.encode(parameters, long, kept), module(long, kept)[0] * kept[..., None])


@torch.no_grad()
def test_standard_latents_are_wans_and_decode_the_same(monkeypatch):
    import comfy.latent_formats

    core = comfy.latent_formats.Wan21()
    assert core.latents_mean.flatten().equal(MEAN)
    assert core.latents_std.flatten().equal(DEVIATION)
    plain = start_vae(torch.Generator().manual_seed(1))
    draw_clips = training.batch
    monkeypatch.setattr(training, "batch", lambda count, generator: draw_clips(4, generator))
    made = standardized(plain, 2)
    clip = torch.rand(1, 5, 3, 64, 64)
    first, second = vae.encode(plain, clip), vae.encode(made, clip)
    assert not near(first, second)
    assert near(vae.decode(made, second), vae.decode(plain, first))


def test_training_lowers_the_loss_of_both_models(monkeypatch):
    monkeypatch.setattr(fit_dit, "_BATCH", 16)
    generator = torch.Generator().manual_seed(1)
    data = fit_dit.Latents(torch.randn(1, 16, 4, 8, 8).expand(60, -1, -1, -1, -1), torch.arange(60))
    tokens = fit_dit.prompts(text_encoder.tokenizer(fit_dit.all_prompts()))
    trained = Trained(fit_dit.start(generator))
    losses = []
    for _ in range(8):
        chosen = torch.Generator().manual_seed(7)
        loss = fit_dit._loss(trained.low(), data, tokens, chosen)
        losses.append(loss.item())
        trained.step(loss, 5e-3)
    assert losses[-1] < 0.97 * losses[0]
    average = trained.average()
    assert {key: value.shape for key, value in average.items()} == {
        key: value.shape for key, value in fit_dit.start(generator).items()
    }
