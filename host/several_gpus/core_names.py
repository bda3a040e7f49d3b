"""What this folder takes from ComfyUI: without one of NEEDED the Several GPUs node is left out."""

from __future__ import annotations

from ...versions import dotted

NEEDED = dotted(
    {
        "comfy.cli_args": "PerformanceFeature args enables_dynamic_vram",
        "comfy.ldm.modules.attention": "REGISTERED_ATTENTION_FUNCTIONS get_attention_function",
        "comfy.ldm.wan.model_multitalk": "MultiTalkCrossAttnPatch",
        "comfy.memory_management": "aimdo_enabled",
        "comfy.model_management": (
            "InterruptProcessingException get_all_torch_devices get_torch_device interrupt_current_processing is_oom "
            "load_models_gpu throw_exception_if_processing_interrupted"
        ),
        "comfy.model_patcher": "CoreModelPatcher ModelPatcherDynamic",
        "comfy.patcher_extension": "WrappersMP",
        "comfy.patcher_extension.WrappersMP": "APPLY_MODEL CALC_COND_BATCH DIFFUSION_MODEL OUTER_SAMPLE",
        "comfy.sd": "load_diffusion_model",
        "comfy.weight_adapter": "adapters",
        "comfy_aimdo.control": "init init_devices set_log_warning",
    }
)
OPTIONAL = {
    "comfy.ldm.wan.model.WanModel": "Wan models run on one GPU",
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": "Qwen-Image models run on one GPU",
    "comfy.model_management.reset_cast_buffers": "workers keep the memory of their last run",
    "comfy.model_prefetch.cleanup_prefetch_queues": "workers keep what they fetched ahead in a run that broke off",
    "comfy_aimdo.model_vbar.vbars_reset_watermark_limits": "workers that were short of memory once stream weights from then on",
}
"""Name -> what is lost without it."""
