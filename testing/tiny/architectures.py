"""ComfyUI's own classes of diffusion models: the arguments of the published models, and of tiny ones that run on a CPU."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import published
from .tensors import Tensors, draw

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion model of ComfyUI's.

    Attributes:
        model: its class below `comfy.ldm`.
        tiny: arguments of a tiny one that differ. Widths are multiples of 256, which the rotated formats need.
        inputs: what a forward of the tiny one is called with, by order: a shape is random numbers, a number a batch of
            one, everything else is handed on.
        options: further inputs, by name.
        real: arguments of the published model, as ComfyUI's detection reads them off the file, but for defaults.
        around_zero: globs of weights of one dimension that are added to one, so that they are small themselves.
    """

    model: str
    tiny: Arguments
    inputs: tuple[Any, ...]
    options: Arguments = field(default_factory=dict)
    real: Arguments = field(default_factory=dict)
    around_zero: tuple[str, ...] = ()

    def build(self, arguments: Arguments, **where: Any) -> torch.nn.Module:
        """ComfyUI's class with `arguments`; `where` is dtype, device and operations."""
        module, _, name = f"comfy.ldm.{self.model}".rpartition(".")
        return getattr(importlib.import_module(module), name)(**arguments, **where)

    def build_tiny(self, **where: Any) -> torch.nn.Module:
        """ComfyUI's class as a tiny model."""
        return self.build({**self.real, **self.tiny}, **where)

    def real_sized(self) -> torch.nn.Module:
        """The published model on the meta device, in bfloat16."""
        return _on_meta(partial(self.build, self.real))

    def small(self, operations: Any = None) -> torch.nn.Module:
        """The tiny model in float32 on the CPU, its weights not set; `operations` as ComfyUI hands them to its classes."""
        import comfy.ops

        operations = operations or comfy.ops.manual_cast
        model = self.build_tiny(dtype=torch.float32, device="cpu", operations=operations)
        return model.eval().requires_grad_(False)

    def weights(self, seed: int = 0) -> Tensors:
        """Random weights of the tiny model, as of a 16-bit file; what ComfyUI builds in 32 bits for is in 32."""
        tensors = _on_meta(self.build_tiny).state_dict()
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        drawn = draw({name: tuple(tensor.shape) for name, tensor in floats.items()}, seed, torch.float32)
        for name, tensor in drawn.items():
            if any(fnmatch.fnmatchcase(name, glob) for glob in self.around_zero):
                tensor.sub_(1)
        return {name: drawn[name].to(tensor.dtype) for name, tensor in floats.items()}

    def run(self, model: torch.nn.Module) -> torch.Tensor:
        """A forward of the tiny model: its outputs as one row, the same inputs at every call."""
        generator = torch.Generator().manual_seed(17)
        given = [_input(value, generator) for value in self.inputs]
        named = {name: _input(value, generator) for name, value in self.options.items()}
        with torch.inference_mode():
            found = model(*given, **named)
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        return torch.cat([output.flatten().float() for output in outputs if isinstance(output, torch.Tensor)])


def _on_meta(build: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    import comfy.ops

    from lowbit.host.weights.core_build import Numberless

    with Numberless():
        return build(dtype=torch.bfloat16, device="meta", operations=comfy.ops.manual_cast)


def _input(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, tuple) and value and all(isinstance(part, int) for part in value):
        return torch.randn(value, generator=generator)
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return [_input(part, generator) for part in value]
    return torch.tensor([value]) if isinstance(value, float) else value


_TINY_WAN = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 256}
_HIDREAM_O1_TINY = {
    "vocab_size": 151936,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

_TIME = 0.6
_LATENT, _VIDEO = (1, 16, 16, 16), (1, 16, 2, 8, 8)
_TEXT = (1, 8, 256)
_TINY_FLUX = {
    "hidden_size": 256,
    "num_heads": 2,
    "vec_in_dim": 256,
    "context_in_dim": 256,
    "depth": 2,
    "depth_single_blocks": 2,
}
_TINY_CHROMA = {
    **_TINY_FLUX,
    "vec_in_dim": None,
    "out_dim": 256,
    "hidden_dim": 256,
    "n_layers": 2,
}
_TINY_LUMINA = {
    "dim": 256,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "cap_feat_dim": 256,
}
_TINY_COSMOS = {"model_channels": 256, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 256}

ARCHITECTURES: dict[str, DiffusionModel] = {
    "Wan 2.2 T2V 14B": DiffusionModel("wan.model.WanModel", _TINY_WAN, (_VIDEO, _TIME, _TEXT), real=published.WAN),
    "Wan 2.1 I2V 14B": DiffusionModel(
        "wan.model.WanModel",
        _TINY_WAN,
        ((1, 36, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        real={**published.WAN, "model_type": "i2v", "in_dim": 36},
    ),
    "Wan VACE": DiffusionModel(
        "wan.model.VaceWanModel",
        {**_TINY_WAN, "vace_layers": 1},
        (_VIDEO, _TIME, _TEXT),
        {"vace_context": (1, 1, 96, 2, 8, 8), "vace_strength": [1.0]},
        real={**published.WAN, "vace_layers": 8, "vace_in_dim": 96},
    ),
    "Wan Animate": DiffusionModel(
        "wan.model_animate.AnimateWanModel",
        {**_TINY_WAN, "num_layers": 5},
        ((1, 36, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"pose_latents": (1, 16, 1, 8, 8), "face_pixel_values": (1, 3, 1, 512, 512)},
        real={**published.WAN, "in_dim": 36},
    ),
    "Wan Animate 2": DiffusionModel(
        "wan.model_animate2.WanAnimate2Model",
        _TINY_WAN,
        ((1, 36, 3, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"pose_latents": (1, 16, 2, 8, 8)},
    ),
    "Wan HuMo": DiffusionModel(
        "wan.model.HumoWanModel",
        _TINY_WAN,
        ((1, 36, 2, 8, 8), _TIME, _TEXT),
        {"audio_embed": (1, 2, 8, 5, 1280)},
        real={**published.WAN, "in_dim": 36},
    ),
    "Wan S2V": DiffusionModel(
        "wan.model.WanModel_S2V",
        {**_TINY_WAN, "audio_inject_layers": [0]},
        (_VIDEO, _TIME, _TEXT),
        {"audio_embed": (1, 25, 1024, 8)},
        real=published.WAN,
    ),
    "Wan camera control": DiffusionModel(
        "wan.model.CameraWanModel",
        _TINY_WAN,
        ((1, 36, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"camera_conditions": (1, 24, 2, 64, 64)},
        real={**published.WAN, "in_dim": 36},
    ),
    "Wan SCAIL": DiffusionModel(
        "wan.model.SCAILWanModel",
        _TINY_WAN,
        ((1, 20, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"pose_latents": (1, 20, 2, 4, 4)},
        real=published.WAN,
    ),
    "Wan SCAIL 2": DiffusionModel(
        "wan.model.SCAIL2WanModel",
        _TINY_WAN,
        ((1, 20, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"pose_latents": (1, 20, 2, 4, 4), "sam_latents": (1, 28, 2, 4, 4)},
        real=published.WAN,
    ),
    "WanDancer": DiffusionModel(
        "wan.model_wandancer.WanDancerModel",
        {**_TINY_WAN, "audio_inject_layers": [0]},
        ((1, 36, 2, 8, 8), _TIME, _TEXT, (1, 5, 1280)),
        {"clip_fea_ref": (1, 5, 1280), "audio_embed": (1, 9, 35)},
        real={**published.WAN, "in_dim": 36},
    ),
    "Qwen-Image": DiffusionModel(
        "qwen_image.model.QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
        ((1, 16, 1, 8, 8), _TIME, _TEXT),
    ),
    "Qwen-Image Layered": DiffusionModel(
        "qwen_image.model.QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
        ((1, 16, 2, 8, 8), _TIME, _TEXT),
        {"additional_t_cond": torch.tensor([0])},
        real={"use_additional_t_cond": True, "default_ref_method": "negative_index"},
    ),
    "Flux": DiffusionModel(
        "flux.model.Flux", _TINY_FLUX, (_LATENT, _TIME, _TEXT, (1, 256)), {"guidance": 3.5}, real=published.FLUX
    ),
    "Flux 2": DiffusionModel(
        "flux.model.Flux",
        {**_TINY_FLUX, "vec_in_dim": None},
        ((1, 128, 8, 8), _TIME, _TEXT),
        {"guidance": 3.5},
        real=published.FLUX2,
    ),
    "Chroma": DiffusionModel("chroma.model.Chroma", _TINY_CHROMA, (_LATENT, _TIME, _TEXT, 0.0), real=published.CHROMA),
    "Chroma Radiance": DiffusionModel(
        "chroma_radiance.model.ChromaRadiance",
        {**_TINY_CHROMA, "nerf_hidden_size": 32, "nerf_depth": 2},
        ((1, 3, 64, 64), _TIME, _TEXT, 0.0),
        real=published.RADIANCE,
    ),
    "HunyuanVideo": DiffusionModel(
        "hunyuan_video.model.HunyuanVideo",
        _TINY_FLUX,
        (_VIDEO, _TIME, _TEXT, (1, 256)),
        {"guidance": 6.0},
        real=published.HUNYUAN,
    ),
    "HunyuanVideo 1.5": DiffusionModel(
        "hunyuan_video.model.HunyuanVideo",
        {**_TINY_FLUX, "vec_in_dim": None, "vision_in_dim": 256, "depth_single_blocks": 0},
        ((1, 65, 2, 4, 4), _TIME, _TEXT),
        {"txt_byt5": (1, 4, 1472), "clip_fea": (1, 5, 256)},
        real=published.HUNYUAN_15,
    ),
    "HunyuanImage 2.1": DiffusionModel(
        "hunyuan_video.model.HunyuanVideo",
        {**_TINY_FLUX, "vec_in_dim": None},
        ((1, 64, 8, 8), _TIME, _TEXT),
        {"txt_byt5": (1, 4, 1472)},
        real=published.HUNYUAN_IMAGE,
    ),
    "LTXV": DiffusionModel(
        "lightricks.model.LTXVModel",
        {"attention_head_dim": 64, "num_attention_heads": 4, "cross_attention_dim": 256, "caption_channels": 256}
        | {"num_layers": 2},
        ((1, 128, 2, 4, 4), _TIME, _TEXT, None),
    ),
    "LTX-2": DiffusionModel(
        "lightricks.av_model.LTXAVModel",
        {"attention_head_dim": 128, "num_attention_heads": 2, "audio_attention_head_dim": 64}
        | {"audio_num_attention_heads": 4, "cross_attention_dim": 256, "audio_cross_attention_dim": 256}
        | {"caption_channels": 256, "num_layers": 2, "connector_num_attention_heads": 2},
        ([(1, 128, 2, 4, 4), (1, 8, 4, 16)], _TIME, (1, 128, 512)),
    ),
    "Z-Image": DiffusionModel("lumina.model.NextDiT", _TINY_LUMINA, (_LATENT, _TIME, _TEXT, 8), real=published.Z_IMAGE),
    "Lumina 2": DiffusionModel("lumina.model.NextDiT", _TINY_LUMINA, (_LATENT, _TIME, _TEXT, 8), real=published.LUMINA),
    "SD3.5 Large": DiffusionModel(
        "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        {
            "depth": 4,
            "adm_in_channels": 256,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 256, "out_features": 256},
            },
        },
        (_LATENT, _TIME, _TEXT, (1, 256)),
        real=published.SD3,
    ),
    "HiDream": DiffusionModel(
        "hidream.model.HiDreamImageTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "caption_channels": [256, 256]}
        | {"text_emb_dim": 256, "llama_layers": [0, 1, 1, 1]},
        (_LATENT, _TIME, (1, 256), _TEXT, (1, 2, 8, 256)),
        real=published.HIDREAM,
    ),
    "HiDream-O1": DiffusionModel(
        "hidream_o1.model.HiDreamO1Transformer",
        {
            "text_config_overrides": _HIDREAM_O1_TINY,
            "vision_config_overrides": {"hidden_size": 256, "num_heads": 2, "intermediate_size": 512, "depth": 1}
            | {"deepstack_visual_indexes": ()},
        },
        ((1, 3, 64, 64), 600.0),
        {
            "input_ids": torch.tensor([[5, 6, 7, 151673]]),
            "position_ids": torch.arange(8).expand(1, 3, 8),
            "ar_len": 0,
        },
    ),
    "PixelDiT": DiffusionModel(
        "pixeldit.model.PixDiT_T2I",
        {"hidden_size": 256, "num_groups": 2, "pixel_attn_hidden_size": 256, "pixel_num_groups": 2}
        | {"patch_depth": 2, "pixel_depth": 1, "txt_embed_dim": 256},
        ((1, 3, 64, 64), _TIME, _TEXT),
    ),
    "Cosmos Predict 2": DiffusionModel(
        "cosmos.predict2.MiniTrainDIT", _TINY_COSMOS, (_VIDEO, _TIME, _TEXT), {"fps": None}, real=published.COSMOS
    ),
    "Anima": DiffusionModel(
        "anima.model.Anima",
        {**_TINY_COSMOS, "crossattn_emb_channels": 1024},
        (_VIDEO, _TIME, (1, 8, 1024)),
        real=published.COSMOS,
    ),
    "Krea 2": DiffusionModel(
        "krea2.model.SingleStreamDiT",
        {"features": 256, "txtdim": 256, "heads": 2, "kvheads": 1, "layers": 2, "txtlayers": 3, "txtheads": 2}
        | {"txtkvheads": 2},
        (_LATENT, _TIME, (1, 8, 768)),
        around_zero=("*norm.scale", "*.qnorm.scale", "*.mod.lin"),
    ),
    "Ernie": DiffusionModel(
        "ernie.model.ErnieImageModel",
        {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 512},
        ((1, 128, 8, 8), _TIME, (1, 8, 512)),
    ),
    "AuraFlow": DiffusionModel(
        "aura.mmdit.MMDiT",
        {"dim": 256, "n_layers": 4, "n_double_layers": 2, "n_heads": 2, "global_conddim": 256, "cond_seq_dim": 256}
        | {"max_seq": 256},
        ((1, 4, 16, 16), _TIME, _TEXT),
        real={"max_seq": 4096},
    ),
    "Mochi": DiffusionModel(
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        {"depth": 3, "num_heads": 2, "hidden_size_x": 256, "hidden_size_y": 256, "t5_feat_dim": 256}
        | {"mlp_ratio_x": 48.0, "t5_token_length": 8},
        ((1, 12, 2, 8, 8), _TIME, _TEXT, torch.ones(1, 8, dtype=torch.bool)),
        {"num_tokens": 8},
        real=published.MOCHI,
    ),
    "Ideogram 4": DiffusionModel(
        "ideogram4.model.Ideogram4Transformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "intermediate_size": 512, "adaln_dim": 256}
        | {"llm_features_dim": 512, "mrope_section": (48, 40, 40)},
        ((1, 128, 8, 8), _TIME, (1, 8, 512)),
    ),
    "Kandinsky 5 Pro": DiffusionModel(
        "kandinsky5.model.Kandinsky5",
        {"model_dim": 256, "ff_dim": 512, "time_dim": 256, "in_text_dim": 256, "in_text_dim2": 256}
        | {"num_text_blocks": 1, "num_visual_blocks": 2},
        ((1, 33, 2, 8, 8), _TIME, _TEXT, (1, 256)),
        real=published.KANDINSKY,
    ),
    "MiniMax-H3": DiffusionModel(
        "minimax.model.MiniMaxH3Model",
        {"hidden_size": 256, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 2}
        | {"ffn_hidden_size": 512, "text_dim": 512, "time_embed_hidden_size": 256, "time_embed_dim": 128},
        ([(1, 24, 2, 8, 8), (1, 32, 2, 4)], 600.0, (1, 8, 512)),
    ),
    "Boogu": DiffusionModel(
        "boogu.model.BooguTransformer2DModel",
        {"hidden_size": 240, "num_layers": 2, "num_double_stream_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 1, "instruction_feat_dim": 256},
        (_LATENT, _TIME, _TEXT, 8),
    ),
    "OmniGen 2": DiffusionModel(
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        {"hidden_size": 240, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
        | {"text_feat_dim": 256},
        (_LATENT, _TIME, _TEXT, 8),
        real=published.OMNIGEN,
    ),
    "ACE-Step 1.0": DiffusionModel(
        "ace.model.ACEStepTransformer2DModel",
        {"num_attention_heads": 2, "num_layers": 2, "text_embedding_dim": 256, "max_position": 1024},
        ((1, 8, 16, 16), _TIME, torch.ones(1, 16), _TEXT),
        {
            "text_attention_mask": torch.ones(1, 8),
            "speaker_embeds": (1, 512),
            "lyric_token_idx": torch.arange(4)[None],
            "lyric_mask": torch.ones(1, 4),
        },
        real=published.ACE,
    ),
    "ACE-Step 1.5": DiffusionModel(
        "ace.ace_step15.AceStepConditionGenerationModel",
        {"hidden_size": 256, "text_hidden_dim": 256, "num_dit_layers": 2, "num_lyric_layers": 1}
        | {"num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 2}
        | {"intermediate_size": 512, "fsq_dim": 256, "encoder_hidden_size": 256, "encoder_intermediate_size": 512}
        | {"encoder_num_heads": 2},
        ((1, 64, 20), _TIME, _TEXT),
        {"lyric_embed": (1, 4, 256), "refer_audio": (1, 64, 20)},
    ),
    "SDXL": DiffusionModel(
        "modules.diffusionmodules.openaimodel.UNetModel",
        {"model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 4], "transformer_depth": [0, 2]}
        | {"transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 1, "context_dim": 256}
        | {"adm_in_channels": 256},
        ((1, 4, 16, 16), 300.0, _TEXT, (1, 256)),
        real=published.SDXL,
    ),
    "SeedVR2 7B": DiffusionModel(
        "seedvr.model.NaDiT",
        {"num_layers": 2, "mm_layers": 2, "vid_dim": 256, "heads": 2, "txt_in_dim": 512},
        ((1, 16, 1, 8, 8), 600.0, (1, 8, 512)),
        {"condition": (1, 17, 1, 8, 8), "transformer_options": {"cond_or_uncond": [0]}},
        real=published.SEEDVR,
    ),
    "CogVideoX": DiffusionModel(
        "cogvideo.model.CogVideoXTransformer3DModel",
        {"num_attention_heads": 4, "num_layers": 2, "time_embed_dim": 256, "text_embed_dim": 256},
        (_VIDEO, _TIME, _TEXT),
        real={"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "JoyImage": DiffusionModel(
        "joyimage.model.JoyImageTransformer3DModel",
        {"hidden_size": 256, "num_attention_heads": 2, "text_dim": 256, "num_layers": 2},
        (_VIDEO, _TIME, _TEXT),
    ),
    "Lens": DiffusionModel(
        "lens.model.LensTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 4, "enc_hidden_dim": 256},
        ((1, 128, 8, 8), _TIME, (1, 8, 1024)),
    ),
    "Mage-Flow": DiffusionModel(
        "mage_flow.model.MageFlowTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
        ((1, 128, 8, 8), _TIME, _TEXT),
    ),
}
"""Name -> class, arguments and inputs. Qwen-Image 2.1 is built as Qwen-Image is."""
