"""What this folder takes from ComfyUI: without one of NEEDED the attention nodes are left out."""

from __future__ import annotations

from ...versions import dotted

NEEDED = dotted(
    {
        "comfy.ldm.modules.attention": "attention_pytorch optimized_attention",
        "comfy.patcher_extension": "WrappersMP",
        "comfy.patcher_extension.WrappersMP": ("APPLY_MODEL DIFFUSION_MODEL OUTER_SAMPLE PREDICT_NOISE SAMPLER_SAMPLE"),
        "folder_paths": "models_dir",
    }
)
OPTIONAL = {
    "comfy_execution.utils.get_executing_context": "the attention report counts on from one prompt to the next",
    **{
        f"comfy.ldm.modules.attention.attention_{name}": f"ComfyUI's {name} attention is not known to be exact"
        for name in ("basic", "flash", "split", "sub_quad", "xformers")
    },
    **{
        f"comfy.ldm.wan.{module}": "that model's audio or reference attention stays with ComfyUI's own kernel"
        for module in ("ar_model", "model_animate", "model_multitalk", "model_wandancer")
    },
}
"""Name -> what is lost without it."""
